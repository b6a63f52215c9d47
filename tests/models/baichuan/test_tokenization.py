"""The tokenizer against SentencePiece itself, and the chat format against the published functions.

The SentencePiece models are trained here with the flags of the published ones: Baichuan2 without a
dummy prefix, Baichuan with one; ids 195 and 196 open the turns of user and assistant.
"""

import pickle

import pytest
import sentencepiece
from jinja2 import TemplateError
from transformers import AutoTokenizer

TEXTS = [
    "你是谁",
    "水温高，风扇低速转动 °C",
    " leading  and trailing ",
    "def f(x):\n\treturn x1 + 23",
    "😀 é 한국어",
    "",
]
CONVERSATION = [
    {"role": "user", "content": "你好 呀"},
    {"role": "assistant", "content": " 请问有什么可以帮助你的吗？"},
    {"role": "user", "content": "你叫什么名字"},
]


@pytest.fixture(params=["baichuan", "baichuan2"])
def generation(request):
    return request.param


@pytest.fixture
def directory(generation, publish_tokenizer, tmp_path):
    return publish_tokenizer(tmp_path, generation)


@pytest.fixture
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def pieces(directory):
    return sentencepiece.SentencePieceProcessor(model_file=f"{directory}/tokenizer.model")


def chat_input(pieces, messages, generation):
    """As published: every message is encoded alone, then an id says whose turn it is."""
    ids = []
    for message in messages:
        text_ids = pieces.encode(message["content"])
        if message["role"] == "system":
            ids = text_ids
        elif message["role"] == "user":
            ids += [195, *text_ids]
        else:
            ids += [196, *text_ids] + ([2] if generation == "baichuan" else [])
    return ids if messages[-1]["role"] == "assistant" else [*ids, 196]


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces_and_decode_to_the_text(tokenizer, pieces, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == pieces.decode(ids) == text


def test_nothing_is_put_around_a_text_and_batches_are_padded(tokenizer):
    assert tokenizer("")["input_ids"] == []
    batch = tokenizer(["你好", "你好 你叫什么名字"], padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id == 0
    assert batch["attention_mask"][0][-1] == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_prompt_has_the_published_chat_ids(tokenizer, pieces, generation, turns):
    messages = CONVERSATION[-turns:]
    got = ids_of(tokenizer, messages, add_generation_prompt=True)
    assert got == chat_input(pieces, messages, generation)


def test_a_finished_conversation_is_its_prompt_the_answer_and_end_of_sequence(tokenizer):
    messages = [*CONVERSATION, {"role": "assistant", "content": "Baichuan"}]
    prompt = ids_of(tokenizer, CONVERSATION, add_generation_prompt=True)
    answer = tokenizer("Baichuan")["input_ids"]
    assert ids_of(tokenizer, messages) == [*prompt, *answer, 2]


def test_a_system_message_stands_in_front_where_the_model_knows_it(tokenizer, pieces, generation):
    messages = [{"role": "system", "content": "请用中文回答。"}, *CONVERSATION]
    if generation == "baichuan2":
        got = ids_of(tokenizer, messages, add_generation_prompt=True)
        assert got == chat_input(pieces, messages, generation)
    else:
        with pytest.raises(TemplateError, match="no system message at position 1"):
            ids_of(tokenizer, messages)


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="no tool message at position 4"):
        ids_of(tokenizer, [*CONVERSATION, {"role": "tool", "content": "x"}])


def test_turns_and_end_of_sequence_are_left_out_of_an_answer(tokenizer):
    ids = [196, *tokenizer("你叫什么")["input_ids"], 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你叫什么"
    assert tokenizer.decode(ids).endswith("你叫什么</s>")


def test_added_tokens_are_decoded_by_name(tokenizer):
    tokenizer.add_tokens(["<故障>"])
    ids = tokenizer("水温高<故障>风扇")["input_ids"]
    assert len(tokenizer) - 1 in ids
    assert tokenizer.decode(ids) == "水温高<故障>风扇"


def test_saved_loaded_and_pickled_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert type(again) is type(tokenizer)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert ids_of(again, CONVERSATION) == ids_of(tokenizer, CONVERSATION)


def test_flags_of_tokens_saved_by_an_older_transformers_do_not_hide_end_of_sequence(
    publish_tokenizer, tmp_path
):
    token = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False}
    saved = {"2": token | {"single_word": True, "special": True}}
    directory = publish_tokenizer(tmp_path, "baichuan2", added_tokens_decoder=saved)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("你好</s>")["input_ids"][-1] == 2


def test_a_chat_template_of_ones_own_wins(publish_tokenizer, tmp_path):
    own = "{{ messages[0]['content'] }}"
    directory = publish_tokenizer(tmp_path, "baichuan2", chat_template=own)
    assert AutoTokenizer.from_pretrained(directory).chat_template == own


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
def test_a_tokenizer_that_would_add_tokens_is_refused(publish_tokenizer, tmp_path, name):
    directory = publish_tokenizer(tmp_path, "baichuan2", **{name: True})
    with pytest.raises(ValueError, match=f"{name} is true"):
        AutoTokenizer.from_pretrained(directory)
