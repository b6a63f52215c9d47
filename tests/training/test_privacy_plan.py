"""Record privacy as the user types it: what is spent, said and refused."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedfora.adapter.state import fold
from fedfora.cli.main import main
from fedfora.federated.coordinator.rounds import _Rounds
from fedfora.federated.settings import from_run_config
from fedfora.federated.simulation import read_rounds, simulate
from fedfora.federated.site_runtime import SiteRuntime
from fedfora.models.saving import read_adapter
from fedfora.privacy.accounting import Release, epsilon_of
from fedfora.reporting.view import View


@pytest.fixture
def words(tiny_dir, rows_file):
    from fedfora.data.clinic import clinic_rows

    rows = rows_file(clinic_rows()[:24])
    return (
        f"train --model_name_or_path {tiny_dir} --quantization none --train_file {rows} "
        "--lora_rank 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        "--max_steps 3 --output_dir"
    ).split()


def private(words, out, *more):
    return main([*words, str(out), "--privacy_unit", "record", *map(str, more)])


def ledger(ledgers):
    (path,) = ledgers.glob("rows-*.json")
    return json.loads(path.read_text())


def releases(ledgers):
    return [
        Release(line["sampling_rate"], line["noise_multiplier"], line["count"])
        for line in ledger(ledgers)["releases"]
    ]


@contextmanager
def counted(*, dies_at=None):
    """Note every step that is taken; at one of them the power goes."""
    from fedfora.training.dp_sgd import PrivateSteps

    step, taken = PrivateSteps.step, []

    def noting(self, trainer, model, inputs):
        if len(taken) + 1 == dies_at:
            raise RuntimeError("the power went")
        privacy = self.privacy
        taken.append(Release(privacy.sampling_rate, privacy.noise_multiplier, 1))
        return step(self, trainer, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSteps, "step", noting)
        yield taken


def test_a_training_spends_its_budget_and_says_so(words, tmp_path, ledgers):
    out = tmp_path / "out"
    assert private(words, out, "--target_epsilon", 2) == 0
    spent = ledger(ledgers)
    (release,) = spent["releases"]
    assert (release["sampling_rate"], release["count"]) == (4 / 24, 3)
    assert release["run"] == str(out)
    assert release["settings"] == {"first_step": 0, "clipping_norm": 1.0, "rows": 24}
    assert 1.9 < spent["epsilon"] <= 2
    assert spent["epsilon"] == epsilon_of(releases(ledgers), 1e-5)
    card = (out / "README.md").read_text()
    stored = json.loads((out / "fedfora.json").read_text())["privacy"]
    assert stored in card
    for word in ("24 training records", "3 steps", "clipped to 1", "assumed", "empty one", "other"):
        assert word in stored
    assert "rows_fingerprint" not in json.loads((out / "fedfora.json").read_text())


def test_a_second_training_on_the_same_rows_is_refused_wherever_it_goes(words, tmp_path, capsys):
    """Trials count: the rows are the same, in whatever order and for whatever directory."""
    out, other = tmp_path / "out", tmp_path / "other"
    assert private(words, out, "--target_epsilon", 2) == 0
    rows = Path(words[words.index("--train_file") + 1])
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedfora.training.run.load_base", None)  # it would be an error to call it
        assert private(words, other, "--target_epsilon", 2) == 2
    assert "privacy budget does not allow" in (said := capsys.readouterr().err)
    assert str(out) in said
    assert not other.exists()
    assert private(words, other, "--target_epsilon", 8) == 0
    assert "6 steps in 2 runs (out, other)" in (other / "README.md").read_text()


def test_a_training_that_was_killed_resumes_and_pays_for_what_it_repeats(words, tmp_path, ledgers):
    """Each stretch between two checkpoints is entered as it begins; the budget holds."""
    out = tmp_path / "out"
    more = ("--target_epsilon", 2, "--save_steps", 1)
    with counted(dies_at=2) as before, pytest.raises(RuntimeError, match="power"):
        private(words, out, *more)
    assert sum(release.count for release in releases(ledgers)) == 2
    with counted() as after:
        assert private(words, out, *more, "--resume_from_checkpoint", "last") == 0
    assert (len(before), len(after)) == (1, 2)
    spent = ledger(ledgers)["epsilon"]
    assert epsilon_of([*before, *after], 1e-5) <= spent <= 2
    assert after[0].noise_multiplier > before[0].noise_multiplier


def test_a_resumed_training_is_asked_for_what_is_left_of_it_alone(words, tmp_path, ledgers):
    """Its third step dies, paid for; the budget is for four, so it can be taken once more."""
    out, rate = tmp_path / "out", 4 / 24
    budget = epsilon_of([Release(rate, 1.0, 4)], 1e-5) + 1e-3
    assert epsilon_of([Release(rate, 1.0, 5)], 1e-5) > budget
    more = ("--noise_multiplier", 1, "--target_epsilon", budget, "--save_steps", 1)
    with counted(dies_at=3), pytest.raises(RuntimeError, match="power"):
        private(words, out, *more)
    for steps in (1, 0):  # then it is finished, and has nothing left to pay
        with counted() as after:
            assert private(words, out, *more, "--resume_from_checkpoint", "last") == 0
        assert len(after) == steps
        assert sum(release.count for release in releases(ledgers)) == 4


def test_a_broken_off_training_gives_no_steps_for_nothing(words, tmp_path, ledgers, capsys):
    """With other noise and more steps on the same rows: what is done is what is entered."""
    out = tmp_path / "out"
    with counted(dies_at=3), pytest.raises(RuntimeError, match="power"):
        private(words, out, "--target_epsilon", 1, "--save_steps", 1)
    again = [*words[:-3], "--max_steps", "5", "--output_dir"]
    again_flags = ("--noise_multiplier", 0.3, "--overwrite_output_dir", "true")
    assert private(again, out, *again_flags, "--target_epsilon", 1) == 2
    assert "budget does not allow" in capsys.readouterr().err
    with counted() as taken:
        assert private(again, out, *again_flags) == 0
    assert ledger(ledgers)["epsilon"] >= epsilon_of(taken, 1e-5) > 10


def test_a_private_training_shows_no_step_and_no_digest_outside_local(words, tmp_path):
    """Whoever gets the run directory without `local` learns no loss, count or digest."""
    from fedfora.reporting.history import read_lines

    out = tmp_path / "out"
    assert private(words, out, "--noise_multiplier", 1, "--logging_steps", 1) == 0
    for line in read_lines(out / "metrics.jsonl"):
        assert not line.keys() & {"loss", "answer_tokens", "rows_fingerprint"}
        assert not line.get("tokens")
    outside = [
        path
        for path in out.rglob("*")
        if path.is_file() and "local" not in path.relative_to(out).parts
    ]
    local = [line for line in read_lines(out / "local" / "metrics.jsonl") if "loss" in line]
    assert len(local) == 4
    (progress,) = out.glob("local/checkpoint-*/progress.json")
    digest = json.loads(progress.read_text())["identity"]["rows_fingerprint"]
    for path in outside:
        content = path.read_bytes().decode("utf-8", "ignore")
        assert digest not in content
        assert not any(f'"loss": {line["loss"]}' in content for line in local)
    assert {path.name for path in outside} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "card.json"),
        *("config.yaml", "environment.json", "fedfora.json", "metrics.jsonl", "report.html"),
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target_epsilon", 0), "--target_epsilon must be above 0"),
        ((), "--privacy_unit record needs --target_epsilon or --noise_multiplier"),
        (("--noise_multiplier", 1, "--target_delta", 0.5), "--target_delta 0.5 is not below"),
        (("--noise_multiplier", 1, "--clipping_norm", "inf"), "bounds nothing"),
        (("--noise_multiplier", -1), "--noise_multiplier must be at least 0"),
        (("--noise_multiplier", 1, "--fp16", "true"), "--bf16"),
        (("--noise_multiplier", 1, "--quantization", "int8"), "int8 rounds rows by their batch"),
        (("--noise_multiplier", 1, "--privacy_unit", "site"), "train has one"),
        (("--noise_multiplier", 1, "--privacy_unit", "none"), "need --privacy_unit record or site"),
        (("--sampling_rate", 0.5, "--privacy_unit", "none"), "needs --privacy_unit record"),
        (("--noise_multiplier", 1, "--shared_noise", "true"), "--shared_noise is for several"),
        (("--noise_multiplier", 1, "--packing", "true"), "decides which rows meet in a batch"),
        (("--noise_multiplier", 1, "--validation_file", "clinic:test"), "have no noise"),
        (("--noise_multiplier", 1, "--sampling_rate", 0.5), "both say how large a sample is"),
        (("--noise_multiplier", 1, "--start_adapter", "nowhere"), "--start_adapter nowhere"),
        (("--noise_multiplier", 1, "--report_to", "wandb"), "--report_to wandb sends losses"),
    ],
)
def test_what_gives_no_privacy_is_refused_before_a_step(words, tmp_path, capsys, flags, message):
    assert private(words, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.fixture
def federate(tiny_dir, rows_file, tmp_path):
    from fedfora.data.clinic import clinic_rows

    rows = rows_file(clinic_rows()[:24], "federated.json")

    def run(name, **flags):
        settings = from_run_config(
            {
                "model_name_or_path": tiny_dir,
                "quantization": "none",
                "train_file": rows,
                "output_dir": str(tmp_path / name),
                "lora_rank": 2,
                "num_clients": 2,
                "num_rounds": 2,
                "local_steps": 2,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 1,
                "privacy_unit": "record",
                **flags,
            }
        )
        simulate(settings, View(1))
        return tmp_path / name

    return run


def test_a_base_whose_gradients_of_rows_are_wrong_is_refused_before_anything_is_paid(
    words, federate, tmp_path, ledgers, capsys, monkeypatch
):
    """Wherever a training starts, for what is clipped would not be a row's own."""
    from fedfora.training import dp_sgd

    own = dp_sgd.per_example_gradients

    def swapped(model, batch, **options):
        losses, gradients = own(model, batch, **options)
        return losses, {name: gradient.flip(0) for name, gradient in gradients.items()}

    monkeypatch.setattr(dp_sgd, "per_example_gradients", swapped)
    assert private(words, tmp_path / "out", "--noise_multiplier", 1) == 2
    assert "do not add up" in capsys.readouterr().err
    with pytest.raises(ValueError, match="do not add up"):
        federate("one", noise_multiplier=1.0)
    assert not list(ledgers.iterdir())


