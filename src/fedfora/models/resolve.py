"""From the name of a base or an adapter to where it is, and to what is stored with an adapter.

Nothing heavy is loaded for it.
"""

import json
import re
from collections.abc import Collection
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from fedfora.data.encoding import PromptFormat
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.protection.provenance import signed_files
from fedfora.protection.sealing import is_sealed, read_bytes
from fedfora.registry import nearest, need, try_hub, unknown

RECORD, WEIGHTS = "fedfora.json", "adapter_model.safetensors"
BUNDLED = {"clinic-base": "clinic_base"}
NOT_NEEDED = ["*.py", "*.pdf"]  # what a checkpoint may bring; code is never downloaded
# How a GGUF file begins, and the families that transformers reads as a causal language model.
_GGUF = re.compile(rb"GGUF.{20}\x14\0{7}general\.architecture\x08\0{3}(.)\0{7}(.*)", re.DOTALL)
_IN_GGUF = (
    "bloom deci falcon gemma2 gemma3 gemma4 gpt-oss gpt2 lfm2 llama mamba minimax-m2 mistral "
    "nemotron phi3 qwen2 qwen2moe qwen3 qwen35 qwen35moe qwen3moe stablelm starcoder2"
)
# Families whose modules are called as their weights in the file, by `model_type`.
_NAMED_ALIKE = re.compile(
    r"llama|mistral|smollm3|qwen[23]|gemma[23]?(_text)?|phi3?|opt|gpt_neox|bloom"
)


def checked_model_name(settings: ModelArguments) -> str:
    """Return what the user named, if it can be a model at all.

    Raises:
        ValueError: If nothing was named, a directory without a model, or an id without one.
    """
    name = settings.model_name_or_path
    if not name:
        raise ValueError("--model_name_or_path is missing: a directory, a Hub id, or clinic-base")
    check_model_name(name)
    if settings.hub == "huggingface" and name not in BUNDLED and not Path(name).exists():
        unreached = try_hub()
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(name, "config.json", cache_dir=settings.cache_dir)
        except Exception as error:  # of many kinds: no such id, private, gated, no network
            reason = f"no such directory, and no model of that id on the Hub: {unreached or error}"
            raise ValueError(f"--model_name_or_path {name}: {reason}") from error
    return name


