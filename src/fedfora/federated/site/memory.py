"""What a site keeps from round to round, on its own disk: Flower's `Context.state`, made to last.

Flower keeps `Context.state` in memory and loses it with the process. Here every training leaves the
array records of the state (error feedback, a private core, an optimizer's moments: whatever the
site's code puts there) in a file that says after which round it was written. A training of round n
starts from the newest state from before round n, so a federation that is killed in the middle of a
round and resumed finds what it would have found.

Other records of the state stay in memory, and never touch the disk: keys of secure aggregation.

A site that keeps nothing writes nothing.
"""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from safetensors.numpy import load, save

from fedfora.federated.settings import from_run_config
from fedfora.federated.sharing import SITES
from fedfora.protection.sealing import read_bytes, remove, write_bytes

SEPARATOR = "//"  # between a record's name and an array's


class SiteMemory:
    """The states of one site, newest last."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, *, before: int) -> RecordDict:
        """Return the newest state from before a round, empty where there is none."""
        rounds = [number for number in self._rounds() if number < before]
        if not rounds:
            return RecordDict()
        arrays = load(read_bytes(self._path(max(rounds))))
        state: dict[str, dict[str, Array]] = {}
        for name, value in arrays.items():
            record, key = name.split(SEPARATOR, 1)
            state.setdefault(record, {})[key] = Array(value)
        return RecordDict({record: ArrayRecord(content) for record, content in state.items()})

    def write(self, state: RecordDict, *, after: int) -> None:
        """Keep the array records of a state; forget those that no resumed run can ask for."""
        arrays: dict[str, np.ndarray] = {
            f"{record}{SEPARATOR}{key}": array.numpy()
            for record, content in state.array_records.items()
            for key, array in content.items()
        }
        if not arrays:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_bytes(self._path(after), save(arrays))
        needed = max((number for number in self._rounds() if number < after), default=0)
        for number in self._rounds():
            if number < needed:
                remove(self._path(number))

    def _rounds(self) -> list[int]:
        names = (path.name for path in self.directory.glob("after-*"))
        return [int(name.removeprefix("after-").split(".")[0]) for name in names]

    def _path(self, round_number: int) -> Path:
        return self.directory / f"after-{round_number:06d}.safetensors"


def memory_of(context: Context) -> SiteMemory:
    """Return the memory of a context's site."""
    run_directory = Path(from_run_config(context.run_config).run.output_dir)
    return SiteMemory(run_directory / SITES / str(context.node_config["partition-id"]))


def _transient(state: RecordDict) -> RecordDict:
    """Return what a site keeps in memory alone: records that are no arrays, such as keys."""
    return RecordDict(dict(state.config_records))


def remembering(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: a training starts from the site's last state, and leaves its own."""
    round_number = int(message.content["config"]["round-index"]) + 1
    memory = memory_of(context)
    context.state = RecordDict({**memory.read(before=round_number), **_transient(context.state)})
    reply = call_next(message, context)
    memory.write(context.state, after=round_number)
    context.state = _transient(context.state)
    return reply
