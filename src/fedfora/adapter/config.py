"""`ForaConfig`: which layers FoRA adapts, at which rank, from which initialization."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import hotswap, register_peft_method
from peft.utils.peft_types import PeftType

FORMAT_VERSION = 1
NAME = "FORA"


@dataclass
class ForaConfig(PeftConfig):
    """Configuration of a FoRA adapter; most fields are those of `peft.LoraConfig`.

    Args:
        r: Rank R of the update, at least 1.
        inner_dim: Width M of the inner factors B and C; None takes `max(2, I // 4)` for a layer
            with I inputs, as the original does.
        lora_alpha: The update is scaled by `lora_alpha / r`; None takes `2 * r`.
        lora_dropout: Dropout probability on the adapter's input, in [0, 1).
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead (https://arxiv.org/abs/2312.03732).
        target_modules: Names or a regular expression of the layers to adapt, or "all-linear": every
            linear layer but the output layer.
        exclude_modules: Names or a regular expression of layers to leave alone.
        rank_pattern: Layer name or regular expression to its own rank.
        alpha_pattern: Layer name or regular expression to its own alpha.
        layers_to_transform: Indices of the blocks to adapt; needs a list of `target_modules`.
        layers_pattern: Name of the list of blocks, if it is not a usual one.
        modules_to_save: Further modules to train in full and to save with the adapter.
        bias: "none", "all", or "fora_only" (the biases of the adapted layers).
        fan_in_fan_out: Kept for parity with LoRA; GPT-2's Conv1D is recognized by itself.
        init_weights: How the factors start. True: as a no-op, B and D zero, A, C and E
            Kaiming-uniform. "svd": as a no-op too, A and D from the largest singular values of the
            base weight and K zero, as needed if only the core trains. False: all at random, for
            tests.
        trainable: "all" five factors, or "core": A and D stay as they are.
        format_version: Version of the layout of saved adapters; a newer one is refused.

    Raises:
        ValueError: If a field is out of range or two fields contradict each other.
    """

    r: int = 8
    inner_dim: int | None = None
    lora_alpha: int | float | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | set[str] | str | None = "all-linear"
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "fora_only"] = "none"
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["svd"] = True
    trainable: Literal["all", "core"] = "all"
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Fill in what depends on other fields and refuse what cannot work."""
        super().__post_init__()
        self.peft_type = peft_type()
        self._check_ranges()
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be used when target_modules is a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")

    def _check_ranges(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.inner_dim is not None and self.inner_dim < 1:
            raise ValueError(f"inner_dim must be at least 1, got {self.inner_dim}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.bias not in ("none", "all", "fora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'fora_only', got {self.bias!r}")
        if self.init_weights not in (True, False, "svd"):
            raise ValueError(
                f"init_weights must be True, False or 'svd', got {self.init_weights!r}"
            )
        if self.trainable not in ("all", "core"):
            raise ValueError(f"trainable must be 'all' or 'core', got {self.trainable!r}")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format version {self.format_version}, this fedfora reads up to "
                f"{FORMAT_VERSION}: pip install --upgrade fedfora"
            )


def default_inner_dim(inputs: int) -> int:
    """Return the inner width M for a number of inputs, as in the original."""
    return max(2, inputs // 4)


def alpha_at_rank(alpha: float, rank: int, new_rank: int, use_rslora: bool) -> float:
    """Return the alpha that scales an adapter of another rank as this one is scaled."""
    ratio = new_rank / rank
    return float(alpha * (ratio**0.5 if use_rslora else ratio))


# PEFT has an official way to register a method, but it asks for a member of the closed enumeration
# `PeftType`; so the member is added first. PEFT's loading functions look only there.


def peft_type() -> Any:
    """Return `PeftType.FORA`, adding it to the enumeration when it is not there."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register FoRA in PEFT; the second call changes nothing.

    Raises:
        RuntimeError: If PEFT already knows another method of that name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="fora_"
        )
        hotswap.CONFIG_KEYS_TO_CHECK[peft_type()] = ["use_rslora", "lora_dropout", "alpha_pattern"]
    elif known is not config_cls:
        raise RuntimeError(f"PEFT already knows another method called {NAME}: {known!r}")
