"""Which bases are refused; an adapter's base is the one it was trained on, and stays so merged."""

import io
import stat
from dataclasses import replace

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedfora.adapter.state import read_state
from fedfora.cli.main import main
from fedfora.data.encoding import PromptFormat, encode_examples, prompt_format_of
from fedfora.data.loading import Example, shared_instruction
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import Deviation, add_adapter, load_base_of
from fedfora.models.fingerprint import describe, fingerprint
from fedfora.models.loading import load_base
from fedfora.models.resolve import model_path, read_record, settings_of_base
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.models.settings import AdapterArguments, ModelArguments

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
TOKENIZER = AutoTokenizer.from_pretrained(model_path("clinic-base"))
ENDS = {"vocab_size": len(TOKENIZER), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LLAMA = tf.LlamaConfig(**SIZES, **HEADS, **ENDS, max_position_embeddings=512)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, **ENDS}
MAKE = {
    "headless": lambda: tf.LlamaModel(LLAMA),
    "classifier": lambda: tf.LlamaForSequenceClassification(LLAMA),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES, **HEADS, **ENDS)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, **HEADS, **ENDS)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SMALL, **HEADS)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, **HEADS, **ENDS, num_key_value_heads=2, num_local_experts=4)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, **ENDS)
    ),
    "tied": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**LLAMA.to_dict() | {"tie_word_embeddings": True})
    ),
    "bfloat16": lambda: tf.LlamaForCausalLM(LLAMA).to(torch.bfloat16),
}


@pytest.fixture
def make(tmp_path):
    """A function that saves a tiny random base of a kind and returns its directory."""

    def save(kind):
        torch.manual_seed(0)
        MAKE[kind]().save_pretrained(tmp_path / kind)
        TOKENIZER.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.fixture
def train(tmp_path, rows_file):
    """A function that trains two steps on a base and returns the adapter's directory."""
    rows = [{"instruction": "Name:", "input": f"{n} mg", "output": f"drug {n}"} for n in range(8)]
    file = rows_file(rows)

    def run(base, *words):
        out = str(tmp_path / "adapter")
        command = f"train --model_name_or_path {base} --train_file {file} --output_dir {out} "
        command += "--max_steps 2 --per_device_train_batch_size 4 --learning_rate 5e-2"
        assert main([*command.split(), "--gradient_accumulation_steps", "1", *words]) == 0
        return out

    return run


@pytest.mark.parametrize(
    ("kind", "quantization", "message"),
    [
        ("headless", "none", "LlamaModel does not hold all weights of LlamaForCausalLM; lm_head"),
        ("classifier", "nf4", "lm_head.weight would be random"),
        ("roberta", "none", "attends to later tokens"),
        ("roberta", "nf4", "attends to later tokens"),
        ("bert", "none", "attends to later tokens"),
        ("falcon", "nf4", "can quantize no layer of a FalconForCausalLM"),
        ("mamba", "nf4", "a MambaForCausalLM does not run with it"),
    ],
)
def test_a_base_that_cannot_be_trained_on_is_refused(kind, quantization, message, make):
    with pytest.raises(ValueError, match=message):
        load_base(ModelArguments(make(kind), quantization=quantization, device="cpu"))


@pytest.mark.parametrize("kind", ["falcon", "mamba", "gpt2", "tied", "mixtral", "bfloat16"])
def test_other_kinds_of_causal_models_load(kind, make):
    load_base(ModelArguments(make(kind), quantization="none", device="cpu"))


def test_a_base_with_an_adapter_in_its_directory_is_refused(tiny_dir, tmp_path, make):
    base = make("tied")
    (tmp_path / "tied" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="also holds an adapter"):
        load_base(ModelArguments(base, quantization="none"))


