"""What a site says of a failure: one word of a closed list, and a number to find it in its own log.

The number is drawn at random, so it tells nothing but which entry is meant.
"""

import re
import secrets

CODE = "code"
CODES = {
    "MESSAGE": "the message was not one, or too large",
    "TRAINER": "the site's trainer does not answer, or ended while it worked",
    "SETTINGS": "the run's settings cannot be used at the site",
    "BASE": "the base model cannot be opened",
    "DATA": "the rows cannot be read",
    "FACTORS": "the site lacks frozen factors that the coordinator takes it to have",
    "BUDGET": "the site's privacy budget is spent",
    "MEMORY": "there is not enough memory",
    "DISK": "there is no room on the disk",
    "DESCRIBE": "the site could not start",
    "TRAIN": "the training failed",
    "EVALUATE": "the evaluation failed",
    "INTRODUCE": "secure aggregation: no key",
    "SHARE": "secure aggregation: no shares",
    "CONFIRM": "secure aggregation: the list of survivors is not confirmed",
    "REVEAL": "secure aggregation: nothing revealed",
}

_FORM = re.compile(r"site-error ([A-Z]+) [0-9a-f]{6}")


def new_code(word: str) -> str:
    """Return a code with a fresh number.

    Args:
        word: One of `CODES`.
    """
    assert word in CODES, word
    return f"site-error {word} {secrets.token_hex(3)}"


def validated_code(code: str) -> str:
    """Return a code as it is, or one that says nothing where it is none."""
    match = _FORM.fullmatch(code)
    return code if match and match[1] in CODES else new_code("MESSAGE")
