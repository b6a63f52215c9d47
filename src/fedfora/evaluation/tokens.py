"""Text to the tokens that ROUGE and token F1 compare: words, and characters where none are spaced.

rouge-score's own tokenizer keeps a-z and 0-9 and silently drops everything else, all of Chinese
included: two different Chinese texts would score 0, and so would two equal ones.
"""

import re

# Scripts written without spaces between words: Han, kana, Thai, Lao, Khmer, Burmese.
UNSPACED = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    "\u3005-\u3007\u3040-\u30ff\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f"
)
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_HAN_OR_KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]")


def tokens(text: str) -> list[str]:
    """Return lower-case words; each character by itself where a script has no spaces.

    On ASCII text these are the tokens of rouge-score without stemming.
    """
    return _TOKEN.findall(text.lower())


def has_han(text: str) -> bool:
    """Say whether a text has Chinese or Japanese characters."""
    return bool(_HAN_OR_KANA.search(text))
