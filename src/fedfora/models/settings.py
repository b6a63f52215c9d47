"""What the user says about the base model and the adapter on it."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import flag, refuse


@dataclass
class ModelArguments:
    """Which base model to load, and how."""

    model_name_or_path: str | None = flag(
        None,
        "base model: a directory, a GGUF file, an id on the hub, or 'clinic-base'",
        "--ori_model_dir",
        "--model",
    )
    hub: Literal["huggingface", "modelscope"] = flag(
        "huggingface", "where an id is looked up; a directory always wins"
    )
    quantization: Literal["nf4", "int8", "none"] = flag(
        "nf4", "how the frozen base is held in memory; nf4 is 4-bit"
    )
    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto",
        "number format of the unquantized parts; auto: the model's own on a GPU; on a CPU bfloat16 "
        "where the processor multiplies it natively and the model is wide enough, else float32",
        "--dtype",
    )
    bnb_4bit_use_double_quant: Literal["auto", "true", "false"] = flag(
        "auto", "quantize nf4's scales, too; auto: on a GPU, where it saves 0.4 bits a weight"
    )
    cache_dir: str | None = flag(
        None, "where downloaded models, and train's encoded rows, are kept"
    )
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: a GPU when there is one")

    def __post_init__(self) -> None:
        """Refuse what only means something with another choice."""
        if self.bnb_4bit_use_double_quant == "true" and self.quantization != "nf4":
            raise ValueError("--bnb_4bit_use_double_quant needs --quantization nf4")


@dataclass
class AdapterArguments:
    """The FoRA adapter that is trained."""

    lora_rank: int = flag(8, "rank R of the adapter", "--lora_r")
    lora_alpha: float | None = flag(None, "the update is scaled by alpha / R; default 2 R")
    lora_dropout: float = flag(0.0, "dropout on the adapter's input")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(R) instead")
    inner_dim: int | None = flag(None, "inner width M; default max(2, inputs // 4) for each layer")
    start_adapter: str | None = flag(
        None,
        "adapter to start from instead of a fresh one, e.g. of public rows; what it was trained on "
        "counts as public",
    )
    target_modules: list[str] = flag(
        ["all-linear"], "layers to adapt: names, or all-linear (every one but the output layer)"
    )

    def __post_init__(self) -> None:
        """Refuse numbers out of range, naming the flag."""
        alpha, inner = self.lora_alpha, self.inner_dim
        refuse(
            (self.lora_rank < 1, f"--lora_rank must be at least 1, got {self.lora_rank}"),
            (alpha is not None and not 0 < alpha < float("inf"), f"--lora_alpha: {alpha}, not > 0"),
            (inner is not None and inner < 1, f"--inner_dim must be at least 1, got {inner}"),
            (
                not 0 <= self.lora_dropout < 1,
                f"--lora_dropout must be in [0, 1), got {self.lora_dropout}",
            ),
            (not self.target_modules, "--target_modules: nothing given; names, or all-linear"),
        )
