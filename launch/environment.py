"""Who started this process as one rank of many, and which one it is."""

from __future__ import annotations

import os
import re
import subprocess
import zlib
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import ClusterEnvironment
from lightlite.launch import network
from lightlite.launch.network import LOOPBACK

FIRST_PORT, PORTS = 20000, 10000
"""Range of derived ports: below those that systems hand out to clients."""

SLURM_SPECIAL_STEPS = 0xFFFFFFF0
"""From here on Slurm numbers what is no step of srun: the batch script, an interactive shell."""

_loopback_store: TCPStore | None = None


class TorchElasticEnvironment(ClusterEnvironment):
    """Ranks made by `torchrun` or `python -m lightlite.launch`, or variables set by hand in their way."""

    name = "torchelastic"
    command = "torchrun --nnodes {nodes} --nproc-per-node {processes} train.py"

    @staticmethod
    def detect() -> bool:
        """Whether RANK, WORLD_SIZE and LOCAL_RANK are all set."""
        return _are_set("RANK", "WORLD_SIZE", "LOCAL_RANK")

    def ranks(self) -> Ranks:
        """This process's place.

        Raises:
            MisconfigurationException: Where the variables contradict one another, or MASTER_ADDR is missing.
        """
        rank, world_size, local_rank = _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK")
        first_machine = rank == local_rank and "GROUP_RANK" not in os.environ
        local_world_size = _number("LOCAL_WORLD_SIZE", world_size if first_machine else None)
        if world_size > 1:
            _require("MASTER_ADDR", "MASTER_PORT")
        return _checked(
            Ranks(
                rank=rank,
                local_rank=local_rank,
                node_rank=_number("GROUP_RANK", rank // max(1, local_world_size)),
                world_size=world_size,
                local_world_size=local_world_size,
            ),
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
        )

    def export(self) -> None:
        """The variables are there already; on several machines, gloo and NCCL learn which interface to use."""
        _choose_interface(self.ranks())


class KubernetesEnvironment(ClusterEnvironment):
    """Pods of a Kubernetes PyTorchJob that run one process each: RANK is the pod's."""

    name = "kubernetes"
    command = "torchrun --nnodes {nodes} --nproc-per-node {processes} train.py"

    @staticmethod
    def detect() -> bool:
        """Whether RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, and LOCAL_RANK is not."""
        return _are_set("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") and "LOCAL_RANK" not in os.environ

    def ranks(self) -> Ranks:
        """This pod's place.

        Raises:
            MisconfigurationException: Where the job asks for several processes in a pod but nothing started them.
        """
        rank, world_size = _number("RANK"), _number("WORLD_SIZE")
        processes = os.environ.get("PET_NPROC_PER_NODE", "1")
        if processes.isdigit() and int(processes) > 1:
            raise MisconfigurationException(
                f"PET_NPROC_PER_NODE={processes} asks for {processes} processes in this pod, but this one was started "
                f"alone (LOCAL_RANK is not set); start the script with `torchrun train.py`"
            )
        return _checked(Ranks(rank=rank, node_rank=rank, world_size=world_size), "RANK", "WORLD_SIZE")

    def export(self) -> None:
        """The variables are there already; gloo and NCCL learn which interface to use."""
        _choose_interface(self.ranks())


class SlurmEnvironment(ClusterEnvironment):
    """Tasks started by Slurm's `srun`."""

    name = "slurm"
    command = "srun --nodes {nodes} --ntasks-per-node {processes} python train.py"

    @staticmethod
    def detect() -> bool:
        """Whether this is a task of a job step.

        Not so in an interactive shell, in a batch script outside of srun (which has the variables of a task but is
        alone), and under an mpirun that uses srun to get to its hosts.
        """
        step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
        return (
            _are_set("SLURM_PROCID", "SLURM_NTASKS")
            and step.isdigit()
            and int(step) < SLURM_SPECIAL_STEPS
            and "SLURM_PTY_PORT" not in os.environ
            and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
            and not any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"))
        )

    @staticmethod
    def requeue() -> str:
        """`scontrol requeue` this job, where it is one of Slurm's: it starts again with the same script."""
        job = os.environ.get("SLURM_JOB_ID")
        if os.environ.get("SLURM_ARRAY_JOB_ID") and os.environ.get("SLURM_ARRAY_TASK_ID"):
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if not job:
            return ""
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"Slurm's job {job} could not be requeued: {error}"
        return f"Slurm's job {job} could not be requeued: {done.stderr.strip()}" if done.returncode else ""

    def ranks(self) -> Ranks:
        """This task's place.

        Raises:
            MisconfigurationException: Where the variables contradict one another.
        """
        node_rank = _number("SLURM_NODEID")
        return _checked(
            Ranks(
                rank=_number("SLURM_PROCID"),
                local_rank=_number("SLURM_LOCALID"),
                node_rank=node_rank,
                world_size=_number("SLURM_NTASKS"),
                local_world_size=self._local_world_size(node_rank),
            ),
            "SLURM_PROCID",
            "SLURM_NTASKS",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
            "SLURM_TASKS_PER_NODE",
            "SLURM_NTASKS_PER_NODE",
        )

    def export(self) -> None:
        """MASTER_ADDR is the first host of the step, MASTER_PORT comes from the ids of job and step."""
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or ""
        nodes = nodes or os.environ.get("SLURM_JOB_NODELIST", "")
        hosts = expand_hosts(nodes)
        step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
        _export(self.ranks(), hosts[0] if hosts else None, f"{os.environ.get('SLURM_JOB_ID', '')}.{step}")

    @staticmethod
    def _local_world_size(node_rank: int) -> int:
        for variable in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
            if variable in os.environ:
                counts = expand_counts(os.environ[variable])
                if node_rank >= len(counts):
                    raise MisconfigurationException(
                        f"{variable}={os.environ[variable]} knows {len(counts)} nodes, but SLURM_NODEID={node_rank}"
                    )
                return counts[node_rank]
        return _number("SLURM_NTASKS_PER_NODE")


class MPIEnvironment(ClusterEnvironment):
    """Processes started by `mpirun`: Open MPI, MVAPICH2, MPICH, Intel MPI."""

    name = "mpi"
    command = "mpirun -np {total} --map-by ppr:{processes}:node python train.py"

    FLAVOURS = (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    )

    @classmethod
    def _variables(cls) -> tuple[str, str, str, str] | None:
        """The names in use. A flavour that lacks only the local ones is taken where no other fits."""
        whole = (names for names in cls.FLAVOURS if _are_set(*names))
        partial = (names for names in cls.FLAVOURS if _are_set(*names[:2]))
        return next(whole, None) or next(partial, None)

    @staticmethod
    def detect() -> bool:
        """Whether one of the MPI implementations' variables for rank and size are set, and not by LSF's jsrun."""
        return MPIEnvironment._variables() is not None and not LSFEnvironment.detect()

    def ranks(self) -> Ranks:
        """This process's place; machines are taken to be filled one after the other (`--map-by slot`).

        Raises:
            MisconfigurationException: Where the variables contradict one another.
        """
        names = self._variables()
        if names is None:
            raise MisconfigurationException("this process was not started by mpirun: OMPI_COMM_WORLD_RANK is not set")
        rank, world_size, local_rank, local_world_size = map(_number, names)
        ranks = Ranks(rank, local_rank, rank // max(1, local_world_size), world_size, local_world_size)
        return _checked(ranks, *names)

    def export(self) -> None:
        """MASTER_ADDR cannot be known on several machines, and has to be set by the user.

        Raises:
            MisconfigurationException: Where it is not.
        """
        ranks = self.ranks()
        job = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "MV2_COMM_WORLD_JOBID")
        identity = next((os.environ[name] for name in job if name in os.environ), "")
        if not identity and ranks.num_nodes == 1:
            identity = str(os.getppid())
        _export(ranks, None, identity)


class LSFEnvironment(ClusterEnvironment):
    """Tasks started by LSF's `jsrun`."""

    name = "lsf"
    command = "jsrun --nrs {total} --tasks_per_rs 1 --rs_per_host {processes} python train.py"

    @staticmethod
    def detect() -> bool:
        """Whether JSM_NAMESPACE_RANK and JSM_NAMESPACE_SIZE are set."""
        return _are_set("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE")

    def ranks(self) -> Ranks:
        """This task's place.

        Raises:
            MisconfigurationException: Where the variables contradict one another.
        """
        names = ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE")
        rank, world_size, local_rank, local_world_size = map(_number, names)
        ranks = Ranks(rank, local_rank, rank // max(1, local_world_size), world_size, local_world_size)
        return _checked(ranks, *names)

    def export(self) -> None:
        """MASTER_ADDR is the first host that runs tasks; the launch node, which LSF lists first, runs none."""
        ranks = self.ranks()
        hosts = self._hosts()
        if len(hosts) > ranks.num_nodes:
            hosts = hosts[1:]
        _export(ranks, hosts[0] if hosts else None, os.environ.get("LSB_JOBID", ""))

    @staticmethod
    def _hosts() -> list[str]:
        rankfile = Path(os.environ.get("LSB_DJOB_RANKFILE", os.devnull))
        if rankfile.is_file():
            words = rankfile.read_text(encoding="utf-8").split()
        else:
            words = os.environ.get("LSB_MCPU_HOSTS", "").split()[::2]  # host, count, host, count, …
        return list(dict.fromkeys(words))


def expand_hosts(nodes: str) -> list[str]:
    """The host names in Slurm's notation: "node[01-03,7],x" means node01, node02, node03, node7, x."""
    hosts = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            endings = [text] if text else [number for part in ranges.split(",") for number in _expand_range(part)]
            names = [name + ending for name in names for ending in endings]
        hosts += names
    return hosts


def _expand_range(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def expand_counts(counts: str) -> list[int]:
    """The numbers in Slurm's notation: "2(x3),1" means 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _are_set(*names: str) -> bool:
    return all(name in os.environ for name in names)


def _require(*names: str) -> None:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise MisconfigurationException(f"this process is one of several ranks, but {' and '.join(missing)} is not set")


def _number(name: str, default: int | None = None) -> int:
    """The number in an environment variable.

    Raises:
        MisconfigurationException: Where it is not set and has no default, or is no number.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise MisconfigurationException(f"{name} is not set, although others of its kind are")
    if not text.strip().isdigit():
        raise MisconfigurationException(f"{name}={text!r} must be a number from 0")
    return int(text)


def _checked(ranks: Ranks, *names: str) -> Ranks:
    """`ranks`, if such a place exists.

    Raises:
        MisconfigurationException: Giving the variables and their values.
    """
    if (
        ranks.rank < ranks.world_size
        and ranks.local_rank < ranks.local_world_size <= ranks.world_size
        and ranks.local_rank <= ranks.rank
    ):
        return ranks
    values = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    raise MisconfigurationException(
        f"these environment variables contradict one another: {values}. Expected rank < world size and "
        f"local rank < ranks per machine <= world size; got {ranks.rank} < {ranks.world_size} and "
        f"{ranks.local_rank} < {ranks.local_world_size} <= {ranks.world_size}"
    )


def _export(ranks: Ranks, host: str | None, job: str) -> None:
    """Set MASTER_ADDR and MASTER_PORT unless the user did; on one machine, open the store there.

    Args:
        ranks: This process's place.
        host: Rank 0's machine; None if unknown, which does not matter where there is only one.
        job: What tells this run from others on the machine; the same on every rank.

    Raises:
        MisconfigurationException: For several machines and an unknown host.
    """
    single_machine = ranks.num_nodes == 1
    if single_machine and not _are_set("MASTER_ADDR"):
        os.environ["MASTER_ADDR"] = LOOPBACK
    elif host is not None:
        os.environ.setdefault("MASTER_ADDR", host)
    elif not _are_set("MASTER_ADDR"):
        raise MisconfigurationException(
            f"{ranks.world_size} ranks on {ranks.num_nodes} machines need the address of rank 0's machine: set "
            f"MASTER_ADDR (mpirun -x MASTER_ADDR=host0 …, jsrun -E MASTER_ADDR=host0 …)"
        )
    os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS))
    if single_machine and os.environ["MASTER_ADDR"] == LOOPBACK and ranks.world_size > 1:
        _meet_on_loopback(ranks.rank == 0)
    _choose_interface(ranks)


def _choose_interface(ranks: Ranks) -> None:
    if ranks.num_nodes > 1:
        network.choose_interface(os.environ["MASTER_ADDR"])


def _meet_on_loopback(is_first: bool) -> None:
    """Have rank 0 keep the store that `init_process_group` will use; torch's own listens on every interface."""
    global _loopback_store
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch then takes MASTER_ADDR for a store that stands
    if not is_first or _loopback_store is not None:
        return
    port = int(os.environ["MASTER_PORT"])
    try:
        _loopback_store = network.open_store(LOOPBACK, port, timedelta(minutes=5))
    except OSError as error:
        raise MisconfigurationException(
            f"port {port} of {LOOPBACK} cannot be used ({error}); set MASTER_PORT to a free one on every rank"
        ) from error
