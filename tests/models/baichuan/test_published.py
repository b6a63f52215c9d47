"""A published checkpoint, where there is one: known ids, nothing missing, a sensible answer.

Set FEDFORA_BAICHUAN_DIR to the directory of Baichuan2-7B-Chat or Baichuan2-13B-Chat.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DIRECTORY = os.environ.get("FEDFORA_BAICHUAN_DIR", "")

pytestmark = pytest.mark.skipif(
    not DIRECTORY or not Path(DIRECTORY).is_dir(),
    reason="no published checkpoint here (set FEDFORA_BAICHUAN_DIR to its directory)",
)

# From the tests of chatglm.cpp, which ran them with the published tokenizer.
CONVERSATION = [
    {"role": "user", "content": "你好呀"},
    {"role": "assistant", "content": "你好！很高兴和你交流。请问有什么我可以帮助你的吗？"},
    {"role": "user", "content": "你叫什么名字？"},
]
CONVERSATION_IDS = [
    *(195, 16829, 94278),
    *(196, 16829, 67, 52160, 10329, 3341, 66, 23216, 5817, 92392, 21777, 2193, 93122, 68),
    *(195, 92430, 93410, 1747, 6642, 68),
    196,
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DIRECTORY)


def test_known_ids(tokenizer):
    assert tokenizer("你是谁")["input_ids"] == [92067]
    ids = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
    assert ids == CONVERSATION_IDS
    assert tokenizer.decode(tokenizer("水温高 °C 😀")["input_ids"]) == "水温高 °C 😀"


def test_the_tokenizer_covers_the_models_vocabulary(tokenizer):
    assert len(tokenizer) == AutoConfig.from_pretrained(DIRECTORY).vocab_size


def test_it_loads_with_nothing_missing_and_answers(tokenizer):
    model, info = AutoModelForCausalLM.from_pretrained(
        DIRECTORY, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generation_config.repetition_penalty == 1.05
    prompt = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "百川" in text or "Baichuan" in text
