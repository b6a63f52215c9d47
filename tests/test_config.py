"""The same checks whatever the source: command line, YAML, Flower's run config."""

from dataclasses import dataclass
from typing import Literal

import pytest

from fedfora.config import ConfigError, ConfigParser, Options, flag, to_mapping


@dataclass
class Arguments:
    train_file: str | None = flag(None, "file")
    learning_rate: float = flag(1e-4, "rate")
    max_source_length: int = flag(512, "length", "--max_src_len")
    max_length: int | None = flag(1024, "length")
    rule: str = flag("fedavg", "rule", choices=["fedavg", "trimmed-mean"])
    quantization: Literal["none", "nf4"] = flag("none", "bits")
    fp16: bool = flag(False, "half")
    modules: list[str] = flag(["all-linear"], "modules")
    lora_rank: int = flag(8, "rank", "--lora_r")


def parse(*argv):
    return ConfigParser([Arguments]).parse(list(argv))[0]


def parse_yaml(tmp_path, text, *argv):
    (tmp_path / "c.yaml").write_text(text)
    return parse("--config", str(tmp_path / "c.yaml"), *argv)


def test_yaml_values_are_typed(tmp_path):
    got = parse_yaml(
        tmp_path,
        "learning_rate: 2e-5\nfp16: true\nmax_length: null\nmodules: [W_pack, o_proj]\n"
        "quantization: nf4\n",
    )
    assert got == Arguments(
        learning_rate=2e-5,
        fp16=True,
        max_length=None,
        modules=["W_pack", "o_proj"],
        quantization="nf4",
    )


def test_the_command_line_beats_the_file_wherever_it_stands(tmp_path):
    assert parse_yaml(tmp_path, "lora_rank: 2\n", "--lora_rank", "4").lora_rank == 4
    assert parse("--lora_r", "4", f"--config={tmp_path / 'c.yaml'}").lora_rank == 4


@pytest.mark.parametrize(
    "text",
    [
        "rule: fedavgg\n",
        "quantization: int3\n",
        "max_source_length: 1.5\n",
        "max_source_length: [1, 2]\n",
        "max_lenght: 4\n",
        "fp16: maybe\n",
        "- a list\n",
        "a: b: c\n",
    ],
)
def test_mistakes_in_the_file_are_errors(tmp_path, text):
    with pytest.raises(ConfigError):
        parse_yaml(tmp_path, text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_sorce_length", "4"], "did you mean --max_source_length"),
        (["--max_s", "4"], "unknown option --max_s"),
        (["--rule", "fedavgg"], "did you mean 'fedavg'"),
        (["--lora_rank", "two"], "--lora_rank.*'two'"),
        (["--config", "missing.yaml"], "no such file: missing.yaml"),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_word(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_flowers_run_config_means_the_same_as_yaml(tmp_path):
    """Flower's run config is flat, may have dashes, and knows no lists and no null."""
    flower = {
        "lora-rank": 2,
        "learning-rate": 2e-5,
        "modules": "W_pack o_proj",
        "fp16": True,
        "rule": "trimmed-mean",
    }
    text = (
        "lora_rank: 2\nlearning_rate: 2e-5\nmodules: [W_pack, o_proj]\nfp16: true\n"
        "rule: trimmed-mean\n"
    )
    assert ConfigParser([Arguments]).parse_mapping(flower)[0] == parse_yaml(tmp_path, text)


def test_what_was_said_is_known_by_its_name_whatever_the_spelling_and_the_source(tmp_path):
    (tmp_path / "c.yaml").write_text("rule: fedavg\nmax-source-length: 4\n")
    said = ["--lora_r", "8", "--learning_rate=1e-4", "--config", str(tmp_path / "c.yaml")]
    assert ConfigParser([Arguments]).values(said).keys() == {
        *("lora_rank", "learning_rate", "rule", "max_source_length"),
    }


def test_settings_survive_the_journey_through_flowers_run_config():
    settings = Arguments(
        train_file="my file.json", learning_rate=3e-5, fp16=True, modules=["a", "b"], lora_rank=3
    )
    mapping = to_mapping(settings)
    assert "max_source_length" not in mapping
    assert all(isinstance(value, str | int | float | bool) for value in mapping.values())
    assert ConfigParser([Arguments]).parse_mapping(mapping)[0] == settings


@pytest.mark.parametrize(
    ("value", "allowed"), [("inf", "finite and above 0"), ("nan", "above 0"), ("0", "above 0")]
)
def test_a_number_out_of_range_is_told_what_of_it_is_wrong(value, allowed):
    @dataclass
    class Numbers(Options):
        rate: float = flag(1.0, "rate", above=0)

    with pytest.raises(ConfigError, match=f"--rate must be {allowed}, got {float(value)}"):
        ConfigParser([Numbers]).parse(["--rate", value])
