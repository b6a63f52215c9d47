"""What other libraries do with adapters: TRL's reference copy and trainers, torch.compile."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedfora import ForaConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and dynamo warn of their own affairs


@pytest.fixture
def model(tiny_dir):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = get_peft_model(base, ForaConfig(r=2, task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "fora_" in name:
            nn.init.normal_(p, std=0.1)
    return model


def factors(model, adapter):
    return {
        name.replace(f".{adapter}.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if ".fora_" in name and f".{adapter}." in name
    }


def test_dpo_copies_the_adapter_as_its_reference(model, tiny_dir, tmp_path):
    """A reference that is not a copy would make DPO push against random weights, silently."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "List", "chosen": " a_b_c", "rejected": " x"}] * 4)
    trained = factors(model, "default")
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            gradient_checkpointing=False,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_dir),
    )
    reference = factors(trainer.model, "ref")
    assert reference.keys() == trained.keys()
    assert all(torch.equal(reference[name], trained[name]) for name in trained)
    trainer.train()
    after = factors(trainer.model, "ref")
    assert all(torch.equal(after[name], trained[name]) for name in trained)
    moved = factors(trainer.model, "default")
    assert not all(torch.equal(moved[name], trained[name]) for name in trained)


def test_trls_sft_trainer_trains_it(model, tiny_dir, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    before = factors(model, "default")
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": "List", "completion": " a_b_c"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tiny_dir),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert float(losses[-1]) < float(losses[0])
    after = factors(trainer.model, "default")
    assert not any(torch.equal(after[name], p) for name, p in before.items())


def test_compiled_is_eager_forwards_and_backwards(model):
    """One graph without breaks (aot_eager: what the compilers get, without compiling C++)."""
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(3))
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = compiled(input_ids=ids, labels=ids).loss
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, eager[name], rtol=1e-4, atol=1e-6)
