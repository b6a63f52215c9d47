"""Examples to token ids: the prompt as it will be at prediction, the loss on the answer only.

The text of a row stays text. If it spells a control token (`<|im_end|>` in a note), it is
encoded by its letters, so no row opens or closes a turn. Only the template, the prefix and the end
of the answer give control tokens.
"""

import hashlib
import logging
import math
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedfora.data.loading import Example
from fedfora.data.settings import DataArguments

logger = logging.getLogger(__name__)

Encoded = list[dict[str, list[int]]]  # rows with `input_ids` and `labels`
IGNORED = -100  # the label of a token without loss, as transformers has it


@dataclass(frozen=True)
class PromptFormat:
    """How rows become prompts; stored with the adapter and used again by `predict`.

    Args:
        template: "plain" or "chat".
        source_prefix: Text before every prompt.
        max_source_length: Tokens kept of the prompt's text.
        max_target_length: Tokens kept of the answer, end-of-sequence included.
    """

    template: str
    source_prefix: str
    max_source_length: int
    max_target_length: int


def prompt_format_of(settings: DataArguments, tokenizer: Any) -> PromptFormat:
    """Resolve the template "auto" for a tokenizer.

    Raises:
        ValueError: If a chat template is asked for and the tokenizer has none, or one that fails or
            leaves the question out, or if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    template = settings.template
    if template == "auto":
        template = "chat" if has_chat else "plain"
    if template == "chat" and not has_chat:
        raise ValueError(
            f"--template chat: the tokenizer of {tokenizer.name_or_path} has no chat template "
            "(--template plain)"
        )
    if template == "chat":
        _check_template(tokenizer, with_history=settings.history_column is not None)
    return PromptFormat(
        template=template,
        source_prefix=settings.source_prefix,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
    )


def encode_prompt(example: Example, tokenizer: Any, prompt_format: PromptFormat) -> list[int]:
    """Return the ids a model reads before it answers."""
    return _prompt(example, tokenizer, prompt_format)[0]


def encode_prompts(
    examples: list[Example], tokenizer: Any, prompt_format: PromptFormat
) -> list[list[int]]:
    """Return the ids of all prompts; warn with the count of those that had to be cut."""
    encoded = [_prompt(example, tokenizer, prompt_format) for example in examples]
    warn_of_cut_rows(sum(is_cut for _, is_cut in encoded), len(examples), prompt_format)
    _check_ids((ids for ids, _ in encoded), tokenizer)
    return [ids for ids, _ in encoded]


def encode_example(
    example: Example, tokenizer: Any, prompt_format: PromptFormat
) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of prompt and answer, closed by end-of-sequence.

    The labels of the prompt are -100. The answer is cut to `max_target_length - 1` tokens so that
    its end always fits.
    """
    return _encode(example, tokenizer, prompt_format)[0]


def encode_examples(
    examples: list[Example],
    tokenizer: Any,
    prompt_format: PromptFormat,
    *,
    cache_dir: str | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
) -> Encoded:
    """Encode all examples, or read what an earlier run encoded; warn with the count of cut rows.

    Args:
        examples: The rows.
        tokenizer: The base's.
        prompt_format: How rows become prompts.
        cache_dir: Where encoded rows are kept; None keeps none.
        overwrite: Encode again, whatever is kept.
        num_workers: Processes that encode; starting one takes seconds.
    """
    path, cached = None, None
    if cache_dir is not None:
        digest = _digest(examples, tokenizer, prompt_format)
        path = Path(cache_dir) / "encoded" / f"{digest}.parquet"
        cached = None if overwrite else _read(path)
    encoded, cut = cached or encode_and_count(
        examples, tokenizer, prompt_format, num_workers=num_workers
    )
    if path is not None and cached is None:
        _write(path, encoded, cut)
    warn_of_cut_rows(cut, len(examples), prompt_format)
    return encoded


def encode_and_count(
    examples: list[Example], tokenizer: Any, prompt_format: PromptFormat, *, num_workers: int = 1
) -> tuple[Encoded, int]:
    """Return the encoded examples and how many of them were cut."""
    if num_workers == 1:
        encoded = [_encode(example, tokenizer, prompt_format) for example in examples]
    else:
        share = math.ceil(len(examples) / num_workers)
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as workers:
            work = partial(_encode, tokenizer=tokenizer, prompt_format=prompt_format)
            encoded = list(workers.map(work, examples, chunksize=share))
    _check_ids((row["input_ids"] for row, _ in encoded), tokenizer)
    return [row for row, _ in encoded], sum(cut for _, cut in encoded)


