"""Run as a program: a real site whose trainer misbehaves in some rounds.

    python bad_site.py site KIT '{"2": "nan", "3": "exception"}'

All else is what `fedfora site` runs.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

SILENCE_S = 10.0  # so that no test waits a minute for a trainer that hangs
PATIENT = "Jane Roe, born 1961"
_first = []


def copy_of(content):
    """Records of one's own, to be spoiled."""
    return RecordDict({name: type(record)(dict(record)) for name, record in content.items()})


def nan(content):
    arrays = content["arrays"]
    content["arrays"] = ArrayRecord(
        {k: Array(np.full_like(a.numpy(), np.nan)) for k, a in arrays.items()}
    )


def shape(content):
    arrays = content["arrays"]
    content["arrays"] = ArrayRecord({k: Array(a.numpy()[:-1]) for k, a in arrays.items()})


def weight(content):
    content["metrics"] = MetricRecord({**content["metrics"], "answer_tokens": 10**9})


def big(content):
    numbers = np.random.default_rng(0).random(150_000_000, np.float32)  # Flower packs equal ones
    content["arrays"] = ArrayRecord({"float32": Array(numbers)})


def exception(content):
    raise RuntimeError(f"cannot read the row of {PATIENT} in /srv/secret/rows.json")


def replay(content):
    for name, record in _first[0].items():
        content[name] = record


def silence(content):
    time.sleep(10_000)


def stop(content):
    os.kill(os.getpid(), signal.SIGSTOP)


def die(content):
    os._exit(1)


FAULTS = {
    name: globals()[name]
    for name in ("nan", "shape", "weight", "big", "exception", "replay", "silence", "stop", "die")
}


def bad(honest, faults):
    """Return an app that answers as the honest one does, and spoils it in some rounds."""

    def app(message, context):
        record = message.content.get("config", ConfigRecord())
        name = faults.get(str(record.get("round-index", -1) + 1))
        training = message.metadata.message_type == "train"
        if training and name == "die":
            die(None)
        reply = honest(message, context)
        if training:
            content = copy_of(reply.content)
            _first.append(reply.content)
            if name is not None:
                FAULTS[name](content)
            reply = Message(content, reply_to=message)
        return reply

    return app


def site(kit, faults):
    """Run the site with another trainer."""
    from fedfora.cli.console import log_line
    from fedfora.deployment import site
    from fedfora.deployment.kit import SiteKit, read_kit
    from fedfora.deployment.supervisor import HEARTBEAT, HeartbeatMonitor

    honest_children = site.children

    def children(read):
        trainer, *others = honest_children(read)
        words = [sys.executable, __file__, "trainer", kit, faults]
        watch = HeartbeatMonitor(read.state / HEARTBEAT, silence_s=SILENCE_S)
        own = {"after_start": watch.begin, "trouble": watch.problem}
        return [replace(trainer, command=lambda: words, **own), *others]

    site.children = children
    site.run_site(read_kit(kit, SiteKit), log_line)


def trainer(kit, faults):
    """Run the trainer."""
    from fedfora.deployment import site, trainer

    make = trainer.make_client_app
    trainer.make_client_app = lambda: bad(make(), json.loads(faults))
    site.main(kit)


if __name__ == "__main__":
    what, kit, faults = sys.argv[1:]
    {"site": site, "trainer": trainer}[what](str(Path(kit)), faults)
