"""A YAML file with a RabbitMQ broker to what FATE takes for it.

host: 127.0.0.1           the broker this party talks to
port: 5672                AMQP
mng_port: 15672           the management plugin, by which FATE makes queues
base_user: fate           an administrator there
base_password: ...
mode: client              all parties at one broker; or replication, one broker each
route_table: {"10000": {host: ..., port: ...}}   with replication: the others' brokers by party
"""

import time
from pathlib import Path
from typing import Any

import yaml

from fedfora.integrations.fate.settings import Party

MODES = ("client", "replication")
REQUIRED = ("host", "port", "mng_port", "base_user", "base_password")
OPTIONAL: dict[str, Any] = {
    "mode": "client",
    "route_table": {},
    "max_message_size": 1_048_576,  # bytes; FATE cuts what is longer
    "rabbitmq_run": {},
    "connection": {},
}


def read_broker(path: str) -> dict[str, Any]:
    """Return FATE's `federation_conf` for the broker that a file describes.

    Raises:
        ValueError: Naming the file and the key that is missing, unknown or wrong.
    """
    if not Path(path).is_file():
        raise ValueError(f"--rabbitmq {path}: no such file")
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--rabbitmq {path}: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"--rabbitmq {path}: expected keys and values")
    for key in REQUIRED:
        if key not in said:
            raise ValueError(f"--rabbitmq {path}: {key} is missing")
    for key in said:
        if key not in (*REQUIRED, *OPTIONAL):
            known = ", ".join((*REQUIRED, *OPTIONAL))
            raise ValueError(f"--rabbitmq {path}: unknown key {key}; there are {known}")
    options = OPTIONAL | said
    for key in ("port", "mng_port"):
        if not isinstance(options[key], int) or not 0 < options[key] < 65_536:
            raise ValueError(f"--rabbitmq {path}: {key} {options[key]!r} is no port")
    if options["mode"] not in MODES:
        raise ValueError(f"--rabbitmq {path}: mode {options['mode']}: one of {', '.join(MODES)}")
    if options["mode"] == "replication" and not options["route_table"]:
        raise ValueError(f"--rabbitmq {path}: mode replication needs a route_table")
    place = "federation.rabbitmq"
    return {place: options, f"{place}.host": options["host"], f"{place}.port": options["port"]}


def open_vhosts(federation: Any, party: Party, parties: list[Party], *, timeout_s: float) -> None:
    """Make the virtual hosts of a party and wait until queues can be made in them.

    FATE makes them when the first message comes by and does not look whether it could: right after
    another party has made the same one the broker refuses queues in it for a moment.

    Raises:
        ValueError: If the broker refuses for longer than `timeout_s`.
    """
    from fate.arch.federation.message_queue import Party as FateParty

    manager = federation._rabbit_manager
    for role, party_id in parties:
        if (role, party_id) == party:
            continue
        vhost = federation._get_vhost(FateParty(role, party_id))
        manager.create_vhost(vhost)
        manager.add_user_to_vhost(federation.session_id, vhost)
        give_up = time.monotonic() + timeout_s
        while not manager.create_queue(vhost, "fedfora-opened"):
            if time.monotonic() > give_up:
                raise ValueError(
                    f"--rabbitmq: the broker at {manager.endpoint} makes no queue in {vhost}: are "
                    "base_user and base_password an administrator's there?"
                )
            time.sleep(0.2)
