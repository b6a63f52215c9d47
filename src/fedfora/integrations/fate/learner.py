"""A guest or a host: agrees with the other clients, trains, and saves the result."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fate.components.components.nn.loader import Loader

from fedfora.adapter.state import fold, read_state, unfold, write_state
from fedfora.integrations.fate.agreement import Card, agree, layout_digest, share_seed, share_start
from fedfora.integrations.fate.client import FateClient, RoundReport
from fedfora.integrations.fate.deadline import DeadlineFederation
from fedfora.integrations.fate.round_sum import traveling
from fedfora.integrations.fate.runner_conf import runner_conf
from fedfora.integrations.fate.settings import FateSettings
from fedfora.integrations.fate.watcher import Watcher
from fedfora.models.saving import adapter_config, adapter_record, save_adapter
from fedfora.reporting.record import RunRecord
from fedfora.reporting.view import View
from fedfora.seeds import derive_seed
from fedfora.training.local import train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.trainer import StepReport


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

    def learn(self, ctx: Any, federation: DeadlineFederation) -> None:
        """Take part in all rounds.

        Raises:
            ValueError: If the parties disagree, or one of them is lost.
        """
        settings, fate = self.settings, self.settings.fate
        seed = share_seed(ctx, settings.train.seed)
        conf = runner_conf(settings, seed=seed)
        made = _make(conf["model_conf"])
        share = self._settle(ctx, made, seed)

        record = self._open_record(conf, seed, made.base_fingerprint)
        watcher = Watcher(
            self.view, record, federation, num_rounds=fate.num_rounds, on_round=self.on_round
        )
        client = FateClient(
            ctx,
            made.peft_model,
            num_rows=len(self.rows),
            share=share,
            local_steps=fate.local_steps,
            trained_in=fate.trained_in,
            num_probes=fate.error_probes,
            seed=seed,
            inner_dim=settings.adapter.inner_dim,
            on_round=watcher.round_finished,
        )
        self._train(made, client, watcher, seed=derive_seed(seed, "train", *federation.local_party))
        save_adapter(
            Path(settings.run.output_dir),
            read_state(made.peft_model),
            adapter_config(made.peft_model),
            adapter_record(self.rows.prompts, made.base_fingerprint),
        )

    def _settle(self, ctx: Any, made: Any, seed: int) -> float:
        """Agree with the others, take over the guest's start, and return the share of all rows."""
        fate, model = self.settings.fate, made.peft_model
        fresh = fold(read_state(model))
        card = Card(
            layout=layout_digest(traveling(fresh, fate.trained_in(0))),
            base_fingerprint=made.base_fingerprint,
            prompts=json.dumps(asdict(self.rows.prompts)),
            num_rounds=fate.num_rounds,
            local_steps=fate.local_steps,
            trainable=fate.trainable,
            warmup_rounds=fate.warmup_rounds,
            error_probes=fate.error_probes,
        )
        share = agree(ctx, card, len(self.rows))
        start = share_start(ctx, fresh)
        write_state(model, unfold(start, seed=seed, inner_dim=self.settings.adapter.inner_dim))
        return share

    def _train(self, made: Any, client: FateClient, watcher: Watcher, *, seed: int) -> None:
        fate = self.settings.fate

        def after_step(report: StepReport) -> None:
            client.add_loss(report.loss)
            watcher.step(report)

        num_steps = fate.num_rounds * fate.local_steps
        train_locally(
            made.peft_model,
            made.base.tokenizer,
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
