"""A model and prompts to answers: by batches of similar length, greedy unless asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from fedfora.adapter.layer import folded_cores
from fedfora.evaluation.settings import DecodingArguments
from fedfora.seeds import derive_seed

GREEDY = DecodingArguments()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    decoding: DecodingArguments = GREEDY,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """Return the model's answer to every prompt, in the order of the prompts.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        prompts: Token ids as `fedfora.data.encoding.encode_prompt` makes them.
        max_new_tokens: Longest answer; end-of-sequence ends one before.
        batch_size: Prompts per batch; prompts of similar length share a batch.
        decoding: How the next token is chosen.
        on_batch: Called with the number of prompts answered by each batch.
    """
    answers: dict[int, str] = {}
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        batch = [prompts[i] for i in rows]
        texts = answer_batch(
            model, tokenizer, batch, decoding, max_new_tokens=max_new_tokens, first=rows[0]
        )
        answers |= zip(rows, texts, strict=True)
        on_batch(len(rows))
    return [answers[i] for i in range(len(prompts))]


def batches_by_length(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the rows of each batch, the longest first, so that what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def answer_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    decoding: DecodingArguments = GREEDY,
    *,
    max_new_tokens: int,
    first: int = 0,
    streamer: Any = None,
) -> list[str]:
    """Return the answers to one batch of prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids; they are padded on the left to the longest.
        decoding: How the next token is chosen.
        max_new_tokens: Longest answer; end-of-sequence ends one before.
        first: A number of the batch; with the seed it decides what is drawn.
        streamer: Of transformers, for a batch of one; gets the tokens as they come.

    Raises:
        ValueError: If the GPU's memory does not suffice, naming the flag.
    """
    model.eval()
    batch = _left_padded(prompts, tokenizer.pad_token_id, model.device)
    # What ends an answer: the training's end, and those the model's authors name, read before the
    # model's own configuration is set aside.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    options: dict[str, Any] = {
        "do_sample": decoding.do_sample,
        "num_beams": decoding.num_beams,
        "repetition_penalty": decoding.repetition_penalty,
    }
    if decoding.do_sample:
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p}
        options["top_k"] = decoding.top_k
    # fork_rng keeps the draws of others where they were.
    with (
        _own_generation_config(model),
        folded_cores(model, model.get_input_embeddings().weight.dtype),
        torch.random.fork_rng(enabled=decoding.do_sample),
    ):
        if decoding.do_sample:
            torch.manual_seed(derive_seed(decoding.seed, "predict", first))
        try:
            output = model.generate(
                **batch,
                **options,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(ends),
                streamer=streamer,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(prompts)} prompts at a time do not fit into the GPU's memory "
                f"(--per_device_eval_batch_size {max(1, len(prompts) // 2)})"
            ) from error
    new_tokens = output[:, batch["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return texts


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Set the model's own generation defaults aside.

    `generate` fills in whatever is not said from there, e.g. Baichuan2-Chat's repetition penalty of
    1.05 and sampling, and "greedy" would not be greedy.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _left_padded(
    prompts: list[list[int]], pad_token_id: int, device: Any
) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
