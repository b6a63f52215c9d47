"""A GGUF base with a GGUF LoRA to its logits, as llama.cpp computes them on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

INSTALL = "pip install llama-cpp-python"


def check_llama_cpp() -> None:
    """Raise where llama.cpp's Python package is missing.

    Raises:
        ValueError: With the command that installs it.
    """
    if find_spec("llama_cpp") is None:
        raise ValueError(f"--base_gguf compares the logits in llama.cpp, which needs: {INSTALL}")


def llama_cpp_logits(base: str | Path, adapter: Path | None, ids: Tensor) -> Tensor:
    """Return the logits after every token.

    The keys and values are kept in float32, as in the model that is compared with.

    Args:
        base: A GGUF model.
        adapter: A GGUF LoRA; None for the base alone.
        ids: Token ids of shape `(B, L)`.

    Returns:
        float32 logits of shape `(B, L, vocabulary)`.

    Raises:
        ValueError: If the base cannot be read or knows fewer tokens.
    """
    from llama_cpp import GGML_TYPE_F32, Llama

    if not Path(base).is_file():
        raise ValueError(f"--base_gguf: no such file: {base}")
    model = Llama(
        str(base),
        n_ctx=ids.shape[1],
        n_batch=ids.shape[1],
        n_threads=torch.get_num_threads(),
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        lora_path=None if adapter is None else str(adapter),
        verbose=False,
    )
    if model.n_vocab() <= int(ids.max()):
        raise ValueError(f"--base_gguf {base} knows only {model.n_vocab()} tokens: another model")
    rows = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        rows.append(np.array(model.scores[: len(row)]))
    model.close()
    return torch.from_numpy(np.stack(rows)).float()
