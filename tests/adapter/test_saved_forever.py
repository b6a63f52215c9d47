"""An adapter saved by format version 1 loads with the same outputs, for ever."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedfora.exporting.lora import to_lora

DIRECTORY = Path(__file__).parents[1] / "fixtures" / "adapter_v1"  # made by make_adapter_v1.py


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(3, 8)).logits


def test_version_1_loads_with_its_outputs():
    expected = load_file(DIRECTORY / "expected.safetensors")
    base = AutoModelForCausalLM.from_pretrained(DIRECTORY / "base")
    torch.testing.assert_close(logits(base), expected["base"], rtol=1e-5, atol=1e-6)
    model = PeftModel.from_pretrained(base, DIRECTORY / "adapter")
    torch.testing.assert_close(logits(model), expected["adapted"], rtol=1e-5, atol=1e-5)
    assert (expected["adapted"] - expected["base"]).norm() > 0.5 * expected["base"].norm()


def test_version_1_exports_to_lora(tmp_path):
    expected = load_file(DIRECTORY / "expected.safetensors")
    to_lora(DIRECTORY / "adapter", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(DIRECTORY / "base")
    lora = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(lora), expected["adapted"], rtol=1e-5, atol=1e-5)
