"""Ctrl-C and a polite kill: finish the step, save, stop. A second one stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Turns the first signal into a checkpoint and the end of the training.

    Use it as a context manager around the training. All processes of a training stop after the
    same step, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        """Listen, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt("at once, without saving")
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process was asked to."""
        asked = self.asked
        if args.world_size > 1:
            votes = torch.tensor([int(asked)], device=args.device)
            torch.distributed.all_reduce(votes)
            asked = bool(votes.item())
        if asked:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
