"""A guest or a host: agrees with the other clients, trains, sums with them, saves the result.

FATE sums tensors by their position and trusts that all parties mean the same; nothing is compared
and every party draws its own first adapter. So before the first round the guest gives out the seed,
each host describes what it made of it, and the guest compares and sends the start. The arbiter sees
none of this.

The training loop is fedfora's own. FATE takes part in it through its own callbacks, which speak its
protocol to an unchanged FATE arbiter and call back here; nothing of FATE is replaced.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fate.ml.aggregator import SecureAggregatorClient
from fate.ml.nn.homo.fedavg import FedAVGArguments
from fate.ml.nn.trainer.trainer_base import (
    FedParameterAlignCallback,
    HomoTrainerMixin,
    WrappedFedCallback,
)

from fedfora.adapter.state import AdapterState, fold, read_state, unfold, write_state
from fedfora.data.encoding import encode_examples, prompt_format_of
from fedfora.data.loading import load_chosen
from fedfora.integrations.fate.party import DeadlineFederation
from fedfora.integrations.fate.pellm import ForaCausalLM
from fedfora.integrations.fate.round_sum import contribution, take_out, train_core_alone, traveling
from fedfora.integrations.fate.settings import AGGREGATOR, FateSettings
from fedfora.models.loading import adapter_options, load_tokenizer
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.privacy.settings import PrivacyArguments
from fedfora.reporting.record import RunRecord
from fedfora.reporting.view import View
from fedfora.seeds import derive_seed
from fedfora.training.local import check_trainable, train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport

# Of a party's flags, what must be the same at every party.
AGREED = ("num_rounds", "local_steps", "trainable", "warmup_rounds", "error_probes")


def _adapter_digest(state: AdapterState) -> str:
    """Return a short digest of an adapter; equal at all clients when their adapters are equal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RoundReport:
    """What a round did.

    Args:
        round: Counted from 1.
        own_loss: This party's mean loss over the round's steps.
        loss: The clients' mean, weighted by their rows.
        aggregation_error: Relative to the mean update; None where only the core was trained.
        sent: This party's adapter, folded, before the sum.
        averaged: The adapter after it.
    """

    round: int
    own_loss: float
    loss: float
    aggregation_error: float | None
    sent: AdapterState
    averaged: AdapterState


class FateClient(HomoTrainerMixin):  # type: ignore[misc]  # FATE's interface
    """Hands the adapter to FATE's secure aggregator, and writes the mean back.

    Args:
        ctx: FATE's context.
        model: A PEFT model with a FoRA adapter.
        num_rows: Rows this party trains on: its weight.
        share: Its share of all clients' rows; FATE's arbiter must give it this weight.
        settings: The party's.
        seed: The federation's.
        on_round: Called after every round.
    """

    def __init__(
        self,
        ctx: Any,
        model: Any,
        *,
        num_rows: int,
        share: float,
        settings: FateSettings,
        seed: int,
        on_round: Callable[[RoundReport], None],
    ) -> None:
        fed_args = FedAVGArguments(
            aggregate_strategy="steps",
            aggregate_freq=settings.fate.local_steps,
            aggregator=AGGREGATOR,
        )
        super().__init__(
            ctx=ctx,
            model=model,
            training_args=None,
            fed_args=fed_args,
            train_set=None,
            callbacks=[],
        )
        self.num_rows, self.share, self.on_round = num_rows, share, on_round
        self.fate, self.seed, self.inner_dim = settings.fate, seed, settings.adapter.inner_dim
        self.rounds_done = 0
        self._losses: list[float] = []

    def callbacks(self) -> list[Any]:
        """Return FATE's callbacks for a Trainer: start the aggregator, align, aggregate."""
        return [
            WrappedFedCallback(self.ctx, self),
            FedParameterAlignCallback(
                self, self.ctx, training_args=None, fed_args=self._fed_args, is_server=False
            ),
        ]

    def add_loss(self, loss: float) -> None:
        """Count a step's loss into the round's."""
        self._losses.append(loss)

    def init_aggregator(self, ctx: Any, _: Any) -> SecureAggregatorClient:
        """Exchange keys with the other clients (FATE calls this before the first step).

        Raises:
            ValueError: If the arbiter gave this party another weight than its share of the rows.
                An arbiter could read an update that it makes very light, and FATE does not check.
        """
        ctx.arbiter.put("agg_type", AGGREGATOR)  # what FATE's arbiter waits for first
        aggregator = SecureAggregatorClient(
            ctx, aggregator_name="fedavg", aggregate_type="weighted_mean", sample_num=self.num_rows
        )
        weight = aggregator._weight
        if abs(weight - self.share) > 1e-9:
            raise ValueError(
                f"the arbiter gave this party the weight {weight:.6g}; its share of the rows is "
                f"{self.share:.6g}"
            )
        return aggregator

    def on_federation(
        self, ctx: Any, aggregator: Any, _: Any, *, model: Any, optimizer: Any, **__: Any
    ) -> None:
        """Sum with the other clients (FATE calls this at the end of a round).

        The optimizer forgets the round's moments, as that of a site in fedfora's own federation.
        """
        own_loss = sum(self._losses) / len(self._losses)
        seed = derive_seed(self.seed, "round", self.rounds_done)
        probes = {"num_probes": self.fate.error_probes, "seed": seed}
        trained = self.fate.trained_in(self.rounds_done)
        sent = fold(read_state(model))
        arrays = contribution(sent, trained, loss=own_loss, **probes)
        means = aggregator.model_aggregation(ctx, arrays)
        averaged, loss, error = take_out(means, sent, trained, **probes)
        write_state(model, unfold(averaged, seed=self.seed, inner_dim=self.inner_dim))
        optimizer.state.clear()
        self.rounds_done += 1
        if self.fate.trained_in(self.rounds_done) == "core":
            train_core_alone(model)
        self._losses.clear()
        self.on_round(RoundReport(self.rounds_done, own_loss, loss, error, sent, averaged))


