"""How good the adapter of a round is: by the sites' rows kept back, or on the common test rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid

from fedfora.config import Scalar
from fedfora.data.loading import load_examples
from fedfora.evaluation.evaluate import evaluate
from fedfora.evaluation.output import PREDICTIONS
from fedfora.federated.coordinator.checkpoint import Selection, judging_score
from fedfora.federated.coordinator.receiving import receive
from fedfora.federated.coordinator.strategy import AdapterStrategy
from fedfora.federated.settings import FederationSettings
from fedfora.federated.site_runtime import load_runtime
from fedfora.federated.wire.transport import from_record
from fedfora.reporting.record import RunRecord


@dataclass(frozen=True)
class RoundEvaluator:
    """Judges the rounds of one run.

    Args:
        grid: The engine.
        run_config: All settings, by which the base is opened.
        settings: The same, read.
        strategy: Asks the sites.
        record: Of the run; the last evaluation's answers are written beside it.
    """

    grid: Grid
    run_config: Mapping[str, Scalar]
    settings: FederationSettings
    strategy: AdapterStrategy
    record: RunRecord

    def evaluate(
        self, selection: Selection, number: int, arrays: ArrayRecord, metrics: MetricRecord
    ) -> tuple[Selection, dict[str, Any], dict[str, Any]]:
        """Judge the rounds that can be judged now; return the selection, and what to record.

        Sites judge the adapter they receive, so the loss that comes with a round is that of the
        round before; after the last round they are asked once more.
        """
        federation = self.settings.federation
        last = number == federation.num_rounds
        scores = self._score(arrays) if number % federation.eval_rounds == 0 or last else {}
        validation: dict[str, Any] = {}
        received = metrics.get("validation-loss")
        if received is not None:
            validation["received_validation_loss"] = received
            if number > 1:
                selection = selection.judged(number - 1, float(received), lower_is_better=True)
            if last and (loss := self._ask_for_validation(number, arrays)) is not None:
                validation["validation_loss"] = loss
                selection = selection.judged(number, loss, lower_is_better=True)
        elif (score := judging_score(scores)) is not None:
            selection = selection.judged(number, score, lower_is_better=False)
        return selection, validation, scores

    def _ask_for_validation(self, number: int, arrays: ArrayRecord) -> float | None:
        questions = self.strategy.configure_evaluate(number, arrays, ConfigRecord(), self.grid)
        deadline_s = self.settings.rounds.round_deadline
        metrics = self.strategy.aggregate_evaluate(
            number, receive(self.grid, questions, deadline_s=deadline_s)
        )
        return None if metrics is None else float(metrics["validation-loss"])

    def _score(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return the scores on the common test rows; none where there are no such rows."""
        settings = self.settings
        if settings.data.test_file is None:
            return {}
        examples = load_examples(settings.data.test_file, settings.data)
        runtime = load_runtime(self.run_config)
        runtime.load(from_record(arrays))
        examples = examples[: settings.evaluation.max_eval_samples]
        result = evaluate(
            runtime.model,
            runtime.base.tokenizer,
            examples,
            runtime.prompts,
            batch_size=settings.evaluation.per_device_eval_batch_size,
            max_new_tokens=settings.evaluation.max_new_tokens,
            on_batch=lambda rows: self.record.announce("evaluated", rows=rows),
        )
        result.write(self.record.directory / PREDICTIONS, examples)
        return result.scores
