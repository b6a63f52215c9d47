"""fedfora chat --adapter DIR: try an adapter interactively.

One question per line; the answer appears word by word. An empty line or Ctrl-D quits.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedfora.cli.console import announce_loading, silence_libraries
from fedfora.config import ConfigParser, Options, flag
from fedfora.models.resolve import adapter_dir_of, check_named, read_record
from fedfora.models.settings import ModelArguments
from fedfora.registry import printable


@dataclass
class ChatArguments(Options):
    """Adapter, instruction and length of answers."""

    model_dir: str | None = flag(
        None, "directory of the adapter; without one, the base model answers", "--adapter"
    )
    instruction: str | None = flag(
        None, "goes before every question; default: the training rows' own, if they share one"
    )
    max_new_tokens: int | None = flag(None, "longest answer in tokens; default as trained", least=1)


def run(argv: Sequence[str]) -> None:
    """Parse, load the model, and answer each question on its own, as `predict` does."""
    parser = ConfigParser([ChatArguments, ModelArguments], prog="fedfora chat", description=__doc__)
    given = parser.values(argv)
    chat, settings = parser.build(given)
    silence_libraries()
    typed = "--model_dir" if any(word.startswith("--model") for word in argv) else "--adapter"
    check_named(settings, adapter_dir_of(chat.model_dir, flag=typed))
    record = read_record(chat.model_dir) if chat.model_dir else {}
    announce_loading("chat")
    from transformers import TextStreamer

    from fedfora.data.encoding import PromptFormat, encode_prompts, prompt_format_of
    from fedfora.data.loading import Example
    from fedfora.data.settings import DataArguments
    from fedfora.evaluation.generate import answer_batch
    from fedfora.models.adapter_base import load_with_adapter

    class Plain(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Show a piece of the answer, without control characters."""
            super().on_finalized_text(printable(text, 10**6, "\n"), stream_end)

    base, model = load_with_adapter(settings, chat.model_dir, given)
    instruction = chat.instruction
    if instruction is None:
        instruction = str(record.get("instruction", ""))
        if shown := instruction.strip():
            print(f'instruction, as in training: "{shown}" (--instruction)', file=sys.stderr)
    own = PromptFormat(**record["prompts"]) if record else None
    prompts = own or prompt_format_of(DataArguments(), base.tokenizer)
    for question in _questions():
        answer_batch(
            model,
            base.tokenizer,
            encode_prompts([Example(instruction, question, None, {})], base.tokenizer, prompts),
            max_new_tokens=chat.max_new_tokens or prompts.max_target_length,
            streamer=Plain(base.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def _questions() -> Iterator[str]:
    """Yield what is typed, or the lines of a file or pipe."""
    if not sys.stdin.isatty():
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    import readline  # noqa: F401  # arrow keys and earlier questions

    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question
