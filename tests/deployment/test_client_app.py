"""What goes over the trainer's socket comes out as it went in, and nothing else is taken."""

import io
import re
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import strategies as st

from fedfora.deployment import client_app, journal
from fedfora.deployment.client_app import WireError, decode, encode, receive, send
from fedfora.federated.embedded import introduce_this_process

DTYPES = st.sampled_from(["float32", "float16", "int64", "uint8", "uint16", "uint32", "bool"])
NAMES = st.text(min_size=1, max_size=8)
NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
SCALARS = NUMBERS | st.text(max_size=5) | st.binary(max_size=5) | st.booleans()
LISTS = st.lists(st.binary(max_size=5)) | st.lists(st.integers(0, 99)) | st.lists(st.text())


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return Array(np.full(shape, draw(st.integers(0, 1))).astype(draw(DTYPES)))


RECORDS = st.one_of(
    st.dictionaries(NAMES, arrays(), max_size=3).map(ArrayRecord),
    st.dictionaries(NAMES, NUMBERS, max_size=3).map(MetricRecord),
    st.dictionaries(NAMES, SCALARS | LISTS, max_size=3).map(ConfigRecord),
)


@given(st.dictionaries(NAMES, RECORDS, max_size=4))
def test_what_is_decoded_is_what_was_encoded(records):
    content = RecordDict(records)
    head, back = decode(encode({"operation": "train", "run": 7}, content))
    assert head == {"operation": "train", "run": 7}
    assert list(back) == list(content)
    assert back == content


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(frame):
    with pytest.raises(WireError):
        decode(frame)


def test_a_damaged_message_is_refused():
    frame = bytearray(encode({}, RecordDict({"a": ArrayRecord({"x": Array(np.ones(3))})})))
    with pytest.raises(WireError):
        decode(bytes(frame[:-1]))


def test_arrays_that_hold_objects_are_not_unpickled():
    array = Array("object", (1,), "numpy.ndarray", _saved_with_pickle([print]))
    _, content = decode(encode({}, RecordDict({"a": ArrayRecord({"x": array})})))
    with pytest.raises(ValueError, match="allow_pickle"):
        content["a"]["x"].numpy()


def _saved_with_pickle(values):
    file = io.BytesIO()
    np.save(file, np.array(values, dtype=object), allow_pickle=True)
    return file.getvalue()


def test_a_message_that_announces_too_much_is_refused_before_it_is_read():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(struct.pack(">Q", 10**12))
        with pytest.raises(WireError, match="1000000000000 bytes; at most 1000"):
            receive(here, max_bytes=1000)


def test_a_message_that_breaks_off_is_refused():
    here, there = socket.socketpair()
    with here:
        there.sendall(struct.pack(">Q", 100) + b"x" * 10)
        there.close()
        with pytest.raises(WireError, match="10 of 100"):
            receive(here)


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (ValueError("Jane Roe"), "MESSAGE"),
        (client_app.TrainerGoneError("Jane Roe"), "TRAINER"),
        ({client_app.CODE: "Jane Roe"}, "MESSAGE"),
        ({client_app.CODE: "site-error DATA 0a1b2c Jane Roe"}, "MESSAGE"),
    ],
)
def test_whatever_goes_wrong_on_the_way_a_code_is_all_that_leaves(
    tmp_path, monkeypatch, failure, word
):
    """Also where the trainer itself were to answer with a text."""

    def ask(*args, **options):
        if isinstance(failure, Exception):
            raise failure
        return failure, RecordDict()

    monkeypatch.setattr(client_app, "ask", ask)
    introduce_this_process()
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "q1"
    context = Context(1, 1, {client_app.TRAINER: str(tmp_path)}, RecordDict(), {})
    reply = client_app.forward("train", message, context)
    assert not reply.has_content()
    assert re.fullmatch(rf"site-error {word} [0-9a-f]{{6}}", reply.error.reason)
    (line,) = journal.read_journal(tmp_path)
    assert (line["operation"], line["error"]) == ("train", reply.error.reason)


def test_a_message_that_holds_an_error_is_answered_by_a_code_and_stands_in_the_journal(tmp_path):
    """Its content cannot be asked for; Flower answered with the text of what was raised."""
    introduce_this_process()
    message = Message(Error(2, "Jane Roe"), reply_to=Message(RecordDict(), 1, "train"))
    message.metadata.__dict__["_message_id"] = "q1"
    context = Context(1, 1, {client_app.TRAINER: str(tmp_path)}, RecordDict(), {})
    reply = client_app.forward("train", message, context)
    assert re.fullmatch(r"site-error MESSAGE [0-9a-f]{6}", reply.error.reason)
    assert journal.read_journal(tmp_path)[-1]["error"] == reply.error.reason


def test_the_digest_of_a_runs_settings_is_whole(tmp_path):
    """Two settings with the same 64 bits are found in an hour, and the second was not noted."""
    assert len(client_app._written_down(tmp_path, {"local_steps": 1})) == 64


def test_an_adapter_of_twenty_megabytes_costs_next_to_nothing_beside_its_bytes():
    content = RecordDict(
        {"arrays": ArrayRecord({"float32": Array(np.ones(5_000_000, np.float32))})}
    )
    here, there = socket.socketpair()
    with here, there:
        sent = []
        thread = threading.Thread(target=lambda: sent.append(send(there, {}, content)))
        thread.start()
        _, back = receive(here)
        thread.join()
    assert back == content
    assert sent[0] <= 20_000_000 + 1000


def test_the_process_of_a_message_loads_no_model_libraries():
    code = (
        "import sys, fedfora.deployment.client_app; "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
