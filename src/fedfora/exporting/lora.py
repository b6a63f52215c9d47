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
from fedfora.models.saving import RECORD, WEIGHTS
from fedfora.protection.provenance import verify_directory
from fedfora.protection.sealing import is_sealed, load_tensors
from fedfora.seeds import derive_seed

CONFIG = "adapter_config.json"

# What both configurations call by the same name, with the same meaning.
SHARED = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "fan_in_fan_out"),
)


def to_lora(source: PeftModel | str | Path, output_dir: str | Path) -> Path:
    """Write a FoRA adapter as a LoRA adapter of the same rank, scaling and function.

    Args:
        source: A PEFT model whose active adapter is FoRA, or the directory of a saved one.
        output_dir: Where the LoRA adapter is written.

    Returns:
        The output directory.

    Raises:
        ValueError: If the source is no FoRA adapter.
    """
    config, weights = _read_source(source)
    lora = {}
    for name, tensor in weights.items():
        layer, _, factor = name.partition(".fora_")
        if not factor:
            lora[name] = tensor  # modules_to_save
        elif factor == "A.weight":
            lora[f"{layer}.lora_A.weight"] = tensor
        elif factor == "D.weight":
            B, C, E = (weights[f"{layer}.fora_{f}.weight"].double() for f in "BCE")
            DK = tensor.double() + tensor.double() @ (E + C @ B)
            lora[f"{layer}.lora_B.weight"] = DK.to(tensor.dtype)
    bias = "lora_only" if config["bias"] == "fora_only" else config["bias"]
    lora_config = LoraConfig(bias=bias, **{key: config[key] for key in SHARED if key in config})
    _write(Path(output_dir), lora_config, lora, source)
    return Path(output_dir)


def from_lora(source: str | Path, output_dir: str | Path, *, seed: int = 42) -> Path:
    """Write a LoRA adapter as a FoRA adapter of the same function: K = I, by E = 0 and B = 0.

    Args:
        source: Directory of a saved LoRA adapter.
        output_dir: Where the FoRA adapter is written.
        seed: Seed of C, which has no effect until B is trained.

    Returns:
        The output directory.

    Raises:
        ValueError: If the source is no LoRA adapter, or uses a variant that FoRA has no room for.
    """
    config, weights = _read_directory(Path(source))
    _check_plain_lora(config, weights)
    generator = torch.Generator().manual_seed(derive_seed(seed, "from_lora"))
    fora = {}
    for name, tensor in weights.items():
        layer, _, factor = name.partition(".lora_")
        if not factor:
            fora[name] = tensor
        elif factor == "A.weight":
            rank, width = tensor.shape
            inner = max(2, width // 4)
            bound = inner**-0.5  # kaiming uniform with a = sqrt(5)
            C_RM = (2 * torch.rand(rank, inner, generator=generator) - 1) * bound
            fora[f"{layer}.fora_A.weight"] = tensor
            fora[f"{layer}.fora_B.weight"] = tensor.new_zeros(inner, rank)
            fora[f"{layer}.fora_C.weight"] = C_RM.to(tensor.dtype)
            fora[f"{layer}.fora_E.weight"] = tensor.new_zeros(rank, rank)
        elif factor == "B.weight":
            fora[f"{layer}.fora_D.weight"] = tensor
    bias: Any = "fora_only" if config["bias"] == "lora_only" else config["bias"]
    fora_config = ForaConfig(bias=bias, **{key: config[key] for key in SHARED if key in config})
    _write(Path(output_dir), fora_config, fora, source)
    return Path(output_dir)


def _read_source(source: PeftModel | str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if isinstance(source, PeftModel):
        from peft import get_peft_model_state_dict

        name = source.active_adapter
        config = source.peft_config[name].to_dict()
        weights = get_peft_model_state_dict(source, adapter_name=name)
        weights = {key: tensor.detach().cpu() for key, tensor in weights.items()}
    else:
        config, weights = _read_directory(Path(source))
    if config["peft_type"] != "FORA":
        raise ValueError(f"expected a FoRA adapter, this one is {config['peft_type']}")
    return config, weights


def _read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weights = directory / WEIGHTS
    if not (directory / CONFIG).is_file() or not (weights.is_file() or is_sealed(weights)):
        raise ValueError(f"{directory}: no adapter there ({CONFIG} and {WEIGHTS})")
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    verify_directory(directory)
    return config, load_tensors(weights)


def _check_plain_lora(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"expected a LoRA adapter, this one is {config['peft_type']}")
    known = {".lora_A.weight", ".lora_B.weight"}
    for name in weights:
        if ".lora_" in name and not any(name.endswith(ending) for ending in known):
            raise ValueError(f"this LoRA variant cannot become FoRA: it has {name}")


def _write(
    directory: Path,
    config: Any,
    weights: dict[str, torch.Tensor],
    source: PeftModel | str | Path,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{WEIGHTS}.tmp"
    save_file({k: v.contiguous() for k, v in weights.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(directory / WEIGHTS)
    config.save_pretrained(directory)
    if not isinstance(source, PeftModel) and (Path(source) / RECORD).is_file():
        shutil.copy(Path(source) / RECORD, directory / RECORD)
