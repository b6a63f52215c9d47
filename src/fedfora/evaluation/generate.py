"""A model and prompts to answers: by batches of similar length, greedy unless asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from fedfora.adapter.layer import folded_cores
from fedfora.evaluation.settings import DecodingArguments
from fedfora.models.baichuan.modeling import CACHE
from fedfora.seeds import derive_seed

GREEDY = DecodingArguments()
LARGEST_BATCH, CACHE_BYTES = 64, 2**30
PASS_TOKENS = 64  # what a pass of its own costs, in tokens


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    decoding: DecodingArguments = GREEDY,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """Return the model's answer to every prompt, in the order of the prompts.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        prompts: Token ids as `fedfora.data.encoding.encode_prompt` makes them.
        max_new_tokens: Longest answer; end-of-sequence ends one before.
        batch_size: Prompts per batch, as for `batches_by_length`.
        decoding: How the next token is chosen.
        on_batch: Called with the number of prompts answered by each batch.
    """
    answers: dict[int, str] = {}
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for rows in batches_by_length(model, lengths, batch_size):
        batch = [prompts[i] for i in rows]
        texts = answer_batch(
            model, tokenizer, batch, decoding, max_new_tokens=max_new_tokens, first=rows[0]
        )
        answers |= zip(rows, texts, strict=True)
        on_batch(len(rows))
    return [answers[i] for i in range(len(prompts))]


def batches_by_length(
    model: Any, lengths: list[int], batch_size: int | None
) -> Iterator[list[int]]:
    """Yield the rows of each batch, the longest first, so that what does not fit fails at once.

    Args:
        model: The model; a step of decoding reads all its weights, for one row or for many.
        lengths: Tokens of each row, those to come included.
        batch_size: Rows per batch; None for up to 64, as long as their keys and values take no more
            than half of the model's bytes, or 1 GiB if that is more.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    token_bytes = 2 * config.num_hidden_layers * heads * size * itemsize
    tokens = max(CACHE_BYTES, model.get_memory_footprint() // 2) // token_bytes
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        rows = batch_size or max(1, min(LARGEST_BATCH, tokens // lengths[order[0]]))
        yield order[:rows]
        del order[:rows]


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
    # What ends an answer: the training's end, and those the model's authors name, read before the
    # model's own configuration is set aside.
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    options = {"eos_token_id": sorted(ends), "pad_token_id": tokenizer.pad_token_id}
    options |= {"streamer": streamer, "num_beams": decoding.num_beams}
    options |= {"repetition_penalty": decoding.repetition_penalty, "do_sample": decoding.do_sample}
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
            answers = _answer(model, prompts, max_new_tokens, options)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"prompts at a time: {len(prompts)}, too many for the GPU's memory "
                f"(--per_device_eval_batch_size {max(1, len(prompts) // 2)})"
            ) from error
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def _answer(
    model: Any, prompts: list[list[int]], max_new_tokens: int, options: dict[str, Any]
) -> list[list[int]]:
    """Return each answer's tokens; whenever half of the rows have ended, others continue alone."""
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, first_B1 = left(list(map(torch.tensor, prompts))), torch.tensor([[p[0]] for p in prompts])
    mask = left([torch.ones(len(ids), dtype=torch.long) for ids in prompts])
    # Padded with the prompt's own first token: a repetition penalty counts whatever stands there.
    ids_BL, mask_BL = ids.where(mask == 1, first_B1).to(model.device), mask.to(model.device)
    width, ends = ids_BL.shape[1], torch.tensor(options["eos_token_id"], device=model.device)

    def goes_on(ids_BL: Tensor) -> Tensor:
        return ~torch.isin(ids_BL[:, width:], ends).any(dim=1)

    def half_ended(ids_BL: Tensor, *_: Any, **__: Any) -> Tensor:
        return (2 * goes_on(ids_BL).sum() <= len(ids_BL)).expand(len(ids_BL))

    cache = DynamicCache(config=model.config)
    # Beams share a cache, and what slides or is linear in it cannot be rearranged.
    if options["num_beams"] == 1 and all(type(layer) is DynamicLayer for layer in cache.layers):
        if len(prompts) > 1:
            ids_BL = _begin(cache, model, ids_BL, mask_BL, options)
        options = options | {CACHE: cache, "stopping_criteria": [half_ended]}
    answers: dict[int, list[int]] = {}
    rows = list(range(len(prompts)))
    while True:
        answers |= {row: ids[width:] for row, ids in zip(rows, ids_BL.tolist(), strict=True)}
        kept = goes_on(ids_BL).nonzero()[:, 0]
        if len(kept) < len(rows) and CACHE in options:
            cache.batch_select_indices(kept)
        rows, new = [rows[i] for i in kept.tolist()], ids_BL.shape[1] - mask_BL.shape[1]
        ids_BL, mask_BL = ids_BL[kept], pad(mask_BL[kept], (0, new), value=1)
        left_over = width + max_new_tokens - ids_BL.shape[1]
        if not rows or not left_over:
            return [answers[row] for row in range(len(prompts))]
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "max_new_tokens": left_over}
        ids_BL = model.generate(**inputs, **options)


def _begin(
    cache: Any, model: Any, ids_BL: Tensor, mask_BL: Tensor, options: dict[str, Any]
) -> Tensor:
    """Return the rows with a first token each, and the cache filled with little padding.

    What all prompts begin with is computed once. Then neighbours of like length are computed
    together, and their keys and values moved to the right of the cache's columns.
    """
    lengths_B = mask_BL.sum(dim=1)
    lengths, width = lengths_B.tolist(), ids_BL.shape[1]
    inner = [ids[-n:-1] for ids, n in zip(ids_BL.tolist(), lengths, strict=True)]
    columns = takewhile(lambda ids: len(set(ids)) == 1, zip(*inner, strict=False))
    ids_1P = torch.tensor([[ids[0] for ids in columns]], device=model.device)
    shared = DynamicCache(config=model.config)
    if (len(inner) - 1) * ids_1P.numel() >= PASS_TOKENS:
        model(input_ids=ids_1P, use_cache=True, logits_to_keep=1, **{CACHE: shared})
    groups, tokens = [], []
    for rows in _neighbours(lengths):
        longest = max(lengths[rows])
        groups.append(DynamicCache(config=model.config))
        if shared.get_seq_length():
            # Padding is on the left: these columns hold it, and of the prefix what fits.
            padding_G1 = longest - lengths_B[rows, None]
            columns_GP = torch.arange(ids_1P.shape[1], device=model.device) - padding_G1
            for i, layer in enumerate(shared.layers):
                both = (kv[0][:, columns_GP.clamp(min=0)] for kv in (layer.keys, layer.values))
                groups[-1].update(*(kv.transpose(0, 1) for kv in both), i)
        inputs = {"input_ids": ids_BL[rows, -longest:], "attention_mask": mask_BL[rows, -longest:]}
        found = model.generate(**inputs, max_new_tokens=1, **{CACHE: groups[-1]}, **options)
        tokens.append(found[:, -1:])
    for i in range(len(cache.layers)):
        layers = [group.layers.pop(0) for group in groups]
        keys_values = ([layer.keys for layer in layers], [layer.values for layer in layers])
        moved = ([pad(kv, (0, 0, width - kv.shape[2], 0)) for kv in kvs] for kvs in keys_values)
        cache.update(*map(torch.cat, moved), i)
    return torch.cat([ids_BL, torch.cat(tokens)], dim=1)


def _neighbours(lengths: list[int]) -> Iterator[slice]:
    """Yield parts of the rows, each with no more padding than a pass of its own costs."""
    first = 0
    for last in range(1, len(lengths) + 1):
        part = lengths[first : last + 1]
        if last == len(lengths) or max(part) * len(part) - sum(part) > PASS_TOKENS:
            yield slice(first, last)
            first = last


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Set the model's own generation defaults aside.

    `generate` fills in whatever is not said from there, e.g. Baichuan2-Chat's repetition penalty of
    1.05 and sampling, and "greedy" would not be greedy.
    """
    before, head = model.generation_config, model.get_output_embeddings()
    # A head that is given the last of many tokens as a view is copied once for each row.
    hook = head and head.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if hook:
            hook.remove()
        model.generation_config = before
