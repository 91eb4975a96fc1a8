"""Two machines, as two network namespaces: training as one, and the loss of one, of its launcher or of its cable."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import torch
from hosts import Host

pytestmark = pytest.mark.skipif(hosts.why_not() is not None, reason=str(hosts.why_not()))

Hosts = tuple[Host, Host]

TRAIN = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightlite as pl

class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.mse_loss(self.layer(batch[0]), batch[1]), batch_size=len(batch[0]))

    def predict_step(self, batch, index):
        return {"index": index, "rows": batch[0], "text": f"batch {index}"}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

torch.manual_seed(7)
x = torch.randn(101, 3)
data = TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))
model = Line()
trainer = pl.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)))
metrics = trainer.validate(model, DataLoader(data, batch_size=4), verbose=False)
predictions = trainer.predict(model, DataLoader(data, batch_size=4))
interfaces = [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
torch.save([model.state_dict(), metrics, predictions, interfaces], f"result-{trainer.global_rank}.pt")
"""

REDUCE = """
import os
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
Path(f"ready-{dist.get_rank()}").touch()
while True:
    dist.all_reduce(torch.ones(1))
"""

WITHOUT_TORCH = """
import os, sys, time
from pathlib import Path
rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
Path(f"ready-{world_size}-{rank}").write_text(str(os.getpid()))
while not Path("end").exists():
    if Path(f"fail-{rank}").exists():
        raise ValueError("boom on purpose")
    time.sleep(0.02)
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Hosts]:
    with hosts.two_hosts(tmp_path) as (first, second):
        yield first, second


def launch_on(host: Host, script: str, *options: str) -> subprocess.Popen[str]:
    (host.folder / "script.py").write_text(script)
    return host.launch("--devices", "2", *options, "script.py")


def launch_numbered(pair: Hosts, script: str, *options: str) -> list[subprocess.Popen[str]]:
    """As in the README: the same line on each but for the node rank. The first host is told by its name."""
    where = ("--nnodes", "2", "--master-addr", "hosta", "--master-port", "29400")
    return [launch_on(host, script, *where, "--node-rank", str(number), *options) for number, host in enumerate(pair)]


def end_within(process: subprocess.Popen[str], deadline: float) -> str:
    """The standard error of a launcher that has to end in time."""
    return process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1]


def test_two_hosts_with_two_ranks_each_train_as_four_ranks_of_one(pair: Hosts, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TRAIN)
    single = [sys.executable, "-m", "lightlite.launch", "--devices", "4", "--accelerator", "cpu", "script.py"]
    subprocess.run(single, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    expected = torch.load(tmp_path / "result-0.pt")

    for launcher in launch_numbered(pair, TRAIN):
        assert launcher.communicate(timeout=120)[0] == ""
        assert launcher.returncode == 0

    found = [torch.load(file) for host in pair for file in sorted(host.folder.glob("result-*.pt"))]
    assert len(found) == 4
    for weights, metrics, predictions, interfaces in found:
        assert interfaces == [hosts.INTERFACE] * 2
        torch.testing.assert_close(weights, expected[0])
        assert metrics[0]["loss"] == pytest.approx(expected[1][0]["loss"], rel=1e-6)
        assert [output["index"] for output in predictions] == list(range(26))
        assert [output["text"] for output in predictions] == [output["text"] for output in expected[2]]
        assert torch.equal(
            torch.cat([output["rows"] for output in predictions]), torch.cat([output["rows"] for output in expected[2]])
        )


def test_a_host_cut_off_is_noticed_on_both_sides(pair: Hosts) -> None:
    first, second = pair
    launchers = launch_numbered(pair, REDUCE, "--node-timeout", "4")
    for host in pair:
        host.wait_for("ready-*", 2)
    deadline = time.monotonic() + 4 + 5
    second.unplug()
    told = [end_within(launcher, deadline) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert told[0].splitlines()[-1] == "host hostb (10.77.0.2) has not been heard of for 4 s (--node-timeout)"
    meeting = "host hosta (10.77.0.1), where the machines meet,"
    assert told[1].splitlines()[-1] == f"{meeting} has not been heard of for 4 s (--node-timeout)"
    assert hosts.left_on(first, 1) == hosts.left_on(second, 1) == []


def test_machines_come_and_go(pair: Hosts) -> None:
    first, second = pair
    options = ("--nnodes", "1:2", "--max-restarts", "1", "--node-timeout", "3", "--rdzv-endpoint", "10.77.0.1:29400")
    stays = launch_on(first, WITHOUT_TORCH, *options)
    first.wait_for("ready-2-*", 2)
    leaves = launch_on(second, WITHOUT_TORCH, *options)
    second.wait_for("ready-4-*", 2)
    first.wait_for("ready-4-*", 2)
    for file in first.wait_for("ready-2-*", 2):
        file.unlink()

    leaves.kill()
    first.wait_for("ready-2-*", 2, seconds=3 + 3 + 10)
    assert hosts.left_on(second, 1) == []
    (first.folder / "end").touch()
    stderr = end_within(stays, time.monotonic() + 10)
    assert stays.returncode == 0, stderr
    assert "another machine joins; starting all ranks anew" in stderr
    assert "host hostb (10.77.0.2) has not been heard of for 3 s (--node-timeout); starting all ranks anew" in stderr


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "host hosta (10.77.0.1), where the machines meet, has gone: its launcher has ended"),
        (signal.SIGTERM, "host hosta (10.77.0.1) was told to end by SIGTERM"),
    ],
)
def test_the_end_of_the_first_launcher_ends_the_other(pair: Hosts, number: signal.Signals, told: str) -> None:
    launchers = launch_numbered(pair, WITHOUT_TORCH)
    for host in pair:
        host.wait_for("ready-4-*", 2)
    deadline = time.monotonic() + 5
    launchers[0].send_signal(number)
    assert end_within(launchers[1], deadline).splitlines()[-1] == told
    assert launchers[1].returncode == (1 if number == signal.SIGKILL else 143)


def test_a_rank_that_fails_on_one_host_is_told_on_both(pair: Hosts) -> None:
    launchers = launch_numbered(pair, WITHOUT_TORCH)
    for host in pair:
        host.wait_for("ready-4-*", 2)
    failing = (pair[1].folder / "ready-4-3").read_text()
    deadline = time.monotonic() + 5
    (pair[1].folder / "fail-3").touch()
    for launcher in launchers:
        lines = end_within(launcher, deadline).splitlines()
        assert launcher.returncode == 1
        assert f"rank 3 (host hostb, pid {failing}) failed with exit code 1:" in lines
        assert lines[-1] == "ValueError: boom on purpose"
    assert hosts.left_on(pair[0], 1) == hosts.left_on(pair[1], 1) == []


def test_hosts_that_were_not_started_alike_say_how(pair: Hosts) -> None:
    first, second = pair
    where = ("--rdzv-endpoint", "hosta:29400")
    launchers = [
        launch_on(first, WITHOUT_TORCH, "--nnodes", "2", *where),
        launch_on(second, WITHOUT_TORCH, "--nnodes", "3", *where, "--max-restarts", "1"),
    ]
    ends = [launcher.communicate(timeout=30) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    assert ends[0][1].splitlines()[-1] == ends[1][1].splitlines()[-1]
    assert "does not fit the run that host host" in ends[0][1]
    assert "--nnodes 2" in ends[0][1]
    assert "--nnodes 3" in ends[0][1]
    assert not list(first.folder.glob("ready-*"))
