"""A site with a Trainer of its own: the same federation around it, whoever computes the loss."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from transformers import Trainer as PlainTrainer

import fedfora
from fedfora import ForaConfig
from fedfora.data.clinic import clinic_rows
from fedfora.data.encoding import PromptFormat, encode_examples
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.data.sources import held_rows
from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import load_base
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.training.arguments import trainer_arguments
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments
from fedfora.training.trainer import AdapterTrainer

SITES = 3
TRAIN = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
FEDERATION = {"num_rounds": 2, "local_steps": 2}
ROWS = [{**row, "site": f"site-{i % SITES}"} for i, row in enumerate(clinic_rows()[:24])]


def weights(run):
    return load_file(run.directory / "adapter_model.safetensors")


def distance(one, other):
    """The largest difference of what began at 0, relative to the largest number."""
    assert one.keys() == other.keys()
    names = [name for name in one if ".fora_D." in name]
    scale = max(one[name].abs().max() for name in names)
    return float(max((one[name] - other[name]).abs().max() for name in names) / scale)


@pytest.fixture(scope="module")
def encoded(tiny_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    with held_rows("train_file", ROWS) as name:
        examples = load_examples(name, DataArguments())
    data = DataArguments()
    form = PromptFormat("plain", "", data.max_source_length, data.max_target_length)
    rows = encode_examples(examples, tokenizer, form)
    return [rows[site::SITES] for site in range(SITES)]


@pytest.fixture
def builtin(tiny_dir, tmp_path):
    """The same federation with fedfora's own training."""

    def run(**options):
        return fedfora.simulate(
            model=tiny_dir,
            quantization="none",
            template="plain",
            train_file=ROWS,
            partition="by-column:site",
            output_dir=tmp_path / "builtin",
            lora_rank=2,
            **{**TRAIN, **FEDERATION, **options},
        )

    return run


@pytest.fixture
def own(tiny_dir, tmp_path, encoded):
    """A federation of own Trainers, each with a base of its own; `make` gives a site's Trainer."""

    def run(make=plain, name="own", adapter=None, dropout=0.0, **options):
        def factory(site):
            base = load_base(ModelArguments(tiny_dir, quantization="none"))
            if adapter is None:
                arguments = AdapterArguments(lora_rank=2, lora_dropout=dropout)
                model = add_adapter(base, arguments, seed=42)
            else:
                model = get_peft_model(base.model, adapter)
            return make(model, base.tokenizer, encoded[site], tmp_path / name / "trainer")

        place = {"output_dir": tmp_path / name} if "resume" not in options else {}
        return fedfora.simulate(
            trainer_factory=factory,
            **{"num_clients": SITES, "template": "plain", **place, **FEDERATION, **options},
        )

    return run


