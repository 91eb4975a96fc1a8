"""`two_hosts()`: two machines on this one. Each is a network namespace with its own address, host name and loopback.

A cable, a pair of virtual Ethernet devices, joins them; `Host.unplug` pulls it out. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INTERFACE = "eth1"
PORT = 29400

# The host sees its own name at a loopback address, as Debian and Ubuntu install it, and both names' real addresses.
SET_UP = """
hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"
"""


@dataclass
class Host:
    """One of the two machines.

    Attributes:
        name: Its host name.
        address: Its address on the cable.
        namespace: The network namespace it consists of.
        folder: Its working directory.
    """

    name: str
    address: str
    namespace: str
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a program here, in the host's folder. Its pid is that of the program itself."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", SET_UP, "sh"]
        hosts = str(self.folder / "hosts")
        process = subprocess.Popen(
            [*inside, self.name, hosts, *command],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def launch(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start `python -m lightlite.launch` here, on CPU ranks."""
        command = [sys.executable, "-m", "lightlite.launch", "--accelerator", "cpu", *arguments]
        return self.start(*command, **env)

    def unplug(self) -> None:
        """Pull the cable out: nothing comes or goes, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def wait_for(self, pattern: str, count: int = 1, seconds: float = 60) -> list[Path]:
        """Wait until `count` files in the host's folder match a pattern, while all its programs run."""
        deadline = time.monotonic() + seconds
        while len(found := sorted(self.folder.glob(pattern))) < count:
            assert time.monotonic() < deadline, f"{self.name}: {pattern} did not appear"
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended, [process.communicate() for process in ended]
            time.sleep(0.05)
        return found

    def pids(self) -> list[int]:
        """Whatever runs here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


def why_not() -> str | None:
    """Why there cannot be two hosts here; None where there can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's; this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces need root; run the tests as root to include these"
    missing = [program for program in ("ip", "unshare", "mount", "hostname") if shutil.which(program) is None]
    if missing:
        return f"not installed here: {', '.join(missing)} (packages iproute2, util-linux, hostname)"
    name = f"probe-{uuid.uuid4().hex[:8]}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "eth1", "type", "veth", "peer", "name", "eth2")
    except subprocess.CalledProcessError as error:
        return f"a network namespace with a veth pair cannot be made here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, "hosta" at 10.77.0.1 and "hostb" at 10.77.0.2. All that runs there ends with the context.

    Args:
        folder: Where each gets a folder of its own, by its name.
    """
    mark = uuid.uuid4().hex[:8]
    hosts = (
        Host("hosta", "10.77.0.1", f"hosta-{mark}", folder / "hosta"),
        Host("hostb", "10.77.0.2", f"hostb-{mark}", folder / "hostb"),
    )
    try:
        for host in hosts:
            host.folder.mkdir()
            others = "".join(f"{other.address} {other.name}\n" for other in hosts if other is not host)
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
            _ip("netns", "add", host.namespace)
        first, second = (host.namespace for host in hosts)
        _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            _end(host)


def _end(host: Host) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):
        for pid in host.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in host.processes:
        process.kill()
        process.communicate()
    subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def left_on(host: Host, seconds: float) -> list[str]:
    """The commands of what still runs on a host after so many seconds at most; empty as soon as nothing does."""
    deadline = time.monotonic() + seconds
    while running := [process for process in map(_process, host.pids()) if process is not None]:
        if time.monotonic() > deadline:
            return [" ".join(process.cmdline()) for process in running]
        time.sleep(0.05)
    return []


def _process(pid: int) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return process if process.status() != psutil.STATUS_ZOMBIE else None
    return None


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout
