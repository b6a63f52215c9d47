"""Prompt and answer to ids: loss on the answer only, the end always kept, the text unharmed."""

import pytest
from transformers import AutoTokenizer

from fedfora.data.encoding import (
    IGNORED,
    PromptFormat,
    encode_example,
    encode_examples,
    encode_prompt,
    prompt_format,
)
from fedfora.data.loading import Example
from fedfora.data.settings import DataArguments
from fedfora.models.place import model_path

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("clinic-base"))


def layout(**changes):
    values = {
        "template": "plain",
        "source_prefix": "",
        "max_source_length": 512,
        "max_target_length": 512,
    }
    return PromptFormat(**(values | changes))


EXAMPLE = Example(
    "List the triples of this note.\n", "Skin clinic. 发动机水温高", "a_b_c\nd_e_f", {}
)


def answer_of(encoded):
    return [label for label in encoded["labels"] if label != IGNORED]


def test_text_of_any_script_survives(tokenizer):
    encoded = encode_example(EXAMPLE, tokenizer, layout())
    text = tokenizer.decode(encoded["input_ids"])
    assert text == EXAMPLE.prompt + "\n" + EXAMPLE.output + "</s>"


def test_loss_is_on_the_answer_and_its_end_only(tokenizer):
    encoded = encode_example(EXAMPLE, tokenizer, layout())
    assert tokenizer.decode(answer_of(encoded)) == EXAMPLE.output + "</s>"
    assert len(encoded["labels"]) == len(encoded["input_ids"])


def test_the_prompt_of_training_is_the_prompt_of_prediction(tokenizer):
    for template in ("plain", "chat"):
        tokenizer.chat_template = CHAT
        prompt = encode_prompt(EXAMPLE, tokenizer, layout(template=template))
        encoded = encode_example(EXAMPLE, tokenizer, layout(template=template))
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert set(encoded["labels"][: len(prompt)]) == {IGNORED}


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_a_cut_answer_still_ends(tokenizer, limit):
    answer = answer_of(encode_example(EXAMPLE, tokenizer, layout(max_target_length=limit)))
    assert len(answer) == limit
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_cut_prompt_keeps_its_beginning_and_its_frame(tokenizer, template):
    tokenizer.chat_template = CHAT
    text = tokenizer.decode(
        encode_prompt(EXAMPLE, tokenizer, layout(template=template, max_source_length=6))
    )
    assert "List the" in text
    assert text.endswith("\n" if template == "plain" else "<assistant>")


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_newest_turns_that_fit_stand_before_the_prompt(tokenizer, template):
    tokenizer.chat_template = CHAT
    history = (("first question", "first answer"), ("second question", "second answer"))
    talk = Example("", "third question", "third answer", {}, history)
    told = [q_or_a for turn in history for q_or_a in turn]
    whole = tokenizer.decode(encode_prompt(talk, tokenizer, layout(template=template)))
    places = [whole.index(text) for text in (*told, "third question")]
    assert places == sorted(places)
    room = sum(len(tokenizer(t)["input_ids"]) for t in (*history[1], "third question"))
    fitting = layout(template=template, max_source_length=room)
    cut = tokenizer.decode(encode_prompt(talk, tokenizer, fitting))
    assert "first" not in cut
    assert "second question" in cut
    answer = answer_of(encode_example(talk, tokenizer, fitting))
    assert tokenizer.decode(answer) == "third answer</s>"  # no loss on earlier answers


def test_cut_rows_are_counted_in_a_warning(tokenizer, caplog):
    encode_examples([EXAMPLE] * 3, tokenizer, layout(max_source_length=4))
    assert "3 of 3 rows (100.0 %)" in caplog.text


def test_instruction_and_input_are_joined_where_they_need_it():
    assert Example("Translate.", "Hello", "", {}).prompt == "Translate.\nHello"
    assert Example("Text：", "你好", "", {}).prompt == "Text：你好"
    assert Example("", "Hello", "", {}).prompt == "Hello"


def test_the_template_is_the_models_own_when_it_has_one(tokenizer):
    assert prompt_format(DataArguments(), tokenizer).template == "plain"
    with pytest.raises(ValueError, match="no chat template"):
        prompt_format(DataArguments(template="chat"), tokenizer)
    tokenizer.chat_template = CHAT
    assert prompt_format(DataArguments(), tokenizer).template == "chat"
    assert prompt_format(DataArguments(template="plain"), tokenizer).template == "plain"


def test_lengths_without_room_are_refused():
    with pytest.raises(ValueError, match="--max_target_length"):
        DataArguments(max_target_length=1)
    with pytest.raises(ValueError, match="--max_source_length"):
        DataArguments(max_source_length=0)
