"""What a guest or host shows and records of its steps and rounds."""

import hashlib
import time
from collections.abc import Callable

from fedfora.adapter.state import AdapterState
from fedfora.integrations.fate.client import RoundReport
from fedfora.integrations.fate.deadline import DeadlineFederation
from fedfora.reporting.record import RunRecord
from fedfora.reporting.view import View
from fedfora.training.trainer import StepReport


class Watcher:
    """Shows every step, and records and shows every round.

    Args:
        view: Where to show it.
        record: Where to record it.
        federation: Counts the bytes.
        num_rounds: Of the federation.
        on_round: Called with every report.
    """

    def __init__(
        self,
        view: View,
        record: RunRecord,
        federation: DeadlineFederation,
        *,
        num_rounds: int,
        on_round: Callable[[RoundReport], None],
    ) -> None:
        self.view, self.record, self.federation = view, record, federation
        self.num_rounds, self.on_round = num_rounds, on_round
        self._started = time.monotonic()
        self._bytes_before = federation.bytes_sent
        self._round = 1

    def step(self, report: StepReport) -> None:
        """Show a step."""
        speed = report.tokens / (time.monotonic() - self._started)
        what = f"round {self._round}/{self.num_rounds}"
        self.view.advance(1, what, loss=report.loss, speed=speed)

    def round_finished(self, report: RoundReport) -> None:
        """Record and show a round."""
        sent = self.federation.bytes_sent - self._bytes_before
        self._bytes_before = self.federation.bytes_sent
        self.record.log(
            "round",
            round=report.round,
            loss=report.loss,
            own_loss=report.own_loss,
            aggregation_error=report.aggregation_error,
            uplink_bytes=sent,
            adapter_digest=adapter_digest(report.averaged),
        )
        text = f"round {report.round}/{self.num_rounds}   loss {report.loss:6.3f}"
        if report.aggregation_error is not None:
            text += f"   aggregation error {report.aggregation_error:.3f}"
        self.view.line(text)
        self._round = report.round + 1
        self.on_round(report)


def adapter_digest(state: AdapterState) -> str:
    """Return a short digest of an adapter; equal at all clients when their adapters are equal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
