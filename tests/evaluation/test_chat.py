"""A conversation answers as `predict` does, piece by piece, and remembers only when told to."""

import io

import pytest
from transformers import GenerationConfig

from fedfora.cli.main import main
from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.evaluation.chat import Conversation
from fedfora.evaluation.generate import generate
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments

LAYOUT = PromptFormat("plain", "", 64, 8)
QUESTIONS = ["Takes 40 mg of warfarin.", "Soap brings out scabies."]


@pytest.fixture(scope="module")
def base():
    return load_base(ModelArguments("clinic-base", quantization="none", device="cpu"))


def predicted(base, example):
    ids = [encode_prompt(example, base.tokenizer, LAYOUT)]
    return generate(base.model, base.tokenizer, ids, max_new_tokens=8, batch_size=1)[0]


def test_an_answer_is_what_predict_would_say_and_comes_in_pieces(base):
    conversation = Conversation(base.model, base.tokenizer, LAYOUT, instruction="List:")
    for question in QUESTIONS:
        pieces = []
        answer = conversation.ask(question, pieces.append)
        assert answer == predicted(base, Example("List:", question, None, {}))
        assert "".join(pieces) == answer


def test_it_remembers_only_when_told_to(base):
    conversation = Conversation(base.model, base.tokenizer, LAYOUT, remember=True)
    first = conversation.ask(QUESTIONS[0])
    second = conversation.ask(QUESTIONS[1])
    turns = ((QUESTIONS[0], first),)
    assert second == predicted(base, Example("", QUESTIONS[1], None, {}, turns))


def test_the_command_answers_the_lines_it_is_given(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(QUESTIONS) + "\n\n"))
    words = "chat --model_name_or_path clinic-base --quantization none --max_new_tokens 4"
    assert main(words.split()) == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(QUESTIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat --adapter nowhere", "nowhere: not a directory"),
        ("chat", "--model_name_or_path is missing"),
        ("chat --max_new_tokens 0", "--max_new_tokens must be at least 1"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_generation_defaults_of_the_base_do_not_bend_the_answer_and_all_its_ends_end_it(base):
    """As with `predict`: greedy is greedy, and each of several ends is one."""
    plain = Conversation(base.model, base.tokenizer, LAYOUT).ask(QUESTIONS[0])
    kept = base.model.generation_config
    ids = base.tokenizer(plain, add_special_tokens=False)["input_ids"]
    config = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=2)
    try:
        base.model.generation_config = config
        assert Conversation(base.model, base.tokenizer, LAYOUT).ask(QUESTIONS[0]) == plain
        config.eos_token_id = [base.tokenizer.eos_token_id, ids[1]]
        shorter = Conversation(base.model, base.tokenizer, LAYOUT).ask(QUESTIONS[0])
    finally:
        base.model.generation_config = kept
    assert len(shorter) < len(plain)
