"""Encoded rows kept on disk, for the next training on the same rows with the same tokenizer."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedfora.data.encoding import Encoded, PromptFormat, encode_and_count, warn_of_cut_rows
from fedfora.data.loading import Example

logger = logging.getLogger(__name__)


def encode_cached(
    examples: list[Example],
    tokenizer: Any,
    layout: PromptFormat,
    *,
    cache_dir: str | None,
    overwrite: bool,
    num_workers: int,
) -> Encoded:
    """Encode all examples, or read what an earlier run encoded.

    Args:
        examples: The rows.
        tokenizer: The base's.
        layout: How rows become prompts.
        cache_dir: Where encoded rows are kept; None keeps none.
        overwrite: Encode anew, whatever is kept.
        num_workers: Processes that encode.
    """
    if cache_dir is None:
        encoded, cut = encode_and_count(examples, tokenizer, layout, num_workers=num_workers)
    else:
        path = Path(cache_dir) / "encoded" / f"{_digest(examples, tokenizer, layout)}.safetensors"
        kept = None if overwrite else _read(path)
        encoded, cut = kept or encode_and_count(
            examples, tokenizer, layout, num_workers=num_workers
        )
        if kept is None:
            _write(path, encoded, cut)
    warn_of_cut_rows(cut, len(examples), layout)
    return encoded


def _digest(examples: list[Example], tokenizer: Any, layout: PromptFormat) -> str:
    digest = hashlib.sha256(b"2")  # the encoding's version: 2 keeps control tokens out of texts
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else repr(sorted(tokenizer.get_vocab()))).encode())
    digest.update(repr((tokenizer.chat_template, tokenizer.special_tokens_map, layout)).encode())
    for example in examples:
        row = (example.instruction, example.input, example.output, example.history)
        digest.update(repr(row).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> tuple[Encoded, int] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            cut = int(file.metadata()["cut"])
            ids, labels, ends = (file.get_tensor(name) for name in ("ids", "labels", "ends"))
    except (SafetensorError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read, the rows are encoded anew: %s", path, error)
        return None
    pieces = zip(np.split(ids, ends[:-1]), np.split(labels, ends[:-1]), strict=True)
    return [{"input_ids": i.tolist(), "labels": t.tolist()} for i, t in pieces], cut


def _write(path: Path, encoded: Encoded, cut: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "ids": np.concatenate([np.array(row["input_ids"], dtype=np.int32) for row in encoded]),
        "labels": np.concatenate([np.array(row["labels"], dtype=np.int32) for row in encoded]),
        "ends": np.cumsum([len(row["input_ids"]) for row in encoded]),
    }
    beside = path.with_name(f".{path.name}.tmp")
    save_file(content, beside, metadata={"cut": str(cut)})
    beside.replace(path)
