"""Tiny Baichuan checkpoints as they are published: raw output rows, nothing said of positions."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedfora.models.baichuan.configuration import BaichuanConfig
from fedfora.models.baichuan.modeling import BaichuanForCausalLM

# What the published files have in common; sizes that NF4 can take.
COMMON = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "model_max_length": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "norm_head": True,  # published files do not say it; a vocabulary of 96 would not tell
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
}
SIZES = {
    "7b": {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128},
    "13b": {  # six heads, because ALiBi's slopes are another series where it is no power of two
        "hidden_size": 192,
        "num_attention_heads": 6,
        "gradient_checkpointing": [False],
    },
}


def published_config(size, **changes):
    return COMMON | SIZES[size] | changes


def raw_weights(config):
    """Random weights, large enough that positions and the head's normalization matter."""
    torch.manual_seed(0)
    model = BaichuanForCausalLM(BaichuanConfig(**config))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.lm_head.weight.data *= torch.rand(config["vocab_size"], 1) * 5 + 0.5
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def publish():
    """A function that writes a checkpoint into a directory and returns its path."""

    def write(directory, size, *, more_weights=None, **changes):
        config = published_config(size, **changes)
        (directory / "config.json").write_text(json.dumps(config))
        weights = raw_weights(config) | (more_weights or {})
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        for name in ("configuration_baichuan.py", "modeling_baichuan.py"):
            (directory / name).write_text("raise SystemExit('remote code was run')\n")
        return str(directory)

    return write


@pytest.fixture(scope="session", params=["7b", "13b"])
def size(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint(size, publish, tmp_path_factory):
    return publish(tmp_path_factory.mktemp(size), size)


@pytest.fixture(scope="session")
def checkpoint_7b(publish, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("only-7b"), "7b")


@pytest.fixture
def config_7b():
    return BaichuanConfig(**published_config("7b"))


@pytest.fixture
def ids():
    return torch.randint(3, 96, (3, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def left():
    """An attention mask: the second row begins with 8 tokens of padding, the third with 15."""
    return (torch.arange(21) >= torch.tensor([[0], [8], [15]])).long()