def test_every_site_keeps_its_own_ledger_over_all_rounds(federate, ledgers):
    federate("one", target_epsilon=3.0)
    of_sites = [json.loads(path.read_text()) for path in ledgers.glob("rows-*.json")]
    assert len(of_sites) == 2
    for spent in of_sites:
        assert [line["count"] for line in spent["releases"]] == [2, 2]
        assert [line["settings"]["round"] for line in spent["releases"]] == [1, 2]
        assert len({line["noise_multiplier"] for line in spent["releases"]}) == 1  # the plan's own
        assert 2.9 < spent["epsilon"] <= 3


def test_a_round_is_in_the_ledger_before_a_row_is_looked_at(federate, ledgers, monkeypatch):
    """Else what a site did until somebody stopped it would have cost nothing."""
    paid, train = [], SiteRuntime.train

    def noted(runtime, *args, **options):
        kept = [json.loads(path.read_text())["releases"] for path in ledgers.glob("rows-*.json")]
        paid.append(sum(line["count"] for releases in kept for line in releases))
        return train(runtime, *args, **options)

    monkeypatch.setattr(SiteRuntime, "train", noted)
    federate("one", noise_multiplier=1.0)
    assert paid == [2, 4, 6, 8]


def test_a_private_site_tells_nothing_that_depends_on_its_rows(federate, capsys):
    """Token counts and digests are the same whatever the rows are; losses are not there."""
    out = federate("one", noise_multiplier=1.0)
    for line in read_rounds(out):
        assert "loss" not in line
        for site in line["sites"]:
            assert (site["tokens"], site["answer_tokens"], site["seconds"]) == (0, 6, 0)
            assert "loss" not in site
    assert "loss" not in capsys.readouterr().out
    assert all(not site["data_digest"] for site in json.loads((out / "sites.json").read_text()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_fraction": 0.2}, "lets every site send a loss without noise"),
        (
            {"compare": "base alone", "test_file": "clinic:test"},
            "--compare alone trains on the same rows without noise",
        ),
        ({"shared_noise": True}, "--secure_aggregation is missing"),
    ],
)
def test_what_a_private_federation_would_tell_without_noise_is_refused(
    federate, tmp_path, flags, message
):
    with pytest.raises(ValueError, match=message):
        federate("one", noise_multiplier=1.0, **flags)
    assert not (tmp_path / "one").exists()


