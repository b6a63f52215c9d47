"""A Baichuan tokenizer to one that plain transformers loads, kept only if it gives the same ids.

The pieces of `tokenizer.model` and the order of their scores become the vocabulary and the merges
of a byte-pair encoder in tokenizer.json. That this is the same tokenizer is not proved but tried,
on `PROBES` and on the chat format; the file itself is copied too, for tools that read it.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

logger = logging.getLogger(__name__)

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


def export_tokenizer(source: Path, target: Path) -> bool:
    """Write the tokenizer of `source` to `target`; return whether plain transformers can load it.

    Where the ids differ, or there is no tokenizer.model, a warning says so and tokenizer.json is
    not written.
    """
    if not (source / FILE).is_file():
        logger.warning("%s holds no %s: %s gets no tokenizer", source, FILE, target)
        return False
    shutil.copyfile(source / FILE, target / FILE)
    native = AutoTokenizer.from_pretrained(source)
    plain = _plain_tokenizer(native, source / FILE)
    if differing := [text for text in _probes(native) if plain.encode(text) != native.encode(text)]:
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
        unk_token=native.unk_token,
        bos_token=native.bos_token,
        eos_token=native.eos_token,
        pad_token=native.pad_token,
        extra_special_tokens=native.extra_special_tokens,
        chat_template=native.chat_template,
        model_max_length=native.model_max_length,
        padding_side=native.padding_side,
        clean_up_tokenization_spaces=False,
    )


def _probes(native: Any) -> list[str]:
    """All probes alone, and a conversation made of them."""
    if native.chat_template is None:
        return PROBES
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(PROBES)]
    return [*PROBES, native.apply_chat_template(turns, tokenize=False)]
