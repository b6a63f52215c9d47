"""`import fedfora` is enough, whatever else is imported first, and remote code is never run."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fedfora.models.baichuan.modeling import BaichuanForCausalLM

USE = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING, tokenizer_class_from_name
config = AutoConfig.for_model("baichuan", hidden_size=32, num_attention_heads=2, vocab_size=8,
    intermediate_size=8, num_hidden_layers=1)
assert AutoModelForCausalLM.from_config(config).__module__.startswith("fedfora.")
assert AutoModelForSequenceClassification.from_config(config).__module__.startswith("fedfora.")
assert TOKENIZER_MAPPING[type(config)].__module__.startswith("fedfora.")
assert tokenizer_class_from_name("BaiChuanTokenizer").__module__.startswith("fedfora.")
"""


# Entry points into transformers' circular imports, each of which once came at a bad moment.
@pytest.mark.parametrize(
    "imports",
    [
        "import fedfora; from transformers import AutoModelForCausalLM",
        "import fedfora; from transformers import LlamaForCausalLM",
        "from transformers import AutoTokenizer; import fedfora",
    ],
)
def test_the_order_of_imports_does_not_matter(imports):
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{USE}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_code_beside_a_checkpoint_is_never_run(checkpoint_7b, trust_remote_code):
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    assert AutoConfig.from_pretrained(checkpoint_7b, **options).norm_head is True
    model = AutoModelForCausalLM.from_pretrained(checkpoint_7b, **options)
    assert type(model) is BaichuanForCausalLM
