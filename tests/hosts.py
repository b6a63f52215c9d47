"""A federation of real processes over network namespaces: one host each, and what lies between.

    coordinator, sites, outsider -- bridge        10.77.0.0/24
    the last site -- proxy -- bridge              no other way out: HTTP CONNECT through squid
    a site -- `slow_line.py` -- bridge            where the kernel has no netem

Needs root. Hosts share a file system; what is kept apart by accounts is tried in `SplitSite`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedfora.deployment.flower_processes import free_port
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
        place.mkdir(parents=True, exist_ok=True)
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


# In a namespace of its own a process may write below one directory and in /var/tmp alone; a Python
# that lies where only its owner may look is shown to it.
ALONE = """
mkdir -p "$2"; mount --bind "$1" "$1"; mount -t tmpfs -o mode=1777 tmpfs /var/tmp
if [ -n "$4" ]; then
    mount --bind "$3" "$2"; mount -t tmpfs -o mode=755 tmpfs "$4"
    mkdir "$3"; mount --bind "$2" "$3"; mount -o remount,bind,ro "$4"
fi
mount -o remount,bind,ro /
shift 4; exec "$@"
"""


def as_account(account, place, *words, network=True):
    """The words that run others as an account with its groups and no other rights.

    All but `place` is read only. Without `network` there is none, not even loopback.
    """
    python = Path(sys.executable).resolve()
    hidden = [each for each in python.parents if not each.stat().st_mode & 0o001][-1:]
    seen = [each / python.relative_to(each).parts[0] for each in hidden]
    shown = place / f"python-of-{account}-{len(list(place.iterdir()))}"
    paths = [str(path) for path in (place, shown, *(seen + hidden or ["", ""]))]
    change = ["setpriv", "--reuid", account, "--regid", account, "--init-groups"]
    change += ["--no-new-privs", "--bounding-set=-all", *words]
    alone = ["unshare", "--mount", *([] if network else ["--net"])]
    return [*alone, "sh", "-ec", ALONE, "sh", *paths, *change]


class SplitSite(RealFederation):
    """A federation of one site that was split as docs/site.md says; a third account is strange.

    Args:
        place: An empty directory that every account may enter.
        settings: Flags of the federation.
        rows: File with the site's rows.
        base: Directory with its base.
    """

    def __init__(self, place, settings, rows, base):
        self.rows, model = place / "rows.jsonl", place / "base"
        shutil.copy(rows, self.rows)
        shutil.copytree(base, model)
        run("chmod", "-R", "a+rX", str(model))
        sites = {"north": {"train_file": str(self.rows), "model_name_or_path": str(model)}}
        super().__init__(place, settings, sites)
        parts = ("rows", "net", "both", "guest")
        with_rows, with_network, group, guest = (f"fed{part}{os.getpid()}" for part in parts)
        self.accounts = [with_rows, with_network, guest]
        run("useradd", "--system", guest)
        kit = self.site_kit("north")
        names = {"rows": with_rows, "net": with_network, "site": group}
        names |= {"ROWS": str(self.rows), "kit": str(kit)}
        words = "|".join(names)
        page = (Path(__file__).parents[1] / "docs" / "site.md").read_text()
        script = "useradd" + page.split("```shell\nuseradd")[1].partition("```")[0]
        script = re.sub(rf"\b({words})\b(?!\.)", lambda match: names[match[1]], script)
        run("sh", "-c", script, check=False)
        kit.parents[1].chmod(0o711)

    def join(self):
        """Start `fedfora site` as both accounts; that with the rows has no network at all."""
        words = [sys.executable, "-m", "fedfora", "site", "--kit", str(self.site_kit("north"))]
        for account in self.accounts[:2]:
            network = account != self.accounts[0]
            command = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
            command += as_account(account, self.place, *words, network=network)
            log = self.place / "logs" / f"{account}.log"
            child = Child(account, partial(list, command), log, {"HOME": "/nonexistent"})
            child.start()
            self.children[account] = child

    def asked(self, account, *words):
        """What a Python program prints that an account runs."""
        command = as_account(account, self.place, sys.executable, *words)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stop(self):
        super().stop()
        for account in self.accounts:
            run("userdel", account, check=False)
        run("groupdel", f"fedboth{os.getpid()}", check=False)


SLURM = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={place}/munge/socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A cluster of one machine: this one.

    Args:
        place: An empty directory that belongs to root, as all above it.
    """

    def __init__(self, place):
        for name in ("munge", "state", "spool"):
            (place / name).mkdir(mode=0o711)
        munge, host = place / "munge", socket.gethostname().partition(".")[0]
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        text = SLURM.format(place=place, host=host, ports=[free_port(), free_port()])
        (place / "slurm.conf").write_text(text)
        self.env = {**os.environ, "SLURM_CONF": str(place / "slurm.conf")}
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        keys = [f"--{option}={munge / name}" for option, name in files.items()]
        words = {"munged": ["-F", *keys], "slurmctld": ["-D"], "slurmd": ["-D"]}
        self.daemons = []
        for name, options in words.items():
            with (place / f"{name}.log").open("wb") as log:
                self.daemons += [subprocess.Popen([name, *options], env=self.env, stderr=log)]

    def run(self, *words):
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True)
        return done.stdout + done.stderr

    def stop(self):
        """End its jobs and its daemons."""
        for words in (["--full", "--signal=KILL"], []):
            self.run("scancel", *words, "--user=root")
        give_up = time.monotonic() + 120
        while self.run("squeue", "--noheader") and time.monotonic() < give_up:
            time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(60)


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
        self.tell("c", "10.77.0.1")

    def tell(self, coordinator, address):
        """Let all hosts but the last site's know where the coordinator is; its proxy knows."""
        sites = [self.hosts[name] for name in self.names[:-1]]
        self.network.knows(coordinator, "127.0.0.1")
        for host in ("proxy", "outsider", *sites):
            self.network.knows(host, address)

    def lose_coordinator(self):
        """The coordinator's machine is lost without a word; another has its kit's files."""
        self.network.cut(self.hosts["coordinator"], True)
        self.end("coordinator", signal.SIGKILL)
        self.until(lambda: not self.pids(str(self.kit.directory)))
        elsewhere = self.place / "another" / "disk" / "kit"
        shutil.copytree(self.kit.directory, elsewhere)
        self.kit.directory.rename(self.place / "lost")
        self.done.kit = replace(self.kit, directory=elsewhere)
        self.hosts["coordinator"] = "d"
        self.network.host("d", 77)
        self.tell("d", "10.77.0.77")
        self.squid.send_signal(signal.SIGHUP)  # it reads the names of hosts when it is told to

    def start_proxy(self):
        """Start squid, which insists on an account of its own."""
        place = Path(tempfile.mkdtemp(prefix="squid-"))
        shutil.chown(place, "proxy")
        (place / "squid.conf").write_text(SQUID.format(place=place))
        words = ["squid", "-N", "-n", self.network.prefix, "-f", str(place / "squid.conf")]
        self.squid = subprocess.Popen(self.network.command("proxy", *words))
        self.helpers.append(self.squid)
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
