"""The user's settings for the base model and the adapter on it."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import Options, flag, refuse


@dataclass
class ModelArguments:
    """Base model."""

    model_name_or_path: str | None = flag(
        None,
        "base model: a directory, a GGUF file, an id on the hub, or 'clinic-base'",
        "--ori_model_dir",
        "--model",
        often=True,
    )
    hub: Literal["huggingface", "modelscope"] = flag(
        "huggingface", "where model ids are looked up; a local directory takes precedence"
    )
    quantization: Literal["nf4", "int8", "none"] = flag(
        "nf4", "precision of the frozen base in memory; nf4 is 4-bit", often=True
    )
    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto",
        "number format of the unquantized parts; auto: the model's own on a GPU; on a CPU bfloat16 "
        "if the processor multiplies it natively and the model is wide enough, otherwise float32",
        "--dtype",
    )
    bnb_4bit_use_double_quant: Literal["auto", "true", "false"] = flag(
        "auto", "also quantize nf4's scales; auto: on a GPU, where it saves 0.4 bits per weight"
    )
    cache_dir: str | None = flag(None, "cache for downloaded models and for train's encoded rows")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: a GPU if there is one")

    def __post_init__(self) -> None:
        if self.bnb_4bit_use_double_quant == "true" and self.quantization != "nf4":
            raise ValueError("--bnb_4bit_use_double_quant needs --quantization nf4")


@dataclass
class AdapterArguments(Options):
    """FoRA adapter."""

    lora_rank: int = flag(8, "rank R of the adapter", "--lora_r", least=1, often=True)
    lora_alpha: float | None = flag(None, "the update is scaled by alpha / R; default 2 R", above=0)
    lora_dropout: float = flag(0.0, "dropout on the adapter's input", within="[0, 1)")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(R) instead")
    inner_dim: int | None = flag(
        None, "inner width M; default max(2, inputs // 4) for each layer", least=1
    )
    start_adapter: str | None = flag(
        None,
        "adapter to start from instead of a fresh one, e.g. of public rows; what it was trained on "
        "counts as public",
    )
    target_modules: list[str] = flag(
        ["all-linear"], "layers to adapt: names, or all-linear (every one but the output layer)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((not self.target_modules, "--target_modules: empty; give names, or all-linear"))
