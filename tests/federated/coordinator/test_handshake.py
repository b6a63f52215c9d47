"""Most sites must mean the same base and adapter; who does not is left out, and named."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedfora.federated.coordinator.handshake import agree
from fedfora.federated.engines.embedded import EmbeddedGrid
from fedfora.federated.wire.transport import Layout

LAYOUTS = {name: Layout(((f"{name}.A", (2, 3)),)) for name in ("x", "y")}
DIGESTS = {layout.digest: name for name, layout in LAYOUTS.items()}


def world(*sites):
    """Sites by base and layout; each sends an adapter of numbers that are its own index."""

    def app(message, context):
        index = int(context.node_config["partition-id"])
        base, layout = sites[index]
        content = RecordDict(
            {
                "site": ConfigRecord(
                    {
                        "index": index,
                        "name": f"site-{index}",
                        "rows": 5,
                        "rank": 2,
                        "data-digest": "",
                        "base-fingerprint": base,
                        "layout-digest": LAYOUTS[layout].digest,
                    }
                )
            }
        )
        if message.content["ask"]["adapter"]:
            content["fresh"] = ArrayRecord({"a": Array(np.full(6, index, np.float32))})
            form = {"layout": LAYOUTS[layout].to_json(), "adapter-config": "{}", "record": "{}"}
            content["form"] = ConfigRecord(form)
        return Message(content, reply_to=message)

    return EmbeddedGrid(app, [{"partition-id": i} for i in range(len(sites))], {})


def agreed(*sites, base=None):
    """Names of those who take part, who is left out, and whose adapter it is."""
    absent = {}
    agreement = agree(world(*sites), on_absent=absent.__setitem__, base_fingerprint=base)
    sender = int(agreement.first["a"].numpy()[0])
    taking_part = [site.index for site in agreement.sites]
    assert agreement.base_fingerprint == sites[sender][0]
    assert DIGESTS[agreement.layout.digest] == sites[sender][1]
    return taking_part, absent, sender


@pytest.mark.parametrize("odd", range(3))
def test_a_site_with_another_base_is_left_out_and_its_adapter_is_not_used(odd):
    sites = [("ours", "x")] * 3
    sites[odd] = ("another", "x")
    taking_part, absent, sender = agreed(*sites)
    assert taking_part == [i for i in range(3) if i != odd]
    assert absent == {f"site-{odd}": "its base-fingerprint is another, not ours"}
    assert sender != odd


def test_a_site_that_means_another_adapter_is_left_out():
    taking_part, absent, _ = agreed(("ours", "y"), ("ours", "x"), ("ours", "x"))
    assert taking_part == [1, 2]
    assert "layout-digest" in absent["site-0"]


@pytest.mark.parametrize(
    "sites",
    [
        [("a", "x"), ("b", "x")],
        [("a", "x"), ("a", "x"), ("b", "x"), ("b", "x")],
        [("a", "x"), ("b", "x"), ("c", "x")],
        [("a", "x"), ("a", "x"), ("b", "x"), ("c", "x")],
    ],
)
def test_without_a_majority_nobody_is_left_out_and_nothing_begins(sites):
    with pytest.raises(ValueError, match="differ in their base-fingerprint") as stopped:
        agreed(*sites)
    assert all(f"site-{i}" in str(stopped.value) for i in range(len(sites)))


def test_adapters_without_a_majority_are_named_as_what_differs():
    with pytest.raises(ValueError, match="differ in their layout-digest"):
        agreed(("a", "x"), ("a", "y"))


def test_a_run_that_goes_on_keeps_its_base_whatever_most_sites_hold_now():
    sites = [("new", "x"), ("new", "x"), ("old", "x")]
    assert agreed(*sites, base="old")[0] == [2]
    assert agreed(*sites)[0] == [0, 1]


def test_a_run_whose_base_nobody_holds_hears_what_most_hold():
    """Who resumes it then says that it began on another."""
    assert agreed(("new", "x"), ("new", "x"), base="old")[0] == [0, 1]
