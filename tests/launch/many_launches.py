"""Many launches at the same time, round after round: none may fail for a port, or listen beyond the machine.

    python tests/launch/many_launches.py --launches 20 --rounds 10 --way cli

Every launch has two ranks, which meet and add up their numbers; one rank of each says on which addresses its run
listens. Ends with a line of figures; the exit code is 1 if any launch failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = {"127.0.0.1", "::1"}

WORK = """
import os, sys
import psutil, torch, torch.distributed as dist
from datetime import timedelta
from lightlite import distributed

def listening(pid):
    run = psutil.Process(pid)
    return {
        connection.laddr.ip
        for process in (run, *run.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

def work(ranks):
    distributed.join(ranks, "gloo", timedelta(minutes=5))
    total = distributed.all_reduce(torch.tensor([ranks.rank + 1.0]), "sum")
    found = listening(int(sys.argv[1]) or os.getpid()) if ranks.rank == 0 else set()
    distributed.barrier()
    return total.item(), found
"""

CLI = (
    WORK
    + """
from lightlite.launch.environment import TorchElasticEnvironment

sys.argv[1] = str(os.getppid())
total, found = work(TorchElasticEnvironment().ranks())
if os.environ["RANK"] == "0":
    print(total, *sorted(found))
"""
)

SCRIPT = (
    WORK
    + """
from lightlite.launch.helpers import HelperPool

total, found = HelperPool(2).run(work)
print(total, *sorted(found))
"""
)


@dataclass(frozen=True)
class Round:
    """What became of the launches of one round.

    Attributes:
        failures: Exit code and last words of those that failed.
        listened: Addresses that any of them listened on.
        seconds: Until all had ended.
    """

    failures: list[str]
    listened: set[str]
    seconds: float


def launch_together(launches: int, way: str, folder: Path) -> Round:
    """Start `launches` runs at once and wait for all.

    Args:
        launches: How many.
        way: "cli" or "script".
        folder: Where the script goes.
    """
    script = folder / f"{way}.py"
    script.write_text(CLI if way == "cli" else SCRIPT)
    options = ["-m", "lightlite.launch", "--devices", "2", "--accelerator", "cpu"] if way == "cli" else []
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, *options, str(script), "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for _ in range(launches)
    ]
    ends = [process.communicate() for process in processes]
    failures, listened = [], set()
    for process, (stdout, stderr) in zip(processes, ends, strict=True):
        total, *addresses = stdout.split() or [""]
        listened.update(addresses)
        if process.returncode or total != "3.0" or not addresses:
            failures.append(f"exit code {process.returncode}: {stdout}{stderr}")
    return Round(failures, listened, time.monotonic() - start)


def main() -> int:
    """Run the rounds; returns the exit code."""
    parser = argparse.ArgumentParser(description="Many launches at the same time, none of which may fail.")
    parser.add_argument("--launches", type=int, default=20, help="at once (default: 20)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: 10)")
    parser.add_argument("--way", choices=("cli", "script"), default="cli", help="how they are launched (default: cli)")
    options = parser.parse_args()
    failed, listened = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            result = launch_together(options.launches, options.way, Path(folder))
            failed += len(result.failures)
            listened |= result.listened
            sys.stdout.write(f"round {number}: {len(result.failures)} failures, {result.seconds:.1f} s\n")
            sys.stdout.write("".join(f"{failure}\n" for failure in result.failures))
            sys.stdout.flush()
    launches = options.launches * options.rounds
    sys.stdout.write(f"{launches} launches ({options.way}): {failed} failed; listened on {sorted(listened)}\n")
    return int(failed > 0 or not listened <= LOOPBACK)


if __name__ == "__main__":
    sys.exit(main())
