"""A tiny base model, settings for quick runs, and one thread per process."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.models.resolve import model_path

torch.set_num_threads(1)

pytest_plugins = ["baichuan_tokenizer"]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A random Llama of two layers with the bundled tokenizer; widths that NF4 can take."""
    directory = tmp_path_factory.mktemp("tiny-base")
    tokenizer = AutoTokenizer.from_pretrained(model_path("clinic-base"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def rows_file(tmp_path):
    """A function that writes rows as JSON lines and returns the path."""

    def write(rows, name="rows.json"):
        import json

        path = tmp_path / name
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
        return str(path)

    return write
