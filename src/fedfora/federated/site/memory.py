"""What a site keeps from round to round, on its own disk: Flower's `Context.state`, made to last.

Flower keeps `Context.state` in memory and loses it with the process. Here every training writes the
array records of the state (error feedback, frozen factors: whatever the site's code puts there) to
a file that says after which round it was written. The training of round n starts from the newest
state from before round n, so a federation that is killed in the middle of a round and resumed finds
what it would have found.

Other records of the state stay in memory, and never touch the disk: keys of secure aggregation.
What a real site must not forget about secure aggregation, whatever run a coordinator names and
however often the site is restarted, is in a file of its own: `AnsweredRounds`.

A site that keeps nothing writes nothing.
"""

import hmac
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from safetensors.numpy import load, save

from fedfora.federated.preflight import SITES_DIR
from fedfora.federated.settings import from_run_config
from fedfora.federated.site.identity import SITE_STATE
from fedfora.protection.sealing import is_sealed, read_bytes, remove, write_bytes
from fedfora.seeds import derive_seed

SEPARATOR = "//"  # between a record's name and an array's


@dataclass(frozen=True)
class SiteMemory:
    """The states of one site, newest last."""

    directory: Path

    def read(self, *, before: int) -> RecordDict:
        """Return the newest state from before a round, or an empty one."""
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
        for number in sorted({number for number in self._rounds() if number < after})[:-1]:
            remove(self._path(number))

    def _rounds(self) -> list[int]:
        names = (path.name for path in self.directory.glob("after-*"))
        return [int(name.removeprefix("after-").split(".")[0]) for name in names]

    def _path(self, round_number: int) -> Path:
        return self.directory / f"after-{round_number:06d}.safetensors"


class AnsweredRounds:
    """Which rounds of secure aggregation a site has answered, and its secret.

    A site shares for a round of a run once. Under another run id a coordinator may ask again, as a
    resumed run must. If this site's update had left before, its rows come in another order the
    second time: the difference of two sums of one round is then no site's update. A round that was
    interrupted before the update left is trained as it was. The secret draws that order, and keys
    the digest of the rows.

    Args:
        directory: The site's state; one process at a time reads and writes there.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "secure-aggregation.json"

    def share(self, run_id: str, round_number: int) -> None:
        """Note on disk, before the answer leaves, that the site shares for a round.

        Raises:
            ValueError: If the site has already shared for this round of the run, or a later one.
        """
        with self._open() as kept:
            last = kept["last_round"].get(run_id, 0)
            if round_number <= last:
                raise ValueError(
                    f"round {round_number} is requested again; this site has answered round {last}"
                )
            kept["last_round"][run_id] = round_number

    def seed(self, run: str, round_number: int) -> int:
        """Return the seed for the round's order of rows and dropout; nobody else can know it."""
        with self._open() as kept:
            return derive_seed(int(kept["secret"], 16), run, _attempt(kept, run, round_number))

    def keyed(self, digest: str) -> str:
        """Return a digest against which nobody else can test guesses of what it stands for."""
        with self._open() as kept:
            return hmac.digest(kept["secret"].encode(), digest.encode(), "sha256").hex()[:16]

    def leave(self, run: str, round_number: int) -> None:
        """Note on disk, before it happens, that the round's update leaves."""
        with self._open() as kept:
            kept["left"][run] = [round_number, _attempt(kept, run, round_number)]

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """Lend the content, locked; it is written to disk when the block ends without an error."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            kept = self._read()
            before = json.dumps(kept)
            yield kept
            if (after := json.dumps(kept)) != before or not kept["last_round"]:
                write_bytes(self.path, after.encode(), durable=True)

    def _read(self) -> dict[str, Any]:
        if not (self.path.exists() or is_sealed(self.path)):
            return {"secret": secrets.token_hex(32), "last_round": {}, "left": {}}
        try:
            kept: dict[str, Any] = json.loads(read_bytes(self.path))
            int(kept["secret"], 16), kept["last_round"].items(), kept["left"].items()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} does not say which rounds were answered: {error}") from (
                error
            )
        return kept


def _attempt(kept: dict[str, Any], run: str, round_number: int) -> int:
    """Return how often the run has gone back before a round whose update had left."""
    last_left, attempt = map(int, kept["left"].get(run, (0, 0)))
    return attempt + (round_number <= last_left)


def answered_rounds(context: Context) -> AnsweredRounds | None:
    """Return the memory of a real site under secure aggregation; None for a simulated one."""
    state = context.node_config.get(SITE_STATE)
    return None if state is None else AnsweredRounds(Path(str(state)))


def memory_of(context: Context) -> SiteMemory:
    """Return the memory of a context's site."""
    run_directory = Path(from_run_config(context.run_config).run.output_dir)
    return SiteMemory(run_directory / SITES_DIR / str(context.node_config["partition-id"]))


def _transient(state: RecordDict) -> RecordDict:
    """Return what a site keeps only in memory: records that are not arrays, such as keys."""
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
