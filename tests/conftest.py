"""A tiny base model, one thread per process, and the tests that CI may skip."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedfora.models.resolve import model_path

torch.set_num_threads(1)
# No law depends on how busy the machine is.
hypothesis_settings.register_profile(
    "any load", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("any load")

pytest_plugins = ["baichuan_tokenizer"]


# How the reasons begin for which CI may skip a test. `make test-all` runs most of these: its last
# run stands in docs/log.md. The others need files that are not public.
MAY_BE_SKIPPED = (
    "FATE",
    "PEFT mixes saved modules by other rules",
    "hqq is not installed",
    "needs DeepSpeed",
    "needs Debian's rabbitmq-server",
    "needs MLflow",
    "needs llama.cpp",
    "needs pip install trackio",
    "needs pip install wandb",
    "needs root",
    "needs slurmctld",
    "needs squid",
    "nginx is not installed",  # .ci/run installs it where it can, and Chromium
    "no Chromium here",
    "no published checkpoint here",
    "spo_train.json is not here",
    "the published code's outputs are not here",
    "torchao is not installed",
)


def unexpected_skips(config):
    """The reasons of skipped tests that are not in the list."""
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reports}
    return sorted(reason for reason in reasons if not reason.startswith(MAY_BE_SKIPPED))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """In CI, a test that is skipped for a new reason fails the run."""
    here = not hasattr(session.config, "workerinput") and os.environ.get("CI") == "true"
    if here and exitstatus == 0 and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for reason in unexpected_skips(config) if os.environ.get("CI") == "true" else ():
        terminalreporter.line(f"not in MAY_BE_SKIPPED of tests/conftest.py: {reason}", red=True)


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


@pytest.fixture(autouse=True)
def ledgers(tmp_path_factory, monkeypatch):
    """Where the ledgers of spent privacy lie: not in a real home, and anew for every test."""
    directory = tmp_path_factory.mktemp("ledgers")
    monkeypatch.setenv("FEDFORA_PRIVACY_DIR", str(directory))
    return directory


@pytest.fixture
def rows_file(tmp_path):
    """A function that writes rows as JSON lines and returns the path."""

    def write(rows, name="rows.json"):
        import json

        path = tmp_path / name
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
        return str(path)

    return write