def plain(model, tokenizer, rows, place, **options):
    args = {**TRAIN, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "optim": "adamw_torch"}
    return PlainTrainer(
        model,
        TrainingArguments(str(place), report_to="none", use_cpu=True, **{**args, **options}),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_built_in_trainer_handed_in_gives_the_bits_of_simulate(own, builtin, dropout):
    """What is between federation and Trainer changes nothing: seeds, schedule, rows, steps."""

    def make(model, tokenizer, rows, place):
        settings, whole = TrainArguments(**TRAIN), StepWindow(0, 1, 1)
        return AdapterTrainer(
            model=model,
            args=trainer_arguments(settings, whole, seed=1, device="cpu", output_dir=str(place)),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            processing_class=tokenizer,
            settings=settings,
            stretch=StepWindow(0, 4, 4),
            on_step=lambda report: None,
            run=None,
            privacy=None,
        )

    ours, theirs = builtin(lora_dropout=dropout), own(make, dropout=dropout)
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name, lines in ours.sites.items():
        for one, other in zip(lines, theirs.sites[name], strict=True):
            left_out = ("seconds", "data_digest")
            assert {k: v for k, v in one.items() if k not in left_out} == {
                k: v for k, v in other.items() if k not in left_out
            }


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_plain_trainer_gives_what_simulate_gives(own, builtin, optim):
    """transformers' own loss adds the same numbers up in another order."""
    ours = builtin(optim=optim)
    theirs = own(lambda *given: plain(*given, optim=optim))
    print(optim, distance(weights(ours), weights(theirs)))
    assert distance(weights(ours), weights(theirs)) < 1e-4
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["uplink_bytes"] == other["uplink_bytes"]


def test_a_lora_adapter_federates_as_fora_with_a_core_that_is_i(own):
    """Two factors travel, their mean is PEFT's own, and what is saved computes the same."""
    made = []

    def make(*given):
        made.append(plain(*given))
        return made[-1]

    run = own(make, adapter=LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM"), num_rounds=1)
    saved = weights(run)
    assert not any(saved[name].any() for name in saved if "fora_B" in name or "fora_E" in name)
    tokens = [line[0]["answer_tokens"] for line in run.sites.values()]
    means = {}
    for trainer, weight in zip(made, tokens, strict=True):
        for name, value in trainer.model.state_dict().items():
            if ".lora_" in name:
                means[name] = means.get(name, 0) + weight / sum(tokens) * value.double()
    assert means
    for name, value in means.items():
        there = name.replace(".lora_A.default", ".fora_A").replace(".lora_B.default", ".fora_D")
        torch.testing.assert_close(saved[there].double(), value, rtol=1e-5, atol=1e-7)
    lora = run.export().directory
    model = made[0].model
    model.load_adapter(str(lora), "federated")
    model.set_adapter("federated")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, run.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    numbers = sum(v.numel() for name, v in saved.items() if "fora_A" in name or "fora_D" in name)
    assert 0 <= run.history[0]["uplink_bytes"] / SITES - 4 * numbers <= 128  # an array's head


LORA = LoraConfig(r=2, task_type="CAUSAL_LM")


class StopsOnce(TrainerCallback):
    """Stops the program when its training begins for the second time."""

    begun = 0

    def on_train_begin(self, *_, **__):
        StopsOnce.begun += 1
        if StopsOnce.begun == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("adapter", [None, LORA], ids=["FoRA", "LoRA"])
def test_stopped_and_resumed_is_uninterrupted(own, adapter):
    """A Trainer keeps nothing from round to round that a new process would not have."""
    whole = own(name="whole", adapter=adapter)
    stops = iter([False, True, False])

    def make(*given):
        trainer = plain(*given)
        if next(stops):
            trainer.add_callback(StopsOnce())
        return trainer

    StopsOnce.begun = 0
    with pytest.raises(KeyboardInterrupt):
        own(make, name="stopped", adapter=adapter)
    place = whole.directory.parent / "stopped"
    resumed = own(resume=place, adapter=adapter)
    assert [line["round"] for line in resumed.history] == [1, 2]
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"began with --learning_rate 0\.01, not 0\.5"):
        own(lambda *given: plain(*given, learning_rate=0.5), resume=place, adapter=adapter)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["FoRA", "LoRA"])
def test_secure_aggregation_gives_the_sum_of_the_same_updates(own, adapter):
    plainly = own(name="plain", adapter=adapter, num_rounds=1)
    secure = own(name="secure", adapter=adapter, num_rounds=1, secure_aggregation=True)
    assert distance(weights(plainly), weights(secure)) < 1e-3
    assert secure.history[0]["secure_aggregation"]


def test_sites_are_hidden_with_noise_on_what_travels(own, tmp_path):
    private = {"privacy_unit": "site", "noise_multiplier": 0.5, "privacy_dir": tmp_path / "ledger"}
    run = own(adapter=LORA, **private)
    assert all("privacy_statement" in line for line in run.history)
    assert all(
        set(entry) <= {"site", "uplink_bytes", "downlink_bytes", "steps"}
        for line in run.history
        for entry in line["sites"]
    )
    assert list((tmp_path / "ledger").glob("*"))
    saved = weights(run)
    assert not any(saved[name].any() for name in saved if "fora_E" in name)


def test_a_wild_trainer_is_screened_out(own):
    wild = iter([{}, {}, {"learning_rate": 1e3, "optim": "sgd", "max_grad_norm": 0.0}])
    run = own(lambda *given: plain(*given, **next(wild)), num_rounds=1)
    assert [each["site"] for each in run.history[0]["rejected"]] == ["site-2"]


def test_fedprox_pulls_a_foreign_trainer_too(own):
    free, held = own(name="free"), own(name="held", proximal_mu=100.0)
    assert distance(weights(free), weights(held)) > 1e-2