def _check_ids(rows: Iterable[list[int]], tokenizer: Any) -> None:
    """Raise if a row has a token without a place in the base's embedding.

    How many places there are is `embedding_rows`, which `fedfora.models.loading` sets.
    """
    places = getattr(tokenizer, "embedding_rows", None)
    for number, ids in enumerate(rows, start=1):
        if places is not None and (highest := max(ids, default=0)) >= places:
            raise ValueError(
                f"row {number}: token {tokenizer.convert_ids_to_tokens(highest)!r} has id "
                f"{highest}, the base's embedding has {places} rows: the tokenizer is not this "
                "base's, or the base was not resized to it"
            )


def prompt_tokens(example: Example, tokenizer: Any, prompt_format: PromptFormat) -> int:
    """Return the tokens of a prompt's text and history before anything is cut, without frame."""
    texts = sum(len(_text_ids(tokenizer, text)) for turn in example.history for text in turn)
    return texts + len(_text_ids(tokenizer, example.prompt, prefix=prompt_format.source_prefix))


def answer_tokens(example: Example, tokenizer: Any) -> int:
    """Return the tokens of an answer before it is cut, end-of-sequence included."""
    return len(_text_ids(tokenizer, example.output or "")) + 1


def spells_control_token(example: Example, tokenizer: Any) -> bool:
    """Return whether a text of the row would give a control token if not encoded as text."""
    texts = [example.prompt, example.output or "", *(t for turn in example.history for t in turn)]
    return any(_spells(tokenizer, text) for text in texts)


def warn_of_cut_rows(cut: int, num_rows: int, prompt_format: PromptFormat) -> None:
    """Say how many rows were cut, if any were."""
    if cut:
        logger.warning(
            "rows longer than --max_source_length %d or --max_target_length %d, which were cut: "
            "%d of %d (%.1f %%)",
            *(prompt_format.max_source_length, prompt_format.max_target_length),
            *(cut, num_rows, 100 * cut / num_rows),
        )


