"""A chat answers each question as `predict` does."""

import io

import pytest

from fedfora.cli.main import main
from fedfora.data.encoding import PromptFormat, encode_prompt
from fedfora.data.loading import Example
from fedfora.evaluation.generate import generate
from fedfora.models.loading import load_base
from fedfora.models.settings import ModelArguments

LAYOUT = PromptFormat("plain", "", 512, 512)
QUESTIONS = ["Takes 40 mg of warfarin.", "Soap brings out scabies."]


def test_the_lines_it_is_given_are_answered_as_predict_would(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(QUESTIONS) + "\n\n"))
    words = "chat --model_name_or_path clinic-base --quantization none --device cpu"
    assert main([*words.split(), "--instruction", "List:", "--max_new_tokens", "8"]) == 0
    base = load_base(ModelArguments("clinic-base", quantization="none", device="cpu"))
    examples = [Example("List:", question, None, {}) for question in QUESTIONS]
    prompts = [encode_prompt(example, base.tokenizer, LAYOUT) for example in examples]
    answers = generate(base.model, base.tokenizer, prompts, max_new_tokens=8, batch_size=1)
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_no_terminal_obeys_an_answer(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    monkeypatch.setattr(
        "fedfora.evaluation.generate.answer_batch",
        lambda *args, streamer, **rest: streamer.on_finalized_text("a\x1b[2J\nb", stream_end=True),
    )
    words = "chat --model_name_or_path clinic-base --quantization none --device cpu"
    assert main(words.split()) == 0
    assert capsys.readouterr().out == "a [2J\nb\n"


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