def test_experts_without_quantization_and_without_adapter_are_named(make, caplog):
    base = load_base(ModelArguments(make("mixtral"), quantization="nf4", device="cpu"))
    add_adapter(base, AdapterArguments(lora_rank=2), seed=0)
    quantized, adapted = (record.message for record in caplog.records)
    assert quantized.startswith("--quantization nf4 leaves 8")
    assert adapted.startswith("no adapter on 8")
    assert all("model.layers.*.mlp.experts" in text for text in (quantized, adapted))


def test_a_token_outside_the_embedding_is_told_by_row_and_a_padding_token_replaced(make, tmp_path):
    make("tied")
    wider = AutoTokenizer.from_pretrained(tmp_path / "tied")
    wider.add_special_tokens({"pad_token": "[NEW]"})
    wider.add_tokens(["zzdrug"])
    wider.save_pretrained(tmp_path / "tied")
    tokenizer = load_base(ModelArguments(str(tmp_path / "tied"), quantization="none")).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    layout = prompt_format_of(DataArguments(template="plain"), tokenizer)
    rows = [Example("", text, "answer", {}) for text in ("fine", "Takes zzdrug.")]
    assert encode_examples(rows[:1], tokenizer, layout)
    with pytest.raises(ValueError, match=r"row 2: token 'zzdrug' has id \d+, the base's emb"):
        encode_examples(rows, tokenizer, layout)


@pytest.mark.parametrize(
    ("kind", "words", "limit"),
    [
        ("gpt2", [], 1e-4),
        ("gpt2", ["--quantization", "int8"], 0.1),
        ("tied", ["--quantization", "none", "--target_modules", "lm_head", "q_proj"], 1e-4),
        ("bfloat16", [], 0.02),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_what_merged_wrote_is_what_was_trained_in_the_bases_own_number_format(
    kind, words, limit, make, train, tmp_path, capsys
):
    base = make(kind)
    adapter = train(base, *words)
    out = tmp_path / "merged"
    assert main(f"export --format merged --model_dir {adapter} --output_dir {out}".split()) == 0
    told = capsys.readouterr().out.split("read back: largest deviation ")[1]
    assert float(told.split(",")[0]) < limit
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "adapter" / "fedfora.json").stat().st_mode)}


def test_an_export_that_is_another_function_leaves_nothing(train, tiny_dir, tmp_path, capsys):
    """Weights that are lost on the way to the disk."""
    adapter = train(tiny_dir)
    save = tf.PreTrainedModel.save_pretrained

    def spoil(self, directory, **options):
        self.model.layers[0].mlp.up_proj.weight.data.mul_(3)
        save(self, directory, **options)

    before = sorted(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.PreTrainedModel, "save_pretrained", spoil)
        words = f"export --format merged --model_dir {adapter} --output_dir {tmp_path / 'm'}"
        assert main(words.split()) == 2
    assert "what was written is not the same function" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_no_number_is_no_small_deviation():
    with pytest.raises(ValueError, match="not the same function"):
        Deviation(float("nan"), 1.0).check("x", 0.1)


def test_an_adapter_on_other_layers_is_no_start_and_the_flag_is_named(train, make):
    base = make("tied")
    adapter = train(base, "--target_modules", "q_proj", "v_proj")
    held = load_base_of(ModelArguments(base), adapter)
    with pytest.raises(ValueError, match="use --target_modules q_proj v_proj"):
        add_adapter(held, AdapterArguments(start_adapter=adapter), seed=0)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"lora_rank": 4}, "its r is 8, here it is 4"),
        ({"lora_alpha": 3}, "its lora_alpha is 16, here it is 3"),
        ({"use_rslora": True}, "its use_rslora is False, here it is True"),
    ],
)
def test_an_adapter_that_is_scaled_otherwise_is_no_start(tiny_dir, tmp_path, ours, message):
    """Its numbers would fit, and say something else."""
    base = load_base(ModelArguments(tiny_dir, "none"))
    model = add_adapter(base, AdapterArguments(), seed=0)
    record = adapter_record(PromptFormat("plain", "", 10, 10), fingerprint(base))
    save_adapter(tmp_path, read_state(model), adapter_config(model), record)
    again = AdapterArguments(start_adapter=str(tmp_path), **ours)
    with pytest.raises(ValueError, match=message):
        add_adapter(load_base(ModelArguments(tiny_dir, "none")), again, seed=0)