def test_noise_makes_two_runs_of_one_seed_differ(federate):
    one, other = (read_adapter(federate(name, noise_multiplier=1.0)) for name in ("one", "other"))
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert any(name.endswith(".D") for name in differing)


def test_a_federation_whose_budget_is_spent_leaves_the_earlier_run_alone(federate):
    out = federate("one", target_epsilon=3.0)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        federate("one", target_epsilon=3.0, overwrite_output_dir=True)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_federation_that_was_stopped_resumes_on_what_its_budget_has_left(
    federate, ledgers, tmp_path, monkeypatch
):
    """As for one that was never stopped, the budget is for its rounds and no more."""
    flags = {"noise_multiplier": 1.0}
    flags["target_epsilon"] = epsilon_of([Release(3 / 12, 1.0, 4)], 1e-5) + 1e-3
    played, play = [], _Rounds._play

    def dies(rounds, before):
        if played:
            raise RuntimeError("the power went")
        played.append(before)
        return play(rounds, before)

    with monkeypatch.context() as patch:
        patch.setattr(_Rounds, "_play", dies)
        with pytest.raises(RuntimeError, match="power"):
            federate("one", **flags)
    out = federate("one", **flags, resume=str(tmp_path / "one"))
    assert len(read_rounds(out)) == 2
    kept = [json.loads(path.read_text())["releases"] for path in ledgers.glob("rows-*.json")]
    assert [sum(line["count"] for line in releases) for releases in kept] == [4, 4]


