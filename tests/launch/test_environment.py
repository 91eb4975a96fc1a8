"""Recognising who started this process, from the environment variables that they are documented to set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightlite as pl
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import ClusterEnvironment
from lightlite.launch.environment import (
    KubernetesEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SlurmEnvironment,
    TorchElasticEnvironment,
    expand_counts,
    expand_hosts,
)
from lightlite.registry import EnvironmentRegistry
from lightlite.utilities.rank_zero import rank_zero_only

PREFIXES = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_", "JSM_", "LSB_", "PET_", "TORCHELASTIC_", "MASTER_")

ELASTIC = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
LSF = {
    "JSM_NAMESPACE_RANK": "3",
    "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "2",
    "LSB_JOBID": "9",
    "LSB_MCPU_HOSTS": "batch5 1 c699c010 16 c699c011 16",
}
POD = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in ELASTIC:
            monkeypatch.delenv(name)


def put(monkeypatch: pytest.MonkeyPatch, *variables: dict[str, str], without: str = "") -> None:
    for name, value in {name: value for group in variables for name, value in group.items()}.items():
        if name != without:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (ELASTIC, "torchelastic"),
        (SLURM, "slurm"),
        (OPEN_MPI, "mpi"),
        (LSF, "lsf"),
        ({**LSF, **OPEN_MPI}, "lsf"),  # jsrun sets up MPI programs, too
        (POD, "kubernetes"),
        ({}, None),
    ],
)
def test_exactly_one_environment_recognises_its_variables(
    variables: dict[str, str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, variables)
    detected = [each for each in EnvironmentRegistry.names() if EnvironmentRegistry.get(each).detect()]
    assert detected == ([name] if name else [])
    assert not name or EnvironmentRegistry.get(name).name == name


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "3"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        {"MASTER_ADDR": "host0", "MASTER_PORT": "29500"},
        {"PET_NPROC_PER_NODE": "4", "PET_NNODES": "2", "PET_RDZV_ENDPOINT": "job-master-0:29400"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"},
    ],
    ids=["RANK", "world size", "master", "PET", "salloc"],
)
def test_what_is_left_over_in_a_shell_makes_no_ranks(
    left_over: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, left_over)
    assert [each for each in EnvironmentRegistry.names() if EnvironmentRegistry.get(each).detect()] == []
    trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=True)
    assert (trainer.world_size, trainer.global_rank, rank_zero_only.rank) == (1, 0, 0)


class HouseEnvironment(ClusterEnvironment):
    """What somebody writes for a launcher of their own."""

    name = "house"
    command = "house -n {processes} python train.py"

    @staticmethod
    def detect() -> bool:
        return False

    def ranks(self) -> Ranks:
        return Ranks(1, 1, 0, 2, 2)


def test_an_environment_given_as_a_plugin_goes_before_what_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, OPEN_MPI)
    trainer = pl.Trainer(accelerator="cpu", devices=2, plugins=[HouseEnvironment()], logger=False, barebones=True)
    assert (trainer.world_size, trainer.num_nodes, trainer.hardware.ranks.rank) == (2, 1, 1)
    with pytest.raises(
        MisconfigurationException,
        match=r"devices=3 expects 3 processes.*house started 2.*`house -n 3 python train.py`, or give devices=2",
    ):
        pl.Trainer(accelerator="cpu", devices=3, plugins=HouseEnvironment(), logger=False, barebones=True)


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, ELASTIC)
    assert TorchElasticEnvironment().ranks() == Ranks(3, 1, 1, 4, 2)


def test_variables_set_by_hand_on_one_machine_need_no_local_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert TorchElasticEnvironment().ranks() == Ranks(1, 1, 0, 2, 2)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"RANK": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' must be a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_contradicting_variables_are_named_with_their_values(
    changed: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, ELASTIC, changed)
    with pytest.raises(MisconfigurationException, match=told):
        TorchElasticEnvironment().ranks()


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM)
    environment = SlurmEnvironment()
    assert environment.ranks() == Ranks(5, 1, 1, 8, 4)
    environment.export()
    assert os.environ["MASTER_ADDR"] == "gpu07"
    port = int(os.environ["MASTER_PORT"])
    assert 20000 <= port < 30000
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    environment.export()
    assert int(os.environ["MASTER_PORT"]) != port  # two steps of a job may share a machine


def test_slurm_with_uneven_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM, {"SLURM_TASKS_PER_NODE": "5,3"})
    assert SlurmEnvironment().ranks() == Ranks(5, 1, 1, 8, 3)


def test_master_variables_set_by_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM, {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1234"})
    SlurmEnvironment().export()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("elsewhere", "1234")


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_JOB_NAME": "bash"},
        {"SLURM_JOB_NAME": "interactive"},
        {"OMPI_COMM_WORLD_SIZE": "8"},
        {"SLURM_STEP_ID": "4294967290"},  # the interactive step of salloc, whatever the job is called
        {"SLURM_PTY_PORT": "40123"},  # srun --pty
    ],
)
def test_slurm_is_not_detected_in_a_shell_or_under_mpirun(
    changed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, SLURM, changed)
    assert not SlurmEnvironment.detect()


def test_a_batch_script_outside_of_srun_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, without="SLURM_STEP_ID")
    assert not SlurmEnvironment.detect()


def test_slurm_nodes_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM, {"SLURM_NODEID": "2"})
    with pytest.raises(MisconfigurationException, match=r"SLURM_TASKS_PER_NODE=4\(x2\) knows 2 nodes.*SLURM_NODEID=2"):
        SlurmEnvironment().ranks()


@pytest.mark.parametrize(
    ("notation", "hosts"),
    [
        ("node[01-03,7],x", ["node01", "node02", "node03", "node7", "x"]),
        ("single", ["single"]),
        ("a1,b2", ["a1", "b2"]),
        ("rack[1-2]-node[09-10]", ["rack1-node09", "rack1-node10", "rack2-node09", "rack2-node10"]),
        ("n[8-11].cluster", ["n8.cluster", "n9.cluster", "n10.cluster", "n11.cluster"]),
        ("", []),
    ],
)
def test_host_lists_expand(notation: str, hosts: list[str]) -> None:
    assert expand_hosts(notation) == hosts


def test_task_counts_expand() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
)
def test_mpi_flavours(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, dict(zip(names, ("3", "4", "1", "2"), strict=True)))
    assert MPIEnvironment.detect()
    assert MPIEnvironment().ranks() == Ranks(3, 1, 1, 4, 2)


def test_mpi_without_local_ranks_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, {"PMI_RANK": "0", "PMI_SIZE": "2"})
    with pytest.raises(MisconfigurationException, match="MPI_LOCALRANKID is not set"):
        MPIEnvironment().ranks()


def test_mpi_on_several_machines_asks_for_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, OPEN_MPI)
    with pytest.raises(MisconfigurationException, match=r"4 ranks on 2 machines.*mpirun -x MASTER_ADDR=host0"):
        MPIEnvironment().export()
    monkeypatch.setenv("MASTER_ADDR", "host0")
    MPIEnvironment().export()
    assert os.environ["MASTER_ADDR"] == "host0"


def test_lsf(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, LSF)
    assert LSFEnvironment().ranks() == Ranks(3, 1, 1, 4, 2)
    LSFEnvironment().export()
    assert os.environ["MASTER_ADDR"] == "c699c010"


def test_lsf_prefers_the_rank_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rankfile = tmp_path / "ranks"
    rankfile.write_text("login\nalpha\nalpha\nbeta\nbeta\n")
    put(monkeypatch, LSF, {"LSB_DJOB_RANKFILE": str(rankfile)})
    LSFEnvironment().export()
    assert os.environ["MASTER_ADDR"] == "alpha"


def test_a_pod_is_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, POD)
    assert KubernetesEnvironment().ranks() == Ranks(1, 0, 1, 3, 1)


def test_a_pod_that_should_run_several_processes_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, POD, {"PET_NPROC_PER_NODE": "4"})
    with pytest.raises(MisconfigurationException, match=r"PET_NPROC_PER_NODE=4.*torchrun"):
        KubernetesEnvironment().ranks()


def test_tasks_on_one_machine_meet_on_loopback_again_and_again() -> None:
    script = """
import os, psutil, torch
from lightlite import distributed
from lightlite.launch.environment import SlurmEnvironment
environment = SlurmEnvironment()
for _ in range(2):
    environment.export()
    assert distributed.join(environment.ranks(), "gloo")
    print(distributed.all_reduce(torch.tensor([1.0]), "sum").item())
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    assert set(listening) <= {"127.0.0.1"}, listening
    distributed.leave()
"""
    tasks = []
    for task in ("0", "1"):
        step = {"SLURM_PROCID": task, "SLURM_LOCALID": task, "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
        env = {**os.environ, **SLURM, **step, "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_ID": str(os.getpid())}
        tasks.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env))
    assert [task.communicate(timeout=60)[0] for task in tasks] == ["2.0\n2.0\n"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the interface is called lo on Linux")
def test_ranks_on_several_machines_use_the_interface_that_leads_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, POD, {"MASTER_ADDR": "127.0.0.1", "NCCL_SOCKET_IFNAME": "of-the-user"})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back, whatever is set below
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    EnvironmentRegistry.create("kubernetes").export()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "of-the-user"
