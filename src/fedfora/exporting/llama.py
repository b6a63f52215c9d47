"""A Baichuan-7B checkpoint to a Llama checkpoint of the same function, checked after writing.

With rotary positions a Baichuan differs from a Llama in two matrices: `W_pack` holds q, k and v one
below the other, and Baichuan2's output rows are normalized. Split and normalized, the model loads
wherever Llama does. ALiBi has no counterpart there.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from fedfora.models.baichuan.configuration import BaichuanConfig

CHECK_TOKENS = 64
# Of the largest logit. float32 sums in another order: W_pack is one product, q, k and v are three.
TOLERANCE = 1e-3

SHARED_WITH_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_parameters"),
    *("num_attention_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "attention_dropout", "tie_word_embeddings", "dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)

SHARED_BY_TOKENIZERS = (
    *("unk_token", "bos_token", "eos_token", "pad_token", "extra_special_tokens"),
    *("chat_template", "model_max_length", "padding_side"),
)
SPACE = "▁"  # SentencePiece's sign for a space
FILE = "tokenizer.model"
PROBES = [
    "你是谁",
    "故障现象描述：车速到100迈以上发动机水温高，风扇始终是低速转动。",
    "If you are a doctor, please answer the medical questions based on the patient's description.",
    "def f(x):\n    return x ** 2 + 1  # 3.14159\n\n\n",
    " leading, trailing  and    many spaces ",
    "\ttab\r\nline\u3000ideographic\u00a0no-break",
    "2023年11月 12345678 １２３",
    "naïve Größe ÅÄÖ ﬁ ½ ™ 한국어 日本語 العربية русский",
    "😀👩‍🚀 𠮷 \u200b\ufeff\u0000",
    '▁ <unk> a_b_c {"key": [1, 2]} https://example.org/?q=%E4%BD%A0',
]

logger = logging.getLogger(__name__)


def export_llama(model_dir: str | Path, output_dir: str | Path) -> float:
    """Write a Baichuan model with rotary positions as a Llama model, and compare the two.

    The weights keep their number format. Tokenizer (see `export_tokenizer`) and generation defaults
    are written too. Needs the memory of the model once, on the CPU.

    Args:
        model_dir: Directory of a Baichuan-7B, a Baichuan2-7B or a descendant of one.
        output_dir: A new or empty directory.

    Returns:
        The largest difference of any logit between the two models, computed in float32 on random
        tokens.

    Raises:
        ValueError: If the model has no Llama form, the output directory is in use, or the check
            after writing fails.
    """
    source, target = Path(model_dir), Path(output_dir)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: the directory holds no config.json")
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, BaichuanConfig):
        raise ValueError(f"{source} is a {config.model_type} model, not a Baichuan")
    if config.position_embedding != "rope":
        raise ValueError(
            f"{source} has ALiBi positions (a 13B model), which Llama cannot have; only the "
            "7B models, with rotary positions, can be written as Llama"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized; export the model it was quantized from")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    expected = _float32_logits(model, ids)
    llama = _as_llama(model)
    llama.generation_config = model.generation_config
    llama.save_pretrained(target)
    del model, llama
    export_tokenizer(source, target)
    written = LlamaForCausalLM.from_pretrained(target, dtype="auto").eval()
    deviation = float((_float32_logits(written, ids) - expected).abs().max())
    if not deviation <= TOLERANCE * float(expected.abs().max()):
        raise ValueError(
            f"{target}: the logits of what was written differ by up to {deviation:.3g} from those "
            f"of {source}; do not use it"
        )
    return deviation


def _as_llama(model: Any) -> LlamaForCausalLM:
    """Return the Llama of the same function; takes the weights of `model`, leaving it empty."""
    with torch.device("meta"):
        shared = {name: getattr(model.config, name) for name in SHARED_WITH_LLAMA}
        llama = LlamaForCausalLM(LlamaConfig(**shared))
    state = model.state_dict()
    model.to("meta")
    for name in [name for name in state if name.endswith("W_pack.weight")]:
        for letter, weight in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("W_pack", f"{letter}_proj")] = weight
    llama.load_state_dict(state, assign=True)
    return llama


@torch.no_grad()
def _float32_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits computed in float32, with only one layer at a time in that format.

    In 16 bit the two models round their sines and cosines differently, which would hide an error.
    """
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    dtype, handles = model.dtype, []

    def widen(part: nn.Module, _: Any) -> None:
        part.float()

    def narrow(part: nn.Module, *_: Any) -> None:
        part.to(dtype)

    for part in parts:
        handles += [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow)]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def export_tokenizer(source: Path, target: Path) -> bool:
    """Write the tokenizer of `source` to `target`; return whether plain transformers can load it.

    The pieces of `tokenizer.model` and the order of their scores become the vocabulary and the
    merges of a byte-pair encoder in tokenizer.json. That this is the same tokenizer is not proved
    but tried, on `PROBES` and on the chat format; the file is copied too, for tools that read it.
    If the ids differ, or there is no tokenizer.model, a warning says so and tokenizer.json is
    not written.
    """
    if not (source / FILE).is_file():
        logger.warning("%s holds no %s: %s gets no tokenizer", source, FILE, target)
        return False
    shutil.copyfile(source / FILE, target / FILE)
    native = AutoTokenizer.from_pretrained(source)
    plain = _plain_tokenizer(native, source / FILE)
    probes = PROBES
    if native.chat_template is not None:  # and a conversation made of all of them
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(PROBES)]
        probes = [*PROBES, native.apply_chat_template(turns, tokenize=False)]
    if differing := [text for text in probes if plain.encode(text) != native.encode(text)]:
        logger.warning(
            "%s gets no tokenizer.json: it would encode %d of %d texts differently, the first is "
            "%r; use the tokenizer of %s",
            *(target, len(differing), len(PROBES), differing[0], source),
        )
        return False
    plain.save_pretrained(target)
    return True


def _plain_tokenizer(native: Any, path: Path) -> PreTrainedTokenizerFast:
    vocabulary, _, merges = SentencePieceExtractor(str(path)).extract()
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token=native.unk_token, fuse_unk=True, byte_fallback=True)
    )
    prefixed = native.tokenize("a")[0].startswith(SPACE)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefixed else replace
    )
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*decoding, decoders.Strip(" ", 1, 0)] if prefixed else decoding
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: getattr(native, name) for name in SHARED_BY_TOKENIZERS},
        clean_up_tokenization_spaces=False,
    )
