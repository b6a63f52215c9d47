"""A model that answers one question after another, word by word as they come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TextStreamer

from fedfora.data.encoding import PromptFormat, encode_prompts
from fedfora.data.loading import Example
from fedfora.evaluation.generate import answer_batch


class _Pieces(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Hands on each piece of an answer when it is certain."""

    def __init__(self, tokenizer: Any, on_piece: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_piece = on_piece

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece."""
        self.on_piece(text)


@dataclass
class Conversation:
    """Questions in the format that was trained, and the greedy answers.

    Args:
        model: The model, with or without adapter.
        tokenizer: Its tokenizer.
        layout: The prompt format of the training.
        instruction: What every question is about; it goes before the question.
        remember: Whether earlier questions and answers are read again with every question. An
            adapter that was trained on single questions answers better without.
        max_new_tokens: Longest answer; None takes the format's `max_target_length`.
    """

    model: Any
    tokenizer: Any
    layout: PromptFormat
    instruction: str = ""
    remember: bool = False
    max_new_tokens: int | None = None
    history: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, question: str, on_piece: Callable[[str], None] = lambda text: None) -> str:
        """Return the answer to a question; its pieces go to `on_piece` as they come."""
        example = Example(
            self.instruction, question, None, {}, tuple(self.history) if self.remember else ()
        )
        (answer,) = answer_batch(
            self.model,
            self.tokenizer,
            encode_prompts([example], self.tokenizer, self.layout),
            max_new_tokens=self.max_new_tokens or self.layout.max_target_length,
            streamer=_Pieces(self.tokenizer, on_piece),
        )
        self.history.append((question, answer))
        return answer
