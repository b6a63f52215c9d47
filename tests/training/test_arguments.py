import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fedfora import ForaConfig
from fedfora.training.arguments import loraplus_groups


def model_of(tiny_dir, **options):
    base = AutoModelForCausalLM.from_pretrained(tiny_dir)
    return get_peft_model(base, ForaConfig(r=2, task_type="CAUSAL_LM", **options))


def test_d_learns_faster_and_every_parameter_is_in_one_group(tiny_dir):
    model = model_of(tiny_dir)
    slow, fast = loraplus_groups(model, learning_rate=1e-3, ratio=16)
    assert (slow["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(".fora_D." in names[id(p)] for p in fast["params"])
    together = [id(p) for group in (slow, fast) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_training_with_it_moves_d_further(tiny_dir):
    """One SGD step: D moves `ratio` times as far, the others as far as without."""
    import torch
    from transformers import AutoTokenizer

    from fedfora.adapter.state import read_state, write_state
    from fedfora.training.local import train_locally
    from fedfora.training.schedule import StepWindow
    from fedfora.training.settings import TrainArguments

    model, tokenizer = (
        model_of(tiny_dir, init_weights=False),
        AutoTokenizer.from_pretrained(tiny_dir),
    )
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}] * 4
    start, moved = read_state(model), {}
    for ratio in (1.0, 4.0):
        write_state(model, start)
        settings = TrainArguments(
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            loraplus_lr_ratio=ratio,
        )
        train_locally(model, tokenizer, rows, settings, stretch=StepWindow(0, 1, 1), seed=1)
        moved[ratio] = {name: w - start[name] for name, w in read_state(model).items()}
    for name, usual in moved[1.0].items():
        factor = 4 if name.endswith(".D") else 1
        torch.testing.assert_close(moved[4.0][name], factor * usual, rtol=1e-3, atol=1e-6)


def test_what_has_no_effect_is_refused(tiny_dir):
    with pytest.raises(ValueError, match=r"at least 1, got 0\.5"):
        loraplus_groups(model_of(tiny_dir), learning_rate=1e-3, ratio=0.5)
    with pytest.raises(ValueError, match="none is trained here"):
        loraplus_groups(model_of(tiny_dir, trainable="core"), learning_rate=1e-3, ratio=2)
