"""How long two hosts take to notice what befalls one: every fault, on either host, with either way of numbering.

A program, not a test, for it takes some minutes: `python tests/launch/two_hosts_matrix.py [seconds [fault]]`, as
root. It prints a table of the seconds from the fault to the end of each launcher, and of what the survivor said; the
exit code is 1 if one of them took too long or did not say why. The arguments are `--node-timeout` (default: 5) and
how the faults' names begin that are to be tried (default: all).
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hosts
from hosts import Host

SCRIPT = """
import datetime, os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
rank = dist.get_rank()
dist.barrier()
Path(f"ready-{rank}").write_text(str(os.getpid()))
while True:
    dist.all_reduce(torch.ones(1))
    if Path(f"raise-{rank}").exists():
        raise ValueError("boom on purpose")
    if Path(f"hang-{rank}").exists():
        time.sleep(1000)
"""

NUMBERING = {
    "static": lambda number: ("--node-rank", str(number), "--master-addr", "hosta"),
    "c10d": lambda number: ("--rdzv-endpoint", "10.77.0.1:29400"),
}


@dataclass
class Fault:
    """What befalls a host.

    Attributes:
        act: Makes it happen.
        said: What the launchers have to say, with "{host}" and "{name}" for the host and its name.
        limit: Seconds until both launchers have to have ended, besides `--node-timeout` where that has to pass.
        waits: Whether it has to.
    """

    act: Callable[[Host], None]
    said: str
    limit: float
    waits: bool = False


def to_launcher(number: signal.Signals) -> Callable[[Host], None]:
    return lambda host: host.processes[0].send_signal(number)


def to_a_rank(number: signal.Signals) -> Callable[[Host], None]:
    return lambda host: os.kill(int(min(host.folder.glob("ready-*")).read_text()), number)


def tell_a_rank(word: str) -> Callable[[Host], None]:
    return lambda host: (host.folder / f"{word}-{min(host.folder.glob('ready-*')).name[6:]}").touch()


FAULTS = {
    "cable out": Fault(Host.unplug, "has not been heard of for", 5, waits=True),
    "launcher SIGKILL": Fault(to_launcher(signal.SIGKILL), "{name}", 5, waits=True),
    "launcher SIGSTOP": Fault(to_launcher(signal.SIGSTOP), "{name}", 5, waits=True),
    "launcher SIGTERM": Fault(to_launcher(signal.SIGTERM), "{name} was told to end by SIGTERM", 5),
    "rank raises": Fault(tell_a_rank("raise"), "(host {host}, pid", 5),
    "rank SIGKILL": Fault(to_a_rank(signal.SIGKILL), "was killed by SIGKILL", 5),
    "rank SIGSTOP": Fault(to_a_rank(signal.SIGSTOP), "(host {host}, pid", 4 + 10),
    "rank hangs": Fault(tell_a_rank("hang"), "kept the other ranks waiting for more than 4 s", 4 + 10),
}


def run(numbering: str, name: str, on: int, node_timeout: float) -> bool:
    """Let it happen, and print a line of the table."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder, hosts.two_hosts(Path(folder)) as pair:
        for number, host in enumerate(pair):
            (host.folder / "script.py").write_text(SCRIPT)
            options = ("--devices", "2", "--nnodes", "2", "--node-timeout", str(node_timeout))
            host.launch(*options, *NUMBERING[numbering](number), "script.py")
        for host in pair:
            host.wait_for("ready-*", 2)
        victim = pair[on]
        struck = [victim] if name.startswith("launcher SIG") and "TERM" not in name else []
        start = time.monotonic()
        fault.act(victim)
        limit = fault.limit + node_timeout * fault.waits
        ended = _ends([host for host in pair if host not in struck], start, limit)
        words = {}
        for host in pair:
            host.processes[0].kill()
            words[host.name] = host.processes[0].communicate()[1]
    said = fault.said.format(host=victim.name, name=f"host {victim.name} ({victim.address})")
    told = [host for host in pair if host not in struck and not (host is victim and "SIGTERM" in name)]
    well = all(ended[host.name] is not None for host in pair if host not in struck)
    well = well and all(said in words[host.name] for host in told)
    times = [f"{ended[host.name]:.1f}" if ended.get(host.name) is not None else "-" for host in pair]
    lines = [line for line in words[told[0].name].splitlines() if line.startswith(("host ", "rank "))]
    shown = lines[-1] if lines else words[told[0].name][-200:]
    sys.stdout.write(
        f"| {numbering} | {name} on {victim.name} | {' | '.join(times)} | {shown} |{'' if well else ' NOT WELL'}\n"
    )
    sys.stdout.flush()
    return well


def _ends(watched: list[Host], start: float, limit: float) -> dict[str, float | None]:
    """Seconds until the launcher of each ended; None where it did not in time."""
    ended: dict[str, float | None] = {host.name: None for host in watched}
    while None in ended.values() and time.monotonic() - start < limit:
        for host in watched:
            if ended[host.name] is None and host.processes[0].poll() is not None:
                ended[host.name] = time.monotonic() - start
        time.sleep(0.02)
    return ended


def main() -> int:
    """Run all; the exit code."""
    reason = hosts.why_not()
    if reason is not None:
        sys.stderr.write(f"{reason}\n")
        return 2
    node_timeout = float(sys.argv[1]) if len(sys.argv) > 1 else 5
    chosen = sys.argv[2] if len(sys.argv) > 2 else ""
    sys.stdout.write(
        "| numbering | fault | hosta ends after s | hostb ends after s | what is said |\n|---|---|---|---|---|\n"
    )
    results = [
        run(numbering, name, on, node_timeout)
        for numbering in NUMBERING
        for name in FAULTS
        if name.startswith(chosen)
        for on in (0, 1)
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