def test_an_adapter_of_another_base_or_another_kind_is_no_start(tiny_dir, tmp_path):
    base = load_base(ModelArguments(tiny_dir, "none"))
    model = add_adapter(base, AdapterArguments(), seed=0)
    prompts = PromptFormat("plain", "", 10, 10)
    record = adapter_record(prompts, fingerprint(base), base=describe(base))
    save_adapter(tmp_path, read_state(model), adapter_config(model), record)
    start = AdapterArguments(start_adapter=str(tmp_path))
    again = load_base(ModelArguments(tiny_dir, "none"))
    again.model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="is not the base that"):
        add_adapter(again, start, seed=0)
    again.model.lm_head.weight.data[0, 0] -= 1
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"FORA"', '"LORA"'))
    with pytest.raises(ValueError, match="expected a FORA adapter, this one is LORA"):
        add_adapter(again, start, seed=0)


def test_every_command_holds_the_base_as_in_training(train, make, capsys, caplog, monkeypatch):
    """Trained without quantization: nf4, the default, would be another model."""
    base = make("tied")
    adapter = train(base, "--quantization", "none", "--torch_dtype", "bfloat16")
    record = read_record(adapter)
    assert record["instruction"] == "Name:"
    settings = settings_of_base(ModelArguments(), adapter, given=())
    held = (settings.model_name_or_path, settings.quantization, settings.torch_dtype)
    assert held == (base, "none", "bfloat16")
    said = settings_of_base(ModelArguments(quantization="int8"), adapter, given={"quantization"})
    assert said.quantization == "int8"
    automatic = settings_of_base(ModelArguments(), adapter, given={"torch_dtype"})
    assert automatic.torch_dtype == "bfloat16"  # as a Python call hands every option on
    load_base_of(settings, adapter)
    monkeypatch.setattr("sys.stdin", io.StringIO("40 mg\n"))
    assert main(f"chat --adapter {adapter} --max_new_tokens 2".split()) == 0
    assert 'instruction, as in training: "Name:"' in capsys.readouterr().err
    assert not caplog.records
    load_base_of(replace(settings, torch_dtype="float32"), adapter)
    assert "trained on its base in none, bfloat16; here it is in none, float32" in caplog.text


def test_every_command_refuses_another_base_of_the_same_name(
    train, make, tmp_path, capsys, monkeypatch
):
    adapter = train(make("tied"))
    torch.manual_seed(5)
    MAKE["tied"]().save_pretrained(tmp_path / "tied")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.stdin", io.StringIO("40 mg\n"))
    for words in (
        f"export --format merged --output_dir {out} --model_dir {adapter}",
        f"export --format lora --output_dir {out} --model_dir {adapter}",
        f"chat --adapter {adapter}",
        f"audit --run {adapter} --held_out_file {tmp_path}/rows.json",
    ):
        assert main(words.split()) == 2
        assert "is not the base that" in capsys.readouterr().err
    assert not out.exists()


def test_lora_needs_no_tokenizer(train, make, tmp_path):
    adapter = train(make("tied"))
    for path in (tmp_path / "tied").glob("*token*"):
        path.unlink()
    assert main(f"export --model_dir {adapter} --output_dir {tmp_path / 'lora'}".split()) == 0


def test_an_instruction_is_shared_only_if_all_rows_have_it():
    one, other, none = (Example(text, "x", "y", {}) for text in ("A:", "B:", ""))
    assert shared_instruction([one, one]) == "A:"
    assert shared_instruction([one, other]) is None
    assert shared_instruction([none, none]) is None