class Learner:
    """A party with rows and a model; its arguments are those of `run_party`.

    Raises:
        ValueError: If the rows cannot be read; nobody waits for this party yet.
    """

    def __init__(
        self, settings: FateSettings, view: View, on_round: Callable[[RoundReport], None]
    ) -> None:
        self.settings, self.view, self.on_round = settings, view, on_round
        tokenizer = load_tokenizer(settings.model)
        self.prompts = prompt_format_of(settings.data, tokenizer)
        examples = load_chosen(settings.data.train_file, settings.data, flag="--train_file")
        self.rows = encode_examples(examples, tokenizer, self.prompts)
        self._bytes_before = 0

    def learn(self, ctx: Any, federation: DeadlineFederation) -> None:
        """Take part in all rounds.

        Raises:
            ValueError: If the parties disagree, or one of them is lost.
        """
        settings = self.settings
        seed = _share_seed(ctx, settings.train.seed)
        model = _make_model(settings, seed)
        share = self._settle(ctx, model, seed)

        self._record = self._open_record(seed, model.base_fingerprint)
        client = FateClient(
            ctx,
            model.peft_model,
            num_rows=len(self.rows),
            share=share,
            settings=settings,
            seed=seed,
            on_round=partial(self._round_finished, federation),
        )
        self._bytes_before = federation.bytes_sent
        self._train(model, client, seed=derive_seed(seed, "train", *federation.local_party))
        save_adapter(
            Path(settings.run.output_dir),
            read_state(model.peft_model),
            adapter_config(model.peft_model),
            adapter_record(self.prompts, model.base_fingerprint),
        )

    def _settle(self, ctx: Any, made: Any, seed: int) -> float:
        """Agree with the others, take over the guest's start, and return the share of all rows."""
        fate, model = self.settings.fate, made.peft_model
        fresh = fold(read_state(model))
        card = {
            "layout": _layout_digest(traveling(fresh, fate.trained_in(0))),
            "base_fingerprint": made.base_fingerprint,
            "prompts": json.dumps(asdict(self.prompts)),
            **{name: getattr(fate, name) for name in AGREED},
        }
        share = _agree(ctx, card, len(self.rows))
        start = _share_start(ctx, fresh)
        write_state(model, unfold(start, seed=seed, inner_dim=self.settings.adapter.inner_dim))
        return share

    def _round_finished(self, federation: DeadlineFederation, report: RoundReport) -> None:
        """Record and show a round."""
        sent = federation.bytes_sent - self._bytes_before
        self._bytes_before = federation.bytes_sent
        self._record.log(
            "round",
            round=report.round,
            loss=report.loss,
            own_loss=report.own_loss,
            aggregation_error=report.aggregation_error,
            uplink_bytes=sent,
            adapter_digest=_adapter_digest(report.averaged),
        )
        text = f"round {report.round}/{self.settings.fate.num_rounds}   loss {report.loss:6.3f}"
        if report.aggregation_error is not None:
            text += f"   aggregation error {report.aggregation_error:.3f}"
        self.view.line(text)
        self.on_round(report)

    def _train(self, model: Any, client: FateClient, *, seed: int) -> None:
        """Train through all rounds; FATE's callbacks end each of them."""
        fate, started = self.settings.fate, time.monotonic()

        def after_step(report: StepReport) -> None:
            client.add_loss(report.loss)
            speed = report.tokens / (time.monotonic() - started)
            what = f"round {client.rounds_done + 1}/{fate.num_rounds}"
            self.view.advance(1, what, loss=report.loss, speed=speed)

        num_steps = fate.num_rounds * fate.local_steps
        none = PrivacyArguments()  # FATE's party has no privacy of single records
        check_trainable(model.peft_model, model.base.tokenizer, self.settings.train, none)
        train_locally(
            model.peft_model,
            self.rows,
            self.settings.train,
            stretch=StepWindow(first_step=0, num_steps=num_steps, total_steps=num_steps),
            seed=seed,
            callbacks=client.callbacks(),
            on_step=after_step,
        )

    def _open_record(self, seed: int, base_fingerprint: str) -> RunRecord:
        run = self.settings.run
        record = RunRecord(run.output_dir, overwrite=run.overwrite_output_dir)
        record.write_config(asdict(self.settings))
        record.write_environment(seed=seed, base_fingerprint=base_fingerprint, rows=len(self.rows))
        return record


