"""An adapter directory: what PEFT reads, and how prompts were made.

`adapter_config.json` and `adapter_model.safetensors` are as PEFT writes them, so plain
`PeftModel.from_pretrained` loads the directory once fedfora is imported. `fedfora.json` holds the
prompt format and the base's fingerprint, which `predict` needs and PEFT has no place for.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedfora.adapter.config import alpha_at_rank
from fedfora.adapter.state import AdapterState, from_peft_key, peft_key
from fedfora.data.encoding import PromptFormat
from fedfora.models.resolve import RECORD, WEIGHTS
from fedfora.protection.provenance import sign_directory, signed_files
from fedfora.protection.sealing import load_tensors, save_tensors
from fedfora.reporting.model_card import model_card
from fedfora.reporting.record import environment, write_json, write_text


def save_adapter(
    directory: Path, state: AdapterState, adapter_config: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write an adapter of five factors; each file appears whole or not at all.

    The factors are named as by `read_state`; `adapter_config` and `record` are as the functions of
    their names return them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # First the record: by it a half-written directory is known as ours.
    write_json(directory / RECORD, record, sort_keys=True)
    weights = {peft_key(name): tensor.contiguous() for name, tensor in state.items()}
    save_tensors(directory / WEIGHTS, weights, metadata={"format": "pt"})
    write_json(directory / "adapter_config.json", adapter_config, sort_keys=True)
    write_text(directory / "README.md", model_card(adapter_config))
    sign_directory(directory, {**record, "packages": environment()["packages"]})


def read_adapter(directory: str | Path) -> AdapterState:
    """Return all five factors of a saved adapter, named as `read_state` names them.

    Raises:
        ValueError: If its provenance does not hold, or it is encrypted and the key is not here.
    """
    weights = load_tensors(Path(directory) / WEIGHTS, signed_files(Path(directory)))
    return {from_peft_key(key) or key: tensor for key, tensor in weights.items()}


def adapter_config(model: Any) -> dict[str, Any]:
    """Return an adapter's configuration as PEFT writes it to adapter_config.json."""
    return as_saved(model.peft_config["default"])


def as_saved(config: Any, **resolved: Any) -> dict[str, Any]:
    """Return a configuration as PEFT writes it, with what it resolves when the adapter is made."""
    saved = config.to_dict() | {"inference_mode": True}
    resolved = {} if saved["target_modules"] != "all-linear" else resolved
    return {key: sorted(v) if isinstance(v, set) else v for key, v in (saved | resolved).items()}


def adapter_record(prompts: PromptFormat, base_fingerprint: str, **facts: Any) -> dict[str, Any]:
    """Return what fedfora.json holds: prompts, base, and how the adapter came about.

    Of the facts, all JSON, `privacy` is the sentence that the card repeats. What is None is left
    out.
    """
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return {"prompts": asdict(prompts), "base_fingerprint": base_fingerprint, **known}


def config_at_rank(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the configuration of the same adapter with another rank and the same scaling."""
    if rank == config["r"]:
        return config
    alpha = alpha_at_rank(config["lora_alpha"], config["r"], rank, config["use_rslora"])
    return config | {"r": rank, "lora_alpha": alpha}
