"""A site's memory: the newest from before a round, and no more than can be asked for."""

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedfora.federated.site.memory import SiteMemory


def state(value):
    arrays = ArrayRecord({"a.b": Array(np.full((2, 3), value, np.float32))})
    return RecordDict({"feedback": arrays, "numbers": MetricRecord({"n": 1})})


def value_of(record):
    return None if not record else float(record["feedback"]["a.b"].numpy()[0, 0])


def test_a_round_starts_from_the_newest_state_before_it(tmp_path):
    memory = SiteMemory(tmp_path)
    assert value_of(memory.read(before=1)) is None
    memory.write(state(1), after=1)
    memory.write(state(4), after=4)
    assert [value_of(memory.read(before=n)) for n in (1, 2, 4, 5, 9)] == [None, 1, 1, 4, 4]


def test_only_what_a_resumed_run_can_ask_for_is_kept(tmp_path):
    memory = SiteMemory(tmp_path)
    for number in (1, 2, 5, 6):
        memory.write(state(number), after=number)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "after-000005.safetensors",
        "after-000006.safetensors",
    ]


def test_a_round_that_is_repeated_overwrites_what_it_left(tmp_path):
    memory = SiteMemory(tmp_path)
    memory.write(state(1), after=1)
    memory.write(state(2), after=2)
    memory.write(state(3), after=2)
    assert value_of(memory.read(before=2)) == 1
    assert value_of(memory.read(before=3)) == 3


def test_who_keeps_nothing_writes_nothing(tmp_path):
    SiteMemory(tmp_path / "site").write(RecordDict(), after=1)
    assert not (tmp_path / "site").exists()
