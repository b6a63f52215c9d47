"""A private RabbitMQ for a test: own ports, own directories, gone with the test."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one in sbin wants to be root's
START_S = 120.0


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def broker(directory):
    """Run a broker and return what `--rabbitmq` names of it."""
    ports = {"port": free_port(), "mng_port": free_port(), "nodes": free_port()}
    home = directory / "home"
    home.mkdir(parents=True)
    (directory / "plugins").write_text("[rabbitmq_management].")
    (directory / "rabbitmq.conf").write_text(
        f"listeners.tcp.default = 127.0.0.1:{ports['port']}\n"
        f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {ports['mng_port']}\n"
    )
    environment = os.environ | {
        "HOME": str(home),
        "RABBITMQ_NODENAME": f"fedfora{ports['nodes']}@localhost",
        "RABBITMQ_DIST_PORT": str(ports["nodes"]),
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "logs"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "ERL_EPMD_PORT": str(free_port()),
    }
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(
            [SERVER],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(ports["mng_port"], process, directory)
        yield {
            "host": "127.0.0.1",
            "port": ports["port"],
            "mng_port": ports["mng_port"],
            "base_user": "guest",  # RabbitMQ's own first administrator, on loopback only
            "base_password": "guest",
        }
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
        epmd = ["epmd", "-port", environment["ERL_EPMD_PORT"], "-kill"]
        subprocess.run(epmd, capture_output=True, check=False)


def wait_for(port, process, directory):
    account = b64encode(b"guest:guest").decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/overview", headers={"Authorization": f"Basic {account}"}
    )
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError((directory / "output").read_text())
