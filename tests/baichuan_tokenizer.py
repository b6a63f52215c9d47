"""Baichuan tokenizers as they are published, with a vocabulary trained on three lines."""

import json
import shutil

import pytest
import sentencepiece

# The piece at id 195, which opens a user's turn; the next one opens the assistant's.
FIRST_CHAT_PIECE = {"baichuan": 102, "baichuan2": 106}
TEXTS = [
    "水温高 发动机 部件故障 风扇 低速转动 你是谁 你好呀 你叫什么名字 请问有什么我可以帮助你的吗？",
    "the patient has a fever of 38 degrees and a cough; what should the doctor do?",
    "def f(x):\n    return x + 1  # 123456",
]


def published_token(content):
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    return {"__type": "AddedToken", "content": content} | flags


TOKENIZER = {
    "add_bos_token": False,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
    "bos_token": published_token("<s>"),
    "eos_token": published_token("</s>"),
    "pad_token": published_token("<unk>"),
    "unk_token": published_token("<unk>"),
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "sp_model_kwargs": {},
}


def train_sentencepiece(prefix, generation):
    first = FIRST_CHAT_PIECE[generation]
    reserved = [f"<reserved_{first + i - 195}>" for i in range(195, 200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        add_dummy_prefix=generation == "baichuan",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[f"<filler_{i}>" for i in range(3, 195)] + reserved,
        minloglevel=2,
    )


@pytest.fixture(scope="session")
def publish_tokenizer(tmp_path_factory):
    """A function that writes a tokenizer as published into a directory and returns its path."""
    trained = tmp_path_factory.mktemp("sentencepiece")
    for generation in FIRST_CHAT_PIECE:
        train_sentencepiece(trained / generation, generation)

    def write(directory, generation, **changes):
        shutil.copyfile(trained / f"{generation}.model", directory / "tokenizer.model")
        name = "BaiChuanTokenizer" if generation == "baichuan" else "BaichuanTokenizer"
        settings = TOKENIZER | {"tokenizer_class": name} | changes
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        code = "raise SystemExit('remote code was run')\n"
        (directory / "tokenization_baichuan.py").write_text(code)
        return str(directory)

    return write
