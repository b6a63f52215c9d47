"""A party's rows as a dataset of FATE's, and what pads them, as FATE-LLM's runner takes both."""

from fate.ml.nn.dataset.base import Dataset
from transformers import DataCollatorForSeq2Seq

from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.loading import load_tokenizer
from fedfora.models.settings import ModelArguments


class AnswerRows(Dataset):
    """Rows with `input_ids` and `labels`, the loss on the answer only."""

    def __init__(self, model):
        super().__init__()
        self.tokenizer = load_tokenizer(ModelArguments(model))

    def load(self, path):
        data = DataArguments()
        prompts = prompt_format_of(data, self.tokenizer)
        self.encoded = encode_examples(load_examples(path, data), self.tokenizer, prompts)

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, index):
        return self.encoded[index]


def collator(model):
    return DataCollatorForSeq2Seq(load_tokenizer(ModelArguments(model)), label_pad_token_id=-100)