@pytest.mark.parametrize(("unit", "rate", "steps"), [("record", 3 / 12, 4), ("site", 1.0, 2)])
def test_a_budget_that_would_end_in_the_middle_leaves_the_earlier_run_alone(
    federate, unit, rate, steps
):
    """Half of what a second run needs is there: it is refused before it takes the first's place."""
    out = federate("one", privacy_unit=unit, noise_multiplier=1.0)
    before = (out / "metrics.jsonl").read_bytes()
    budget = epsilon_of([Release(rate, 1.0, steps + steps // 2)], 1e-5) + 1e-3
    again = {"target_epsilon": budget, "overwrite_output_dir": True}
    with pytest.raises(ValueError, match="privacy budget does not allow"):
        federate("one", privacy_unit=unit, noise_multiplier=1.0, **again)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_public_start_stands_in_the_statement_and_private_rows_are_none(
    words, tmp_path, rows_file, capsys
):
    from fedfora.data.clinic import clinic_rows

    public, out, other = (tmp_path / name for name in ("public", "out", "other"))
    assert main([*words, str(public)]) == 0
    start = ("--target_epsilon", 8, "--start_adapter", public, "--learning_rate", 0)
    assert private(words, other, *start) == 2
    assert "was trained on these rows without privacy" in capsys.readouterr().err
    assert not other.exists()
    place = words.index("--train_file") + 1
    again = [*words[:place], rows_file(clinic_rows()[30:50], "private.json"), *words[place + 1 :]]
    assert private(again, out, *start) == 0
    stored = json.loads((out / "fedfora.json").read_text())["privacy"]
    assert "It started from adapter" in stored
    assert "counts as public and is not covered" in stored
    began, ended = read_adapter(public), read_adapter(out)
    assert all(torch.equal(ended[name], began[name]) for name in began)  # at rate 0


def test_a_federation_starts_from_a_public_adapter(federate, words, tmp_path):
    public = tmp_path / "public"
    assert main([*words, str(public)]) == 0
    out = federate("one", target_epsilon=8.0, start_adapter=str(public), learning_rate=0.0)
    began, ended = fold(read_adapter(public)), fold(read_adapter(out))
    for name, tensor in began.items():
        torch.testing.assert_close(ended[name], tensor)
    assert "started from adapter" in json.loads((out / "fedfora.json").read_text())["privacy"]
