"""A party's rows as a FATE dataset: files with instruction, input and output to token ids."""

from typing import Any

from fate.ml.nn.dataset.base import Dataset
from transformers import DataCollatorForSeq2Seq

from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_chosen
from fedfora.data.settings import DataArguments
from fedfora.models.loading import load_tokenizer
from fedfora.models.settings import ModelArguments


class AnswerRows(Dataset):  # type: ignore[misc]  # FATE's interface
    """Rows with `input_ids` and `labels`, the loss on the answer only.

    Args:
        tokenizer_name_or_path: As `--model_name_or_path`.
        **data: Fields of `DataArguments`.
    """

    def __init__(self, tokenizer_name_or_path: str, **data: Any) -> None:
        super().__init__()
        self.settings = DataArguments(**data)
        self.tokenizer = load_tokenizer(ModelArguments(tokenizer_name_or_path))
        self.prompts = prompt_format_of(self.settings, self.tokenizer)
        self.encoded: list[dict[str, list[int]]] = []

    def load(self, data_or_path: str | None) -> None:
        """Read a file or a bundled data set; None takes `dataset` in `dataset_dir`."""
        examples = load_chosen(data_or_path, self.settings, flag="--train_file")
        self.encoded = encode_examples(examples, self.tokenizer, self.prompts)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.encoded[index]


def answer_collator(tokenizer_name_or_path: str) -> DataCollatorForSeq2Seq:
    """Return what pads rows to a batch, for FATE-LLM's own trainer."""
    tokenizer = load_tokenizer(ModelArguments(tokenizer_name_or_path))
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
