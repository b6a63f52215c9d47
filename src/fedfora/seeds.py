"""One seed and a label to the seed of one source of randomness."""

import hashlib


def derive_seed(seed: int, *labels: int | str) -> int:
    """Return the seed in [0, 2**31) for a use, as in `derive_seed(seed, "train", index, site)`.

    The same seed and labels give the same number on every machine; different labels give numbers
    that have nothing to do with each other, so no two uses draw the same random stream.
    """
    text = "\x1f".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
