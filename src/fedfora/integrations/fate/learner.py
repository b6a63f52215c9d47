"""A guest or a host: agrees with the other clients, trains, and saves the result.

FATE sums tensors by their position and trusts that all parties mean the same; nothing is compared
and every party draws its own first adapter. So before the first round the guest gives out the seed,
each host describes what it made of it, and the guest compares and sends the start. The arbiter sees
none of this.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fate.components.components.nn.loader import Loader

from fedfora.adapter.state import AdapterState, fold, read_state, unfold, write_state
from fedfora.integrations.fate.client import FateClient, RoundReport
from fedfora.integrations.fate.connection import DeadlineFederation
from fedfora.integrations.fate.round_sum import traveling
from fedfora.integrations.fate.runner_conf import runner_conf
from fedfora.integrations.fate.settings import FateSettings
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.reporting.record import RunRecord
from fedfora.reporting.view import View
from fedfora.seeds import derive_seed
from fedfora.training.local import train_locally
from fedfora.training.packing import check_no_leak
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport

# Of a party's flags, what must be the same at every party.
AGREED = ("num_rounds", "local_steps", "trainable", "warmup_rounds", "error_probes")


def adapter_digest(state: AdapterState) -> str:
    """Return a short digest of an adapter; equal at all clients when their adapters are equal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Learner:
    """A party with rows and a model.

    Args:
        settings: The party's.
        view: Where to show it.
        on_round: Called after every round.

    Raises:
        ValueError: If the rows cannot be read; nobody waits for this party yet.
    """

    def __init__(
        self, settings: FateSettings, view: View, on_round: Callable[[RoundReport], None]
    ) -> None:
        self.settings, self.view, self.on_round = settings, view, on_round
        self.rows = _make(runner_conf(settings, seed=settings.train.seed)["dataset_conf"])
        self.rows.load(settings.data.train_file)
        self._bytes_before = 0

    def learn(self, ctx: Any, federation: DeadlineFederation) -> None:
        """Take part in all rounds.

        Raises:
            ValueError: If the parties disagree, or one of them is lost.
        """
        settings, fate = self.settings, self.settings.fate
        seed = share_seed(ctx, settings.train.seed)
        conf = runner_conf(settings, seed=seed)
        model = _make(conf["model_conf"])
        share = self._settle(ctx, model, seed)

        self._record = self._open_record(conf, seed, model.base_fingerprint)
        client = FateClient(
            ctx,
            model.peft_model,
            num_rows=len(self.rows),
            share=share,
            fate=fate,
            seed=seed,
            inner_dim=settings.adapter.inner_dim,
            on_round=partial(self._round_finished, federation),
        )
        self._bytes_before = federation.bytes_sent
        self._train(model, client, seed=derive_seed(seed, "train", *federation.local_party))
        save_adapter(
            Path(settings.run.output_dir),
            read_state(model.peft_model),
            adapter_config(model.peft_model),
            adapter_record(self.rows.prompts, model.base_fingerprint),
        )

    def _settle(self, ctx: Any, made: Any, seed: int) -> float:
        """Agree with the others, take over the guest's start, and return the share of all rows."""
        fate, model = self.settings.fate, made.peft_model
        fresh = fold(read_state(model))
        card = {
            "layout": layout_digest(traveling(fresh, fate.trained_in(0))),
            "base_fingerprint": made.base_fingerprint,
            "prompts": json.dumps(asdict(self.rows.prompts)),
            **{name: getattr(fate, name) for name in AGREED},
        }
        share = agree(ctx, card, len(self.rows))
        start = share_start(ctx, fresh)
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
            adapter_digest=adapter_digest(report.averaged),
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
        if self.settings.train.packing:  # FATE's party has no privacy of single records
            check_no_leak(model.peft_model, self.rows.encoded)
        train_locally(
            model.peft_model,
            model.base.tokenizer,
            self.rows.encoded,
            self.settings.train,
            stretch=StepWindow(first_step=0, num_steps=num_steps, total_steps=num_steps),
            seed=seed,
            callbacks=client.callbacks(),
            on_step=after_step,
        )

    def _open_record(self, conf: dict[str, Any], seed: int, base_fingerprint: str) -> RunRecord:
        run = self.settings.run
        record = RunRecord(run.output_dir, overwrite=run.overwrite_output_dir)
        record.write_config(asdict(self.settings))
        record.write_environment(seed=seed, base_fingerprint=base_fingerprint, rows=len(self.rows))
        record.write_json("runner_conf.json", conf)
        return record


def _make(item: dict[str, Any]) -> Any:
    """Make what an entry of the runner's configuration describes, with FATE's own loader."""
    return Loader.from_dict(item)()


def layout_digest(state: AdapterState) -> str:
    """Return a short digest that differs for other names, shapes or another order."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def share_seed(ctx: Any, seed: int) -> int:
    """Return the guest's seed at every client.

    Args:
        ctx: FATE's context of a guest or host.
        seed: This party's own, which counts at the guest only.
    """
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_seed", seed)
        return seed
    return int(ctx.guest.get("fedfora_seed"))


def agree(ctx: Any, card: dict[str, Any], num_rows: int) -> float:
    """Compare the cards of all clients and return this one's share of all rows.

    Args:
        ctx: FATE's context of a guest or host.
        card: What this party has of all that must be the same at every one.
        num_rows: Rows it trains on.

    Raises:
        ValueError: At every client, if two cards differ; names the party and the values.
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


def share_start(ctx: Any, folded: AdapterState) -> AdapterState:
    """Return the guest's first adapter at every client."""
    if ctx.is_on_guest:
        ctx.hosts.put("fedfora_start", [tensor.numpy() for tensor in folded.values()])
        return folded
    arrays = ctx.guest.get("fedfora_start")
    return {
        name: torch.from_numpy(array.copy()) for name, array in zip(folded, arrays, strict=True)
    }
