"""FoRA on layers of other quantizers than bitsandbytes, where they run on a CPU.

GPTQ, AWQ, AQLM, EETQ, INC and TransformerEngine go the same way through PEFT's quantization
backends, forward only; they need a GPU or compiled kernels and are not tested here.
"""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedfora import ForaConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers warn of missing CUDA kernels


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.up = layer

    def forward(self, x):
        return self.up(x)


def assert_trains_and_merges(model, call, backend):
    layers = [m for m in model.modules() if type(m).__name__ == "ForaLinear"]
    assert layers
    assert {layer.quantization_backend.backend_name for layer in layers} == {backend}
    call(model).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".fora_" in n)
    model.eval()
    with torch.no_grad():
        before = call(model)
        model.merge_adapter(safe_merge=True)
        merged = call(model)
    assert (merged - before).norm() < 0.2 * before.norm()
    assert all(layer.merged for layer in layers)


def test_torchao_int8_weights(tiny_dir):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_dir, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    model = get_peft_model(base, ForaConfig(r=2, init_weights=False, task_type="CAUSAL_LM"))
    ids = torch.randint(0, 500, (2, 9))
    assert_trains_and_merges(model, lambda m: m(input_ids=ids).logits, "torchao")


def test_hqq_four_bits():
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    torch.manual_seed(0)
    layer = quantize.HQQLinear(
        nn.Linear(64, 64),
        quantize.BaseQuantizeConfig(nbits=4, group_size=64),
        compute_dtype=torch.float32,
        device="cpu",
    )
    model = get_peft_model(
        OneLayer(layer), ForaConfig(r=2, init_weights=False, target_modules=["up"])
    )
    x = torch.randn(5, 64)
    assert_trains_and_merges(model, lambda m: m(x), "hqq")
