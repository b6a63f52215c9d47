"""FoRA to LoRA and back, exactly: a FoRA adapter is a LoRA adapter with `lora_B = D K`.

What is written here loads in plain PEFT, without fedfora, and in every server that takes LoRA.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from fedfora.adapter import ForaConfig
from fedfora.adapter.state import AdapterState, fold, from_peft_key, layers_of, peft_key, unfold
from fedfora.models.resolve import RECORD, WEIGHTS, check_adapter_dir
from fedfora.protection.provenance import signed_files
from fedfora.protection.sealing import load_tensors, read_bytes

# What both configurations call by the same name, with the same meaning.
SHARED = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "fan_in_fan_out"),
)


def to_lora(source: PeftModel | str | Path, output_dir: str | Path) -> Path:
    """Write a FoRA adapter as a LoRA adapter of the same rank, scaling and function.

    The source is a PEFT model whose active adapter is FoRA, or the directory of a saved one; the
    output directory is returned.

    Raises:
        ValueError: If the source is not a FoRA adapter.
    """
    config, state, lora = _read_source(source)
    folded = fold({name: tensor.double() for name, tensor in state.items()})
    for layer in layers_of(state):
        D_OR = folded[f"{layer}.D"]
        DK_OR = D_OR + D_OR @ folded[f"{layer}.E"]
        lora[peft_key(f"{layer}.A", "lora")] = state[f"{layer}.A"]
        lora[peft_key(f"{layer}.B", "lora")] = DK_OR.to(state[f"{layer}.D"].dtype)
    bias = "lora_only" if config["bias"] == "fora_only" else config["bias"]
    lora_config = LoraConfig(bias=bias, **{key: config[key] for key in SHARED if key in config})
    _write(Path(output_dir), lora_config, lora, source)
    return Path(output_dir)


def from_lora(source: str | Path, output_dir: str | Path, *, seed: int = 42) -> Path:
    """Write a LoRA adapter as a FoRA adapter of the same function: K = I, by E = 0 and B = 0.

    C is drawn from the seed; it has no effect until B is trained. The output directory is returned.

    Raises:
        ValueError: If the source is not a LoRA adapter, or uses a variant that FoRA cannot hold.
    """
    config, weights = _read_directory(source, "LORA")
    state, fora = _split(weights, "lora")
    if strange := [name for name in state if not name.endswith((".A", ".B"))]:
        key = peft_key(strange[0], "lora")
        raise ValueError(f"this LoRA variant cannot become FoRA: it has {key}")
    for layer in layers_of(state):
        A_RI, D_OR = state[f"{layer}.A"], state[f"{layer}.B"]
        E_RR = A_RI.new_zeros(len(A_RI), len(A_RI))
        folded = {f"{layer}.A": A_RI, f"{layer}.D": D_OR, f"{layer}.E": E_RR}
        factors = unfold(folded, seed=seed)
        fora |= {peft_key(name): tensor.to(A_RI.dtype) for name, tensor in factors.items()}
    bias: Any = "fora_only" if config["bias"] == "lora_only" else config["bias"]
    fora_config = ForaConfig(bias=bias, **{key: config[key] for key in SHARED if key in config})
    _write(Path(output_dir), fora_config, fora, source)
    return Path(output_dir)


def _split(
    weights: dict[str, torch.Tensor], kind: str
) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    """Return the factors by layer and letter, and what else was trained by its own name."""
    names = {key: from_peft_key(key, kind) for key in weights}
    state = {name: weights[key] for key, name in names.items() if name is not None}
    return state, {key: weights[key] for key, name in names.items() if name is None}


def _read_source(
    source: PeftModel | str | Path,
) -> tuple[dict[str, Any], AdapterState, dict[str, torch.Tensor]]:
    if isinstance(source, PeftModel):
        from peft import get_peft_model_state_dict

        name = source.active_adapter
        config = source.peft_config[name].to_dict()
        if config["peft_type"] != "FORA":
            raise ValueError(f"{name}: expected a FORA adapter, this one is {config['peft_type']}")
        weights = get_peft_model_state_dict(source, adapter_name=name)
        weights = {key: tensor.detach().cpu() for key, tensor in weights.items()}
    else:
        config, weights = _read_directory(source, "FORA")
    return config, *_split(weights, "fora")


def _read_directory(
    directory: str | Path, kind: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    check_adapter_dir(directory, "adapter", kind=kind)
    files = signed_files(Path(directory))
    config = json.loads(read_bytes(Path(directory) / "adapter_config.json", files))
    return config, load_tensors(Path(directory) / WEIGHTS, files)


def _write(
    directory: Path, config: Any, weights: dict[str, torch.Tensor], source: PeftModel | str | Path
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.contiguous() for key, tensor in weights.items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(directory)
    if not isinstance(source, PeftModel) and (Path(source) / RECORD).is_file():
        shutil.copy(Path(source) / RECORD, directory / RECORD)
