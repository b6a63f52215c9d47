"""`BaichuanConfig`: a published config.json, old or new, to what the native model needs to know.

Imports nothing but transformers' base class: this runs while transformers loads its Auto classes,
when the modules of other models cannot be imported yet.
"""

import logging
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

logger = logging.getLogger(__name__)

BAICHUAN2_VOCABULARY = 125_696
WIDTH_13B = 5120


class BaichuanConfig(PreTrainedConfig):
    """Configuration of Baichuan and Baichuan2, 7B (rotary positions) and 13B (ALiBi).

    Fields that are not listed have Llama's names and meanings.

    Args:
        max_position_embeddings: Longest sequence; only the 7B files give it.
        model_max_length: Longest sequence, in all files.
        position_embedding: "rope" or "alibi". No published file says it. None takes "rope" where
            `max_position_embeddings` is given, unless the model is as wide as the 13B models.
        norm_head: Whether the rows of `lm_head` are still to be normalized, which the published
            code of Baichuan2 does when it runs and this model once, while loading. No published
            file says it either. None takes true for a vocabulary as large as Baichuan2's or larger;
            Baichuan has 64,000 tokens and does not normalize.

    Raises:
        ValueError: If fields contradict the architecture.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attention_bias = mlp_bias = False  # read by what is shared with Llama

    vocab_size: int = BAICHUAN2_VOCABULARY
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int = 4096
    position_embedding: str | None = None
    rope_parameters: dict[str, Any] | None = None
    norm_head: bool | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what the published files leave open; see the class."""
        if self.position_embedding is None:
            rope = self.max_position_embeddings and self.hidden_size != WIDTH_13B
            self.position_embedding = "rope" if rope else "alibi"
        self.max_position_embeddings = self.max_position_embeddings or self.model_max_length
        if self.norm_head is None:
            self.norm_head = self.vocab_size >= BAICHUAN2_VOCABULARY
        heads = self.num_attention_heads
        self.num_key_value_heads: int = kwargs.pop("num_key_value_heads", heads)
        self.head_dim: int = kwargs.pop("head_dim", self.hidden_size // heads)
        kwargs.pop("auto_map", None)  # names Python files that are not used
        if kwargs.get("gradient_checkpointing") is not True:
            kwargs.pop("gradient_checkpointing", None)  # [false] in 13B files, which counts as true
        super().__post_init__(**kwargs)
        self._check()
        # An Auto class looks for a model class when it holds a config: soon enough to register it.
        import fedfora.models.baichuan.modeling  # noqa: F401

    def _check(self) -> None:
        if self.position_embedding not in ("rope", "alibi"):
            raise ValueError(
                f"position_embedding must be 'rope' or 'alibi', got {self.position_embedding!r}"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads} and num_attention_heads "
                f"{self.num_attention_heads}, but W_pack holds as many of each"
            )
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not head_dim {self.head_dim} times "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.norm_head and self.tie_word_embeddings:
            raise ValueError(
                "norm_head and tie_word_embeddings exclude each other: normalizing the output "
                "layer would normalize the input embeddings too"
            )
        if getattr(self, "z_loss_weight", 0):
            logger.warning("z_loss_weight is %s, but no such loss is added", self.z_loss_weight)


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
