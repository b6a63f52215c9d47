"""What the user says about data: files, columns, lengths, template."""

from dataclasses import dataclass
from typing import Literal

from fedfora.config import flag


@dataclass
class DataArguments:
    """Which rows to read and how they become prompt and answer."""

    train_file: str | None = flag(None, "training rows: .json, .jsonl, .csv, or 'clinic'")
    test_file: str | None = flag(
        None, "held-out rows, never trained on; 'clinic:test' for the bundled ones", "--test_path"
    )
    instruction_column: str = flag("instruction", "column with what to do; may be absent")
    prompt_column: str = flag("input", "column with the text to work on; may be empty")
    response_column: str = flag("output", "column with the answer")
    source_prefix: str = flag("", "text put before every prompt")
    max_source_length: int = flag(512, "tokens kept of the prompt", "--max_src_len")
    max_target_length: int = flag(512, "tokens kept of the answer, end-of-sequence included")
    template: Literal["auto", "plain", "chat"] = flag(
        "auto", "the model's chat template, plain text, or whichever the model has"
    )
    skip_bad_rows: bool = flag(False, "count and skip broken rows instead of stopping")

    def __post_init__(self) -> None:
        """Refuse lengths that leave no room."""
        if self.max_source_length < 1:
            raise ValueError(
                f"--max_source_length must be at least 1, got {self.max_source_length}"
            )
        if self.max_target_length < 2:
            raise ValueError(
                "--max_target_length must be at least 2 (a token and end-of-sequence), got "
                f"{self.max_target_length}"
            )