def test_trainers_may_share_a_model_and_are_left_as_they_were(own, tiny_dir, encoded, tmp_path):
    apart = own(name="apart")
    base = load_base(ModelArguments(tiny_dir, quantization="none"))
    model = add_adapter(base, AdapterArguments(lora_rank=2), seed=42)
    trainers = [
        plain(model, base.tokenizer, encoded[site], tmp_path / f"t{site}", data_seed=7)
        for site in range(SITES)
    ]
    args = [each.args for each in trainers]
    before = [dict(vars(each)) for each in args]
    together = fedfora.simulate(
        trainer_factory=trainers.__getitem__,
        num_clients=SITES,
        template="plain",
        output_dir=tmp_path / "together",
        **FEDERATION,
    )
    one, other = weights(apart), weights(together)
    assert all(torch.equal(one[name], other[name]) for name in one)
    for trainer, settings, values in zip(trainers, args, before, strict=True):
        assert trainer.args is settings
        assert vars(settings) == values
        assert trainer.optimizer is None
        assert "training_step" not in vars(trainer)
        assert trainer.accelerator.dataloader_config.data_seed == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"privacy_unit": "record", "target_epsilon": 3}, "--privacy_unit record .* the loss"),
        ({"validation_fraction": 0.2}, "--validation_fraction: not with a Trainer"),
        ({"learning_rate": 1.0}, "--learning_rate: with trainer_factory"),
        ({"lora_rank": 2}, "--lora_rank: with trainer_factory"),
        ({"train_file": "clinic"}, "--train_file: with trainer_factory"),
        ({"model": "clinic-base"}, "--model_name_or_path: with trainer_factory"),
        ({"num_clients": None}, "--num_clients is missing"),
        ({"test_file": "clinic:test", "compare": ["alone"]}, "--compare: not with"),
        ({"clients_per_round": 4}, "only 3 sites"),
        ({"adapter": LORA, "aggregation": "core"}, "only FoRA.s core, and LoRA has none"),
        ({"aggregation": "core"}, 'needs ForaConfig\\(init_weights="svd"\\)'),
        ({"adapter": LoraConfig(r=2, use_dora=True)}, "use_dora=True"),
        ({"adapter": LoraConfig(r=2, modules_to_save=["lm_head"])}, "modules_to_save"),
        ({"adapter": ForaConfig(r=2, rank_pattern={"q_proj": 4})}, "rank_pattern"),
        ({"adapter": LoraConfig(r=2, bias="lora_only")}, "bias='lora_only'"),
        ({"adapter": LoraConfig(r=2, init_lora_weights="pissa")}, "'pissa'"),
        ({"adapter": LoraConfig(r=2, trainable_token_indices=[1])}, "trainable_token_indices"),
        ({"adapter": LoraConfig(r=2, target_parameters=["lm_head.weight"])}, "target_parameters"),
        ({"site_ranks": "1 2 2"}, "--site_ranks"),
        ({"num_cliens": 3}, "did you mean .*num_clients"),
    ],
)
def test_what_a_federation_cannot_do_with_a_trainer_is_refused_by_name(
    own, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        own(**options)
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: "Trainer", "is a str, not a transformers.Trainer"),
        (lambda own: own.create_optimizer(), "optimizer; name it in the TrainingArguments"),
        (lambda own: vars(own).update(model=own.model.base_model.model), "a LoRA or FoRA adapter"),
        (lambda own: vars(own).update(processing_class=None), "processing_class"),
        (lambda own: vars(own).update(train_dataset=iter([])), "no rows that can be counted"),
    ],
    ids=["no Trainer", "optimizer", "no adapter", "tokenizer", "length"],
)
def test_a_trainer_that_cannot_take_part_is_refused(own, tmp_path, spoil, message):
    def make(*given):
        trainer = plain(*given)
        spoiled = spoil(trainer)
        return spoiled if isinstance(spoiled, str) else trainer

    with pytest.raises(ValueError, match=message):
        own(make)
    assert not list(tmp_path.rglob("config.yaml"))


def test_what_the_runs_settings_say_of_a_training_changes_no_trainer_and_is_logged(own, caplog):
    rates = iter([1e-2, 0.0, 0.0])
    trainers = []

    def make(*given):
        trainers.append(plain(*given, learning_rate=next(rates), logging_steps=1))
        return trainers[-1]

    own(make, num_rounds=2)
    assert "learning_rate of the run is 0.01; the Trainer's, 0.0, applies" in caplog.text
    seen = [
        [line["learning_rate"] for line in t.state.log_history if "learning_rate" in line]
        for t in trainers
    ]
    assert seen
    assert max(seen[0]) > 0 == max(seen[1]), seen


def test_sites_with_other_adapters_are_refused(own):
    ranks = iter([2, 4])

    def make(model, tokenizer, *given):
        model = get_peft_model(model.unload(), ForaConfig(r=next(ranks)))
        return plain(model, tokenizer, *given)

    with pytest.raises(ValueError, match=r"trainer_factory\(1\): lora_rank is 4, the run's is 2"):
        own(make, num_clients=2)