def model_type_of(settings: ModelArguments) -> str:
    """Return a base's family, as its configuration says; "" where none that can be read is here."""
    name = str(settings.model_name_or_path)
    try:
        path: Any = Path(model_path(name)) / "config.json"
        if not path.is_file() and settings.hub == "huggingface":
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(name, "config.json", cache_dir=settings.cache_dir)
        config = json.loads(Path(path).read_bytes())
        return str(config.get("text_config", config)["model_type"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def resolve_model(settings: ModelArguments) -> str:
    """Return the directory of the model that the user named, or its id on Hugging Face.

    Raises:
        ValueError: If nothing was named, or there is no model.
    """
    name = checked_model_name(settings)
    return model_path(name, hub=settings.hub, cache_dir=settings.cache_dir)


def model_path(name: str, *, hub: str = "huggingface", cache_dir: str | None = None) -> str:
    """Return the directory of a bundled or a ModelScope model, a GGUF file, or the name as it is.

    Args:
        name: A directory or file, which wins whatever the hub, or an id such as
            "baichuan-inc/Baichuan2-7B-Chat".
        hub: "huggingface", whose ids transformers finds by itself, or "modelscope".
        cache_dir: Where ModelScope keeps what it downloads; None takes its own default.

    Raises:
        ValueError: If the name is a directory without a model, or ModelScope cannot provide it.
    """
    if name in BUNDLED:
        with as_file(files("fedfora.models") / BUNDLED[name]) as path:
            return str(path)
    check_model_name(name)
    if gguf_files := _gguf_files(name):
        return str(gguf_files[0])
    if hub == "huggingface" or Path(name).exists():
        return name
    modelscope = need("modelscope", "modelscope")
    try:
        return str(
            modelscope.snapshot_download(name, cache_dir=cache_dir, ignore_patterns=NOT_NEEDED)
        )
    except Exception as error:  # its errors have no common kind; the user needs their message
        raise ValueError(
            f"--model_name_or_path {name}: ModelScope cannot provide it: {error}"
        ) from error


def source(path: str) -> dict[str, str]:
    """Return what `from_pretrained` of transformers takes for a path of `model_path`."""
    if not Path(path).is_file():
        return {"pretrained_model_name_or_path": path}
    directory = str(Path(path).resolve().parent)
    return {"pretrained_model_name_or_path": directory, "gguf_file": Path(path).name}


def _gguf_files(name: str) -> list[Path]:
    """Return the GGUF files that a name stands for: itself, or those of a directory of GGUF."""
    path = Path(name)
    if path.is_dir():
        return [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    return [path] if path.is_file() and path.suffix == ".gguf" else []


def check_model_name(name: str) -> None:
    """Raise if a name cannot be a model: neither bundled, nor a model's directory, nor an id.

    Raises:
        ValueError: Saying what is there instead.
    """
    if name in BUNDLED:
        return
    path = Path(name)
    if gguf_files := _gguf_files(name):
        if len(gguf_files) > 1:
            found = ", ".join(file.name for file in gguf_files)
            raise ValueError(f"--model_name_or_path {name}: more than one GGUF; name one: {found}")
        with gguf_files[0].open("rb") as file:
            head = file.read(128)
        flag = f"--model_name_or_path {gguf_files[0]}"
        if not head.startswith(b"GGUF"):
            raise ValueError(f"{flag}: not a GGUF file by its first bytes")
        if begins := _GGUF.match(head):
            family = begins[2][: ord(begins[1])].decode(errors="replace")
            if family not in (known := _IN_GGUF.split()):
                raise ValueError(f"{flag}: {unknown('GGUF family', family, known)}")
        need("gguf", "gguf")
        return
    if path.is_file():
        raise ValueError(
            f"--model_name_or_path {name}: that is a file, but not *.gguf; name the "
            "directory that holds config.json"
        )
    if all((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"--model_name_or_path {name}: the directory also holds an adapter, which would be "
            "loaded with the base; move adapter_config.json and adapter_model.* elsewhere"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        what = "the directory holds no config.json"
        if (path / "adapter_config.json").is_file():
            what = "that is an adapter, not a base model (use --model_dir)"
        raise ValueError(f"--model_name_or_path {name}: {what}")
    is_no_id = name.startswith(("/", ".", "~")) or name.count("/") > 1  # an id is `owner/name`
    hint = "" if "/" in name else nearest(name, BUNDLED)
    if not path.is_dir() and (is_no_id or hint):
        raise ValueError(f"--model_name_or_path {name}: no model there: no such directory{hint}")


def adapter_dir_of(
    model_dir: str | None, checkpoint_dir: str | None = None, *, flag: str = "--model_dir"
) -> Path | None:
    """Return the directory that holds the adapter: the checkpoint, where one is named.

    `flag` is what names `model_dir`.

    Raises:
        ValueError: If there is no adapter.
    """
    if checkpoint_dir is None:
        if model_dir is not None:
            check_adapter_dir(model_dir, flag)
        return None if model_dir is None else Path(model_dir)
    for place in (Path(checkpoint_dir), Path(model_dir or "") / checkpoint_dir):
        if (place / "adapter_config.json").is_file():
            check_adapter_dir(place, "--checkpoint_dir")
            return place
    raise ValueError(f"--checkpoint_dir {checkpoint_dir}: no directory with adapter_config.json")


def check_named(settings: ModelArguments, adapter_dir: str | Path | None) -> str:
    """Return what user or adapter name as the base; raise if that can be none, naming the flag."""
    if adapter_dir is not None and settings.model_name_or_path is None:
        settings = replace(settings, model_name_or_path=base_name_of(adapter_dir))
    return checked_model_name(settings)


def base_name_of(adapter_dir: str | Path) -> str:
    """Return the name of the base model that an adapter was trained on.

    Raises:
        ValueError: If the directory holds no adapter.
    """
    base = check_adapter_dir(adapter_dir).get("base_model_name_or_path")
    if not isinstance(base, str):
        file = Path(adapter_dir) / "adapter_config.json"
        raise ValueError(f"{file} names no base_model_name_or_path (--model_name_or_path)")
    return base


def check_adapter_dir(
    adapter_dir: str | Path, flag: str = "--model_dir", *, kind: str | None = None
) -> dict[str, Any]:
    """Return an adapter's configuration.

    Raises:
        ValueError: If there is no adapter, only a part of one, or one of another `kind`, naming
            directory and flag.
    """
    path, file = Path(adapter_dir), Path(adapter_dir) / "adapter_config.json"
    if not file.is_file():
        base = (path / "config.json").is_file()
        what = "the directory holds no adapter_config.json" if path.is_dir() else "not a directory"
        remedy = "; for a base model use --model_name_or_path" if base else ""
        raise ValueError(f"{flag} {adapter_dir}: {what}{remedy}")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
        reason = "" if isinstance(config.get("peft_type"), str) else "peft_type is missing"
    except AttributeError:
        reason = "not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"not JSON: {error}"
    if reason:
        raise ValueError(f"{flag}: {file} is not an adapter's configuration: {reason}")
    if not any(path.glob("adapter_model.*")):
        raise ValueError(f"{flag} {adapter_dir}: the adapter's weights, {WEIGHTS}, are missing")
    if is_sealed(path / WEIGHTS):
        read_bytes(path / WEIGHTS)  # says where this machine's key does not open it
    if kind not in (None, found := config["peft_type"]):
        raise ValueError(f"{flag} {adapter_dir}: expected a {kind} adapter, this one is {found}")
    return config


def check_start(settings: AdapterArguments) -> None:
    """Raise if there is no adapter to start from, or one of another form, naming the flags.

    What all-linear stands for is known only once the base is there; `add_adapter` compares that.
    """
    if (start := settings.start_adapter) is None:
        return
    config = check_adapter_dir(start, "--start_adapter", kind="FORA")
    read_record(start)
    rank, targets = config.get("r"), config.get("target_modules")  # names, or one pattern
    alpha, rslora = config.get("lora_alpha"), bool(config.get("use_rslora"))
    wanted = [] if rank == settings.lora_rank else [f"--lora_rank {rank}"]
    if alpha not in (None, settings.lora_alpha or 2 * (rank or 0)):
        wanted.append(f"--lora_alpha {alpha}")
    if rslora != settings.use_rslora:
        wanted.append(f"--use_rslora {str(rslora).lower()}")
    names, ours = sorted(map(str, targets or [])), settings.target_modules
    if isinstance(targets, list) and ours != ["all-linear"] and sorted(ours) != names:
        wanted.append(f"--target_modules {' '.join(names)}")
    if wanted:
        raise ValueError(f"--start_adapter {start}: of another form; use {' '.join(wanted)}")


def read_record(directory: str | Path) -> dict[str, Any]:
    """Return the contents of fedfora.json in an adapter's directory, or an empty mapping.

    Raises:
        ValueError: If the file is not a record.
    """
    path = Path(directory) / RECORD
    if not path.is_file():
        return {}
    files = signed_files(path.parent)
    try:
        record: dict[str, Any] = json.loads(read_bytes(path, files))
        PromptFormat(**record["prompts"])
        if not isinstance(record.get("base", {}), dict):
            raise TypeError("base is not an object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an adapter's record: {error}") from error
    return record


def read_prompt_format(directory: str | Path) -> PromptFormat | None:
    """Return the prompt format stored with an adapter, or None."""
    record = read_record(directory)
    return PromptFormat(**record["prompts"]) if record else None


def settings_of_base(
    settings: ModelArguments,
    adapter_dir: str | Path,
    given: Collection[str],
    record: dict[str, Any] | None = None,
) -> ModelArguments:
    """Return how the base was named and held in the adapter's training, but for what was given.

    Args:
        settings: The user's settings of the base.
        adapter_dir: Directory of the adapter.
        given: Names of the options that the user set; "auto" does not count.
        record: What is stored with the adapter; None reads it from the directory.

    Raises:
        ValueError: If the directory holds no adapter.
    """
    named = settings.model_name_or_path or base_name_of(adapter_dir)
    trained = (read_record(adapter_dir) if record is None else record).get("base", {})
    held = {
        "quantization": trained.get("quantization"),
        "torch_dtype": trained.get("dtype"),
        # a CPU has no other choice than "auto"
        "bnb_4bit_use_double_quant": "false" if trained.get("double_quant") is False else None,
    }
    chosen = {key for key in given if getattr(settings, key, None) != "auto"}
    changes = {key: value for key, value in held.items() if value and key not in chosen}
    return replace(settings, model_name_or_path=named, **changes)


def check_targets(settings: ModelArguments, targets: list[str]) -> None:
    """Raise if a target is not a layer of a base whose files are here, naming its layers."""
    if targets == ["all-linear"] or not settings.model_name_or_path:
        return
    weights = _weights(Path(model_path(settings.model_name_or_path)))
    layers = {layer for layer in weights if len(weights[layer]) == 2}
    known = sorted({layer.rsplit(".", 1)[-1] for layer in layers if "embed" not in layer})
    for target in targets if known else ():
        tied = target in ("lm_head", "embed_out")  # may stand in no file
        if not tied and not any(f".{layer}".endswith(f".{target}") for layer in weights):
            raise ValueError(
                f"--target_modules {target}: no layer of {settings.model_name_or_path} is called "
                f"that; there are {', '.join(known)} (or all-linear)"
            )


def _weights(directory: Path) -> dict[str, list[int]]:
    """Return layers and the shapes of their weights from safetensors' headers; none if unsure."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not _NAMED_ALIKE.fullmatch(config["model_type"]):
            return {}
        headers: dict[str, Any] = {}
        for path in directory.glob("*.safetensors"):
            with path.open("rb") as file:
                headers |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {
            name.removesuffix(".weight"): entry["shape"]
            for name, entry in headers.items()
            if name.endswith(".weight")
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return {}  # loading the base says what is wrong with it
