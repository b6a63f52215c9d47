"""A federation of real processes over network namespaces: one host each, and what lies between.

    coordinator, sites, outsider -- bridge        10.77.0.0/24
    the last site -- proxy -- bridge              no other way out: HTTP CONNECT through squid
    a site -- `slow_line.py` -- bridge            where the kernel has no netem

Needs root. Hosts share a file system, so accounts and directories are not kept apart here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from fedfora.deployment.supervisor import Child
from real_federation import RealFederation

SLOW_LINE = Path(__file__).with_name("slow_line.py")
NAME = "coordinator.test"
SQUID = """
http_port 3128
visible_hostname proxy
acl gate dstdomain coordinator.test
acl gate_port port 8443
acl CONNECT method CONNECT
http_access allow CONNECT gate gate_port
http_access deny all
cache deny all
shutdown_lifetime 0
pid_filename {place}/squid.pid
access_log stdio:{place}/squid-access.log
cache_log {place}/squid-cache.log
coredump_dir {place}
cache_effective_user proxy
"""


def run(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True)


class Network:
    """Namespaces on a bridge of their own; the machine's own network is not touched."""

    def __init__(self, prefix):
        self.prefix = prefix
        self.names = []
        self.add("hub")
        self.inside("hub", "ip", "link", "add", "bridge", "type", "bridge")
        self.inside("hub", "ip", "link", "set", "bridge", "up")

    def add(self, name):
        run("ip", "netns", "add", self.full(name))
        self.names.append(name)
        self.inside(name, "ip", "link", "set", "lo", "up")

    def full(self, name):
        return f"{self.prefix}-{name}"

    def command(self, name, *words):
        return ["ip", "netns", "exec", self.full(name), *words]

    def inside(self, name, *words, check=True):
        return run(*self.command(name, *words), check=check)

    def host(self, name, number, on="hub", net="10.77.0", device="eth0"):
        """Join a host to the bridge, or to another host."""
        if name not in self.names:
            self.add(name)
        end = f"to-{name}"[:15]
        run(
            "ip",
            "link",
            "add",
            f"v{os.getpid() % 10000}",
            "type",
            "veth",
            "peer",
            "name",
            "fedpeer",
        )
        run(
            "ip", "link", "set", f"v{os.getpid() % 10000}", "netns", self.full(name), "name", device
        )
        run("ip", "link", "set", "fedpeer", "netns", self.full(on), "name", end)
        self.inside(name, "ip", "addr", "add", f"{net}.{number}/24", "dev", device)
        self.inside(name, "ip", "link", "set", device, "up")
        if on == "hub":
            self.inside("hub", "ip", "link", "set", end, "master", "bridge")
        self.inside(on, "ip", "link", "set", end, "up")
        return end

    def knows(self, name, address):
        """Let a host know the coordinator's name."""
        place = Path("/etc/netns") / self.full(name)
        place.mkdir(parents=True)
        (place / "hosts").write_text(f"127.0.0.1 localhost\n{address} {NAME}\n")

    def cut(self, name, yes):
        """Pull a host's cable, or put it back."""
        self.inside("hub", "ip", "link", "set", f"to-{name}"[:15], "down" if yes else "up")

    def slow(self, name, delay_s, loss):
        """Delay each frame of a host, either way, and lose some; return what does it."""
        end = f"to-{name}"[:15]
        words = ("netem", "delay", f"{1000 * delay_s:g}ms", "loss", f"{100 * loss:g}%")
        done = self.inside("hub", "tc", "qdisc", "add", "dev", end, "root", *words, check=False)
        if done.returncode == 0:
            self.inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", *words)
            return None
        self.inside("hub", "ip", "link", "set", end, "nomaster")
        self.inside("hub", "ip", "link", "add", "far", "type", "veth", "peer", "name", "near")
        for device in ("near", "far"):
            self.inside("hub", "ip", "link", "set", device, "up")
        self.inside("hub", "ip", "link", "set", "far", "master", "bridge")
        here = [sys.executable, str(SLOW_LINE)]
        for where, device in ((name, "eth0"), ("hub", "near"), ("hub", "far")):
            self.inside(where, *here, "plain", device)
        words = [*here, "forward", end, "near", str(delay_s), str(loss)]
        line = subprocess.Popen(self.command("hub", *words), stdout=subprocess.PIPE, text=True)
        line.stdout.readline()
        return line

    def remove(self):
        for name in self.names:
            run("ip", "netns", "del", self.full(name), check=False)
            shutil.rmtree(Path("/etc/netns") / self.full(name), ignore_errors=True)


class HostsFederation(RealFederation):
    """Every process in its host's namespace; the last site has no way out but a proxy."""

    def __init__(self, place, settings, sites, quorum):
        address = {"host": NAME, "port": 8443, "superlink_port": 9092}
        super().__init__(place, settings, sites, quorum, address=address)
        self.names = list(sites)
        self.network = Network(f"fed{os.getpid()}")
        self.helpers, self.proxy_log = [], place / "no-proxy" / "log"
        self.hosts = {"coordinator": "c", **{name: f"s{i}" for i, name in enumerate(sites)}}
        self.network.host("c", 1)
        self.network.host("outsider", 66)
        for number, name in enumerate(self.names[:-1], 2):
            self.network.host(self.hosts[name], number)
        last = self.hosts[self.names[-1]]
        self.network.host("proxy", 9)
        self.network.host(last, 2, on="proxy", net="10.78.0")
        self.network.inside("proxy", "ip", "addr", "add", "10.78.0.1/24", "dev", f"to-{last}"[:15])
        for host in ("proxy", "outsider", *(h for h in self.hosts.values() if h != last)):
            self.network.knows(host, "127.0.0.1" if host == "c" else "10.77.0.1")

    def start_proxy(self):
        """Start squid, which insists on an account of its own."""
        place = Path(tempfile.mkdtemp(prefix="squid-"))
        shutil.chown(place, "proxy")
        (place / "squid.conf").write_text(SQUID.format(place=place))
        words = ["squid", "-N", "-n", self.network.prefix, "-f", str(place / "squid.conf")]
        self.helpers.append(subprocess.Popen(self.network.command("proxy", *words)))
        self.proxy_log = place / "squid-access.log"

    def start(self, name, *words):
        host = self.hosts[name]
        command = self.network.command(host, sys.executable, *words)
        proxied = name == self.names[-1]
        variables = {"https_proxy": "http://10.78.0.1:3128"} if proxied else {}
        child = Child(name, partial(list, command), self.place / "logs" / f"{name}.log", variables)
        child.start()
        self.children[name] = child
        return child

    def check(self, name):
        """What `fedfora check site` says at a site's host."""
        words = ["-m", "fedfora", "check", "site", "--kit", str(self.site_kit(name))]
        proxied = name == self.names[-1]
        env = {**os.environ, **({"https_proxy": "http://10.78.0.1:3128"} if proxied else {})}
        command = self.network.command(self.hosts[name], sys.executable, *words)
        return subprocess.run(command, capture_output=True, text=True, env=env).stdout

    def stop(self):
        super().stop()
        for helper in self.helpers:
            helper.terminate()
            helper.wait(60)
            if helper.stdout is not None:
                helper.stdout.close()
        self.network.remove()
        shutil.rmtree(self.proxy_log.parent, ignore_errors=True)
