"""Examples to token ids: the prompt as it will be at prediction, the loss on the answer only."""

import logging
from dataclasses import dataclass
from typing import Any

from fedfora.data.loading import Example
from fedfora.data.settings import DataArguments

logger = logging.getLogger(__name__)

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


def prompt_format(settings: DataArguments, tokenizer: Any) -> PromptFormat:
    """Resolve the template "auto" for a tokenizer.

    Raises:
        ValueError: If a chat template is asked for and the tokenizer has none, or if the tokenizer
            has no end-of-sequence token.
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
    return PromptFormat(
        template=template,
        source_prefix=settings.source_prefix,
        max_source_length=settings.max_source_length,
        max_target_length=settings.max_target_length,
    )


def encode_prompt(example: Example, tokenizer: Any, layout: PromptFormat) -> list[int]:
    """Return the ids a model reads before it answers."""
    text_ids = _ids(tokenizer, layout.source_prefix + example.prompt)
    cut = len(text_ids) > layout.max_source_length
    text_ids = text_ids[: layout.max_source_length]
    if layout.template == "plain":
        return [*_bos(tokenizer), *text_ids, *_ids(tokenizer, "\n")]
    text = tokenizer.decode(text_ids) if cut else layout.source_prefix + example.prompt
    return _chat_ids(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


def encode_example(example: Example, tokenizer: Any, layout: PromptFormat) -> dict[str, list[int]]:
    """Return `input_ids` and `labels` of prompt and answer, closed by end-of-sequence.

    The labels of the prompt are -100. The answer is cut to `max_target_length - 1` tokens so that
    its end always fits.
    """
    prompt_ids = encode_prompt(example, tokenizer, layout)
    answer_ids = _answer_ids(example.output or "", tokenizer, layout)
    return {
        "input_ids": prompt_ids + answer_ids,
        "labels": [IGNORED] * len(prompt_ids) + answer_ids,
    }


def encode_examples(
    examples: list[Example], tokenizer: Any, layout: PromptFormat
) -> list[dict[str, list[int]]]:
    """Encode all examples; warn with the count of those that had to be cut."""
    encoded = [encode_example(example, tokenizer, layout) for example in examples]
    cut = sum(_is_cut(example, tokenizer, layout) for example in examples)
    if cut:
        logger.warning(
            "%d of %d rows (%.1f %%) are longer than --max_source_length %d or "
            "--max_target_length %d and were cut",
            *(cut, len(examples), 100 * cut / len(examples)),
            *(layout.max_source_length, layout.max_target_length),
        )
    return encoded


def _answer_ids(answer: str, tokenizer: Any, layout: PromptFormat) -> list[int]:
    ids = _ids(tokenizer, answer)[: layout.max_target_length - 1]
    return [*ids, tokenizer.eos_token_id]


def _is_cut(example: Example, tokenizer: Any, layout: PromptFormat) -> bool:
    source = len(_ids(tokenizer, layout.source_prefix + example.prompt))
    target = len(_ids(tokenizer, example.output or "")) + 1
    return source > layout.max_source_length or target > layout.max_target_length


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _bos(tokenizer: Any) -> list[int]:
    """The begin-of-sequence token, for tokenizers that put one before every text."""
    starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if starts_with_bos else []


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return _ids(tokenizer, text)