def check_context(context: int | None, lengths: list[int], source: str) -> None:
    """Raise if a row does not fit into the model's context.

    Args:
        context: Tokens that the model can hold; None where its configuration does not say.
        lengths: Tokens of each row, prompt and answer.
        source: Of the rows, for the message.

    Raises:
        ValueError: Naming the longest row, the context and the flags that cut rows.
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=0)
    if context is not None and lengths and lengths[longest] > context:
        raise ValueError(
            f"{source}, row {longest + 1}: {lengths[longest]} tokens of prompt and answer exceed "
            f"the model's context {context}: lower --max_source_length, --max_target_length, or "
            "--max_new_tokens"
        )


def _encode(
    example: Example, tokenizer: Any, prompt_format: PromptFormat
) -> tuple[dict[str, list[int]], bool]:
    """The encoded row, and whether anything of it had to be cut."""
    prompt_ids, prompt_cut = _prompt(example, tokenizer, prompt_format)
    whole_ids = _text_ids(tokenizer, example.output or "")
    answer_ids = [*whole_ids[: prompt_format.max_target_length - 1], tokenizer.eos_token_id]
    row = {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}
    return row, prompt_cut or len(answer_ids) <= len(whole_ids)


def _prompt(
    example: Example, tokenizer: Any, prompt_format: PromptFormat
) -> tuple[list[int], bool]:
    """The prompt's ids, and whether it was cut: oldest turns go first, then the text's end."""
    text_ids = _text_ids(tokenizer, example.prompt, prefix=prompt_format.source_prefix)
    cut = len(text_ids) > prompt_format.max_source_length
    text_ids = text_ids[: prompt_format.max_source_length]
    room, history = prompt_format.max_source_length - len(text_ids), example.history
    sizes = accumulate(
        sum(len(_text_ids(tokenizer, t)) for t in turn) for turn in reversed(history)
    )
    fitting = sum(1 for _ in takewhile(lambda size: size <= room, sizes))  # the newest whole turns
    turns = history[len(history) - fitting :]
    is_cut = cut or fitting < len(history)
    if prompt_format.template == "plain":
        line_end = _ids(tokenizer, "\n")
        history_ids = [
            token
            for turn in turns
            for said in turn
            for token in (*_text_ids(tokenizer, said), *line_end)
        ]
        # Some tokenizers put a begin-of-sequence token before every text.
        bos = [tokenizer.bos_token_id]
        start = bos if tokenizer("")["input_ids"][:1] == bos else []
        return [*start, *history_ids, *text_ids, *line_end], is_cut
    messages = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    text = tokenizer.decode(text_ids) if cut else prompt_format.source_prefix + example.prompt
    return _chat_ids(tokenizer, [*messages, {"role": "user", "content": text}]), is_cut


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def _text_ids(tokenizer: Any, text: str, prefix: str = "") -> list[int]:
    """The ids of a row's text behind the user's prefix; only the prefix gives control tokens."""
    ids, control = _ids(tokenizer, prefix + text), _control_ids(tokenizer, len(tokenizer))
    if control.isdisjoint(ids):
        return ids
    frame = [] if control.isdisjoint(_ids(tokenizer, prefix)) else _ids(tokenizer, prefix)
    if frame and not _spells(tokenizer, text):
        return ids
    as_text = _ids(tokenizer, text if frame else prefix + text, split_special_tokens=True)
    if left := control.intersection(as_text) - {tokenizer.unk_token_id}:
        raise ValueError(
            f"a row spells {tokenizer.decode(list(left)[:1])!r}, which this tokenizer always reads "
            f"as a control token; the row begins {text[:40]!r}"
        )
    return frame + as_text


def _spells(tokenizer: Any, text: str) -> bool:
    """Whether a text gives a control token where nobody keeps it from that."""
    ids = _ids(tokenizer, text)
    if _control_ids(tokenizer, len(tokenizer)).isdisjoint(ids):
        return False
    return ids != _ids(tokenizer, text, split_special_tokens=True)  # a gap is one either way


@lru_cache(maxsize=4)
def _control_ids(tokenizer: Any, _size: int) -> frozenset[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation; frame and texts one by one where a text spells a control token."""
    texts = [message["content"] for message in messages]
    if not any(_spells(tokenizer, text) for text in texts):
        return _ids(tokenizer, _rendered(tokenizer, messages))
    marked = [{**m, "content": f"\ue000{n}\ue001"} for n, m in enumerate(messages)]
    pieces = re.split("\ue000([0-9]+)\ue001", _rendered(tokenizer, marked))
    ids = [_ids(tokenizer, piece) for piece in pieces[::2]]
    for index, place in enumerate(pieces[1::2]):
        ids[index] += _text_ids(tokenizer, texts[int(place)])
    return [token for piece in ids for token in piece]


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A conversation as the model's template writes it, up to where the answer begins."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(
            f"--template chat: the chat template of {tokenizer.name_or_path} fails: "
            f"{type(error).__name__}: {error} (--template plain)"
        ) from error
    return str(text)


def _check_template(tokenizer: Any, *, with_history: bool) -> None:
    """Raise if the template fails, or leaves out what is asked."""
    turns = [("user", "alpha"), ("assistant", "beta")] * with_history + [("user", "gamma")]
    text = _rendered(tokenizer, [{"role": role, "content": said} for role, said in turns])
    if missing := [said for _, said in turns if said not in text]:
        raise ValueError(
            f"--template chat: the chat template of {tokenizer.name_or_path} leaves out "
            f"messages: {len(missing)} of {len(turns)} (--template plain)"
        )


# Encoded rows kept on disk, for the next training on the same rows with the same tokenizer.


def _digest(examples: list[Example], tokenizer: Any, prompt_format: PromptFormat) -> str:
    digest = hashlib.sha256(b"2")  # the encoding's version: 2 keeps control tokens out of texts
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else repr(sorted(tokenizer.get_vocab()))).encode())
    places = getattr(tokenizer, "embedding_rows", None)  # what the ids were checked against
    frame = (tokenizer.chat_template, tokenizer.special_tokens_map, prompt_format, places)
    digest.update(repr(frame).encode())
    for example in examples:
        row = (example.instruction, example.input, example.output, example.history)
        digest.update(repr(row).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> tuple[Encoded, int] | None:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        return None
    try:
        table = pyarrow.parquet.read_table(path)
        return table.to_pylist(), int(table.schema.metadata[b"cut"])
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read, encoding the rows again: %s", path, error)
        return None


def _write(path: Path, encoded: Encoded, cut: int) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(encoded).replace_schema_metadata({"cut": str(cut)})
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(table, temporary)
    temporary.replace(path)
