"""Baichuan and Baichuan2 as transformers models; published checkpoints load as they are.

A Baichuan is a Llama with three differences: one fused projection `W_pack` for q, k and v; in the
13B models ALiBi in place of rotary positions; in Baichuan2 an output layer with normalized rows.

Shape suffixes: B = rows of the batch, Q = queries, K = keys with the cached ones, H = heads,
D = distances between a key and a query.
"""

import inspect
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from fedfora.models.baichuan.configuration import BaichuanConfig

# What Llama's code calls the cache: transformers 5.24 renamed it, and promises no order.
NAMES_OF_CACHE = ("cache", "past_key_values")
CACHE = next(n for n in NAMES_OF_CACHE if n in inspect.signature(LlamaModel.forward).parameters)


class BaichuanRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary positions with sines and cosines in float32, whatever the activations are in."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines; Llama's would round them to the dtype of `x`."""
        angles: tuple[Tensor, Tensor] = super().forward(
            x.new_empty(0, dtype=torch.float32), position_ids
        )
        return angles


class BaichuanAttention(nn.Module):
    """Self-attention whose q, k and v come from one projection, `W_pack`, in three equal blocks."""

    num_key_value_groups = 1
    is_causal = True

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `(B, Q, hidden)` and, with eager attention, the weights.

        transformers 5.24 and later pass the cache as `cache`, earlier ones as `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        rows, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(rows, length, 3, -1, self.head_dim)
        query, key, value = packed.transpose(1, 3).unbind(2)
        if self.config.position_embedding == "rope":
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            query, key = query.to(value.dtype), key.to(value.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(rows, length, -1)), weights


class BaichuanDecoderLayer(LlamaDecoderLayer):
    """Llama's block with Baichuan's attention."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)  # Llama's constructor would build its attention
        self.hidden_size = config.hidden_size
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BaichuanPreTrainedModel(LlamaPreTrainedModel):
    """What transformers must know about the family."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    _no_split_modules: ClassVar = ["BaichuanDecoderLayer"]
    _can_record_outputs: ClassVar = {
        "hidden_states": BaichuanDecoderLayer,
        "attentions": BaichuanAttention,
    }
    # Each of these leaves out the mask, and with it ALiBi.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _supports_context_parallel = False


class BaichuanModel(BaichuanPreTrainedModel, LlamaModel):
    """The decoder without its output layer."""

    def __init__(self, config: BaichuanConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # not the next one, which builds a Llama
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BaichuanRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Like `LlamaModel.forward`, which passes a mask of four dimensions on as it is."""
        cache = past_key_values if cache is None else cache
        if self.config.position_embedding == "alibi":
            if inputs_embeds is None and input_ids is not None:
                inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            attention_mask = self._alibi_mask(inputs_embeds, attention_mask, position_ids, cache)
        kwargs[CACHE] = cache
        return super().forward(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs
        )

    def _alibi_mask(
        self, embeds: Any, mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> Tensor:
        """Return causality, padding, packing and ALiBi as one additive mask.

        The biases count from the query. The published code counts from the start of the row when
        it does not train: the same after the softmax, but in bfloat16 the larger numbers round
        nearby positions into one.
        """
        open_BQK = create_causal_mask(
            self.config, embeds, mask, cache, position_ids, allow_is_causal_skip=False
        )
        if open_BQK.is_floating_point():  # eager attention's kind: zero where open
            open_BQK = open_BQK == 0
        if open_BQK.stride(0) == 0:  # nothing is padded: one mask serves all rows
            open_BQK = open_BQK[:1]
        return alibi_mask(
            open_BQK,
            num_heads=self.config.num_attention_heads,
            num_cached=0 if cache is None else cache.get_seq_length(),
            dtype=embeds.dtype,
        )


class BaichuanForCausalLM(BaichuanPreTrainedModel, LlamaForCausalLM):
    """The decoder with its output layer, an ordinary linear one with normalized rows.

    Load it with `from_pretrained`. If you build it in another way, call `normalize_head` once the
    weights are there; until then the model refuses to run.
    """

    # Llama's plans for several devices do not know W_pack and the mask.
    _tp_plan: ClassVar[dict[str, str]] = {}
    _pp_plan: ClassVar[dict[str, str]] = {}

    def __init__(self, config: BaichuanConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # not the next one, which builds a Llama
        self.model = BaichuanModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as every model does, and normalize the rows of the output layer where needed.

        Raises:
            ValueError: If they cannot be normalized: quantized, offloaded or partitioned.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model.normalize_head()
        return loaded

    def normalize_head(self) -> None:
        """Normalize the rows of the output layer, if the config says that this is still to be done.

        Raises:
            ValueError: If they cannot be normalized: quantized, offloaded or partitioned.
        """
        if self.config.norm_head:
            normalize_rows(self.get_output_embeddings())
            self.config.norm_head = False

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like `LlamaForCausalLM.forward`.

        Raises:
            ValueError: If the output layer is still to be normalized.
        """
        if self.config.norm_head:
            raise ValueError(
                "the rows of lm_head are not normalized yet (config.norm_head): load the model "
                "with from_pretrained, or call model.normalize_head() once its weights are there"
            )
        return super().forward(*args, **kwargs)


class BaichuanForSequenceClassification(GenericForSequenceClassification, BaichuanPreTrainedModel):
    """The decoder with a classifier on the last token of each row."""


def alibi_slopes(num_heads: int) -> Tensor:
    """Return one slope for each head, in float32: 2^(-8/n), 2^(-16/n), ... for n heads.

    Attention with linear biases adds `slope[h] * (k - q)` to the scores (Press et al. 2022,
    https://arxiv.org/abs/2108.12409).

    Where the number of heads is no power of two, the largest power n below it gives the first n
    slopes, and the others are every second slope of the series for 2 n heads.
    """
    n = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / n for i in range(1, n + 1)]
    exponents += [4 * i / n for i in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents])


def alibi_mask(open_BQK: Tensor, *, num_heads: int, num_cached: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, of shape `(B, H, Q, K)`.

    A pair that may not attend gets the lowest number of `dtype`. A query always sees itself, even
    in a row of padding: SDPA on the CPU computes wrong gradients for a row that sees nothing.

    Args:
        open_BQK: Which query may attend to which key, of shape `(B, 1, Q, K)`.
        num_heads: Number of heads.
        num_cached: Keys that come before the first query.
        dtype: Number format of the scores; the biases are computed in float32 and rounded once.
    """
    num_queries, num_keys = open_BQK.shape[-2:]
    queries = torch.arange(num_queries, device=open_BQK.device) + num_cached
    keys = torch.arange(num_keys, device=open_BQK.device)
    distance_QK = keys - queries[:, None]
    slopes_H = alibi_slopes(num_heads).to(open_BQK.device)
    distances_D = torch.arange(1 - num_keys, num_keys, device=open_BQK.device)
    # A bias depends on the distance alone, so each head's are computed once and looked up.
    bias_HD = (slopes_H[:, None] * distances_D).to(dtype)
    bias_HQK = bias_HD[:, distance_QK + num_keys - 1]
    return bias_HQK.where(open_BQK | (distance_QK == 0), torch.finfo(dtype).min)


@torch.no_grad()
def normalize_rows(head: nn.Module) -> None:
    """Divide each row of the layer's weight by its length, in place and in the weight's own dtype.

    The published code of Baichuan2 does so whenever it runs. Here it is done when the model is
    loaded, because fused losses read `lm_head.weight` and never call the layer.

    Args:
        head: The output layer, with or without an adapter on it; an adapter's own weights, trained
            on normalized rows, stay as they are.

    Raises:
        ValueError: If the weight does not lie there as plain numbers, saying why and what helps.
    """
    weight: Any = _base_of(head).weight
    if reason := _obstacle(weight):
        raise ValueError(
            f"the rows of lm_head must be normalized while Baichuan2 is loaded, but {reason}"
        )
    lengths: Tensor = weight.norm(dim=1, keepdim=True)
    weight.div_(lengths.clamp_min(1e-12))


def _base_of(head: Any) -> Any:
    """The layer below PEFT's wrappers."""
    for name in ("original_module", "base_layer"):
        if hasattr(head, name):
            return _base_of(getattr(head, name))
    return head


def _obstacle(weight: Any) -> str | None:
    """Why the rows cannot be normalized, with the remedy; None if they can."""
    if hasattr(weight, "ds_id"):
        return (
            "DeepSpeed ZeRO-3 has partitioned it: use ZeRO-2, or load the model once without "
            "DeepSpeed, save it, and train on what was saved"
        )
    if weight.is_meta:
        return (
            "it is offloaded or was not loaded (meta device): place it on a device, for example "
            "with device_map={'': 0} or device_map='cpu'"
        )
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
        return f"it is a {type(weight).__name__}: leave lm_head out of sharding and quantization"
    if weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return (
            f"it is quantized ({weight.dtype}): leave lm_head out, for example with "
            "BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])"
        )
    return None


AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    BaichuanConfig, BaichuanForSequenceClassification, exist_ok=True
)
