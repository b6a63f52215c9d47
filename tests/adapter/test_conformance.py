"""A table of models and configurations over the behaviors that PEFT's users rely on."""

import copy
import warnings
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, TaskType, get_peft_model
from peft.utils import hotswap
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations import peft as transformers_peft

from fedfora import ForaConfig

SIZES = {"vocab_size": 80, "pad_token_id": 0}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
            **SIZES,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            n_positions=64,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=1,
            eos_token_id=2,
            **SIZES,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            dropout_rate=0,
            decoder_start_token_id=0,
            **SIZES,
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            num_labels=3,
            **SIZES,
        )
    )


LM, SEQ2SEQ, CLASSIFY = TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.SEQ_CLS
CASES = {
    "llama all-linear": (llama, LM, {}),
    "llama list": (llama, LM, {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "llama regex": (llama, LM, {"target_modules": r".*self_attn\.(q|v)_proj"}),
    "llama excluded": (llama, LM, {"exclude_modules": ["up_proj"], "r": 2}),
    "llama rslora": (llama, LM, {"use_rslora": True, "lora_alpha": 3, "r": 5}),
    "llama inner width": (llama, LM, {"inner_dim": 3, "r": 2}),
    "llama patterns": (llama, LM, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"o_proj": 2}}),
    "llama one block": (llama, LM, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "llama head saved": (llama, LM, {"modules_to_save": ["lm_head"], "r": 2}),
    "llama dropout": (llama, LM, {"lora_dropout": 0.2, "r": 2}),
    "gpt2 all-linear": (gpt2, LM, {"r": 2}),
    "gpt2 list": (gpt2, LM, {"target_modules": ["c_attn"], "r": 4}),
    "t5 list": (t5, SEQ2SEQ, {"target_modules": ["q", "v"], "r": 2}),
    "bert list": (bert, CLASSIFY, {"target_modules": ["query", "value"], "r": 2}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    make, task, options = request.param
    torch.manual_seed(0)
    return make().eval(), ForaConfig(task_type=task, **options)


def inputs(model):
    ids = torch.randint(3, 80, (3, 7), generator=torch.Generator().manual_seed(1))
    kind = model.config.model_type
    if kind == "bert":
        return {"input_ids": ids, "labels": torch.tensor([0, 1, 2])}
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model):
    return model(**inputs(model)).logits


def adapt(base, config, *, randomize=True):
    torch.manual_seed(2)
    model = get_peft_model(base, config).eval()
    if randomize:
        for name, p in model.named_parameters():
            if "fora_" in name:
                nn.init.normal_(p, std=0.1)
    return model


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_changes_nothing(case):
    base, config = case
    before = logits(base)
    assert torch.equal(logits(adapt(base, config, randomize=False)), before)


def test_only_the_adapter_and_saved_modules_train(case):
    base, config = case
    model = adapt(base, config)
    for name, p in model.named_parameters():
        expected = ".fora_" in name or "modules_to_save.default" in name
        assert p.requires_grad == expected, name


def test_merged_is_unmerged_and_comes_apart_again(case):
    base, config = case
    plain, model = logits(base), adapt(base, config)
    before = logits(model)
    assert not torch.allclose(before, plain)
    model.merge_adapter(safe_merge=True)
    close(logits(model), before)
    model.unmerge_adapter()
    close(logits(model), before)
    with model.disable_adapter():
        if not config.modules_to_save:
            close(logits(model), plain)


def test_merge_and_unload_leaves_a_plain_model(case):
    base, config = case
    model = adapt(base, config)
    before = logits(model)
    plain = model.merge_and_unload()
    assert not any("fora" in name for name, _ in plain.named_modules())
    close(logits(plain), before)


def test_a_broken_adapter_is_not_merged(case):
    base, config = case
    model = adapt(base, config)
    next(p for n, p in model.named_parameters() if "fora_D" in n).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_is_loaded_to_the_bit(case, tmp_path, low_cpu_mem_usage):
    base, config = case
    plain = copy.deepcopy(base)
    model = adapt(base, config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again.eval()), logits(model))
    assert (tmp_path / "README.md").is_file()


def test_two_adapters_live_side_by_side(case, tmp_path):
    base, config = case
    model = adapt(base, config)
    first = logits(model)
    other = copy.deepcopy(config)
    other.init_weights = False
    model.add_adapter("other", other)
    model.eval()  # a new adapter's dropout starts in training mode, as LoRA's does
    close(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), second)
    model.load_adapter(tmp_path / "other", "third")
    model.eval()
    model.set_adapter("third")
    assert torch.equal(logits(model), second)


def test_training_lowers_the_loss_and_moves_every_factor(case):
    base, config = case
    frozen = {n: p.clone() for n, p in base.named_parameters()}
    model = adapt(base, config, randomize=False).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert still == []
    for name, p in model.unload().named_parameters():
        if name in frozen and not any(m in name for m in config.modules_to_save or ()):
            assert torch.equal(p, frozen[name]), name