def _make_model(settings: FateSettings, seed: int) -> ForaCausalLM:
    """Return base and adapter; a core alone starts from the base weight."""
    first, base = settings.fate.trained_in(0), asdict(settings.model)
    options = {**adapter_options(settings.adapter), "trainable": first}
    options["init_weights"] = "svd" if first == "core" else True
    name = base.pop("model_name_or_path")
    return ForaCausalLM(name, peft_config=options, seed=seed, **base)


def _layout_digest(state: AdapterState) -> str:
    """Return a short digest that differs for other names, shapes or another order."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _share_seed(ctx: Any, seed: int) -> int:
    """Return the guest's seed at every client; another party's own does not count."""
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_seed", seed)
        return seed
    return int(ctx.guest.get("fedfora_seed"))


def _agree(ctx: Any, card: dict[str, Any], num_rows: int) -> float:
    """Compare what must be the same at all clients, and return this one's share of all rows.

    If two cards differ, every client raises, naming the party and the values.
    """
    if ctx.is_on_guest:
        answers = ctx.hosts.get("fedfora_card")
        problems = [
            f"the parties differ in {name}: the guest has {mine}, {host.role}:{host.party_id} has "
            f"{answer[name]}"
            for name, mine in card.items()
            for host, answer in zip(ctx.hosts, answers, strict=True)
            if answer[name] != mine
        ]
        total = num_rows + sum(answer["num_rows"] for answer in answers)
        verdict = {"problem": "".join(problems[:1]), "num_rows": total}
        ctx.hosts.put("fedfora_verdict", verdict)
    else:
        ctx.guest.put("fedfora_card", {"num_rows": num_rows, **card})
        verdict = ctx.guest.get("fedfora_verdict")
    if verdict["problem"]:
        raise ValueError(verdict["problem"])
    return num_rows / float(verdict["num_rows"])


def _share_start(ctx: Any, folded: AdapterState) -> AdapterState:
    """Return the guest's first adapter at every client."""
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_start", [tensor.numpy() for tensor in folded.values()])
        return folded
    arrays = ctx.guest.get("fedfora_start")
    return {
        name: torch.from_numpy(array.copy()) for name, array in zip(folded, arrays, strict=True)
    }