def test_checkpointing_gives_the_same_gradients(case):
    base, config = case
    config.lora_dropout = 0.0
    gradients = []
    for checkpointing in (False, True):
        model = adapt(copy.deepcopy(base), config).train()
        if checkpointing:
            inner = model.base_model.model  # transformers 5.23 renamed the method
            for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
                if hasattr(inner, name):
                    getattr(inner, name)({"use_reentrant": False})
                    break
        model(**inputs(model)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_keeps_its_adapter_in_float32(case, dtype):
    base, config = case
    reference = logits(adapt(copy.deepcopy(base), config))
    model = adapt(base.to(dtype), config)
    assert {p.dtype for n, p in model.named_parameters() if "fora_" in n} == {torch.float32}
    got = logits(model)
    assert got.dtype == dtype
    assert (got.float() - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains(case, dtype):
    base, config = case
    model = adapt(base, config).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**inputs(model)).loss
    loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "fora_" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_each_row_may_have_its_own_adapter(case):
    base, config = case
    if config.modules_to_save:
        pytest.skip("PEFT mixes saved modules by other rules")
    model = adapt(base, config)
    other = copy.deepcopy(config)
    other.init_weights = False
    model.add_adapter("other", other)
    model.eval()
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = logits(model)
    with model.disable_adapter():
        results["__base__"] = logits(model)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**inputs(model), adapter_names=names).logits
    close(mixed, torch.stack([results[name][row] for row, name in enumerate(names)]))


@pytest.mark.parametrize("bias", ["all", "fora_only"])
def test_biases_train_as_asked(bias):
    torch.manual_seed(0)
    model = adapt(llama(), ForaConfig(task_type=LM, target_modules=["q_proj"], bias=bias))
    biases = {n for n, p in model.named_parameters() if n.endswith(".bias") and p.requires_grad}
    assert biases
    assert all(("q_proj" in name) for name in biases) == (bias == "fora_only")


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_generation_with_one_adapter_for_each_row(make, num_beams):
    torch.manual_seed(0)
    base = make().eval()
    task = SEQ2SEQ if make is t5 else LM
    targets = ["q", "v"] if make is t5 else "all-linear"
    model = adapt(base, ForaConfig(task_type=task, target_modules=targets, r=2))
    model.add_adapter("other", ForaConfig(target_modules=targets, r=3, init_weights=False))
    model.eval()
    ids = inputs(model)["input_ids"][:2]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    options["attention_mask"] = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, adapter_names=["other", "default"], **options)
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids, **options)
        width = min(alone.shape[1], mixed.shape[1])
        assert torch.equal(mixed[row, :width], alone[row, :width])


def test_auto_classes_and_transformers_own_adapter_api(tmp_path):
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = ForaConfig(task_type=LM, base_model_name_or_path=str(tmp_path / "base"))
    model = adapt(base, config)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(auto), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), expected)
    asked = getattr(transformers_peft, "MIN_PEFT_VERSION", "0")
    if Version(asked) > Version(version("peft")):  # 5.24 asks for 0.22, which is not out yet
        with pytest.raises(ValueError, match=f"use a version >= {asked}"):
            plain.disable_adapters()
        return
    plain.disable_adapters()
    assert not torch.allclose(logits(plain), expected)
    plain.enable_adapters()
    plain.delete_adapter("default")
    plain.add_adapter(ForaConfig(target_modules=["q_proj"]), "new")
    assert [n for n, p in plain.named_parameters() if ".fora_" in n and p.requires_grad]


def test_other_heads_and_auto_classes(tmp_path):
    for make, task, auto in (
        (t5, SEQ2SEQ, AutoModelForSeq2SeqLM),
        (bert, CLASSIFY, AutoModelForSequenceClassification),
    ):
        torch.manual_seed(0)
        base = make().eval()
        base.save_pretrained(tmp_path / make.__name__)
        targets = ["q"] if make is t5 else ["query"]
        model = adapt(base, ForaConfig(task_type=task, target_modules=targets))
        model.save_pretrained(tmp_path / "adapter")
        plain = auto.from_pretrained(tmp_path / make.__name__)
        again = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.equal(logits(again), logits(model))


def test_hot_swapping_gives_the_other_adapters_function(tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    one = adapt(copy.deepcopy(base), ForaConfig(task_type=LM, r=2))
    one.save_pretrained(tmp_path / "one")
    torch.manual_seed(9)
    two = get_peft_model(copy.deepcopy(base), ForaConfig(task_type=LM, r=2, init_weights=False))
    two.eval().save_pretrained(tmp_path / "two")
    assert not torch.allclose(logits(one), logits(two))
    hotswap.hotswap_adapter(one, str(tmp_path / "two"), "default")
    assert torch.equal(logits(one), logits(two))


def test_an_unsupported_layer_is_refused_before_anything_is_replaced():
    base = llama()
    with pytest.raises(ValueError, match=r"embed_tokens \(Embedding\) is not supported"):
        get_peft_model(base, ForaConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not any("fora" in name for name, _ in base.named_modules())
