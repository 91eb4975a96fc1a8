"""Everything that knows processes: the command line, helper processes, who started this one, and how they end.

The tables below are all that the core knows of what is here.
"""

from __future__ import annotations

from lightlite.registry import Declared

LAUNCHERS = Declared({"helpers": ("lightlite.launch.helpers:HelperPool", "helper processes of the calling script", {})})

ENVIRONMENTS = Declared(
    {
        "torchelastic": ("lightlite.launch.environment:TorchElasticEnvironment", "torchrun and lightlite.launch", {}),
        "slurm": ("lightlite.launch.environment:SlurmEnvironment", "srun", {}),
        "mpi": ("lightlite.launch.environment:MPIEnvironment", "mpirun", {}),
        "lsf": ("lightlite.launch.environment:LSFEnvironment", "LSF's jsrun", {}),
        "kubernetes": ("lightlite.launch.environment:KubernetesEnvironment", "Kubernetes' PyTorchJob", {}),
    }
)

COLLECTORS = Declared({"files": ("lightlite.launch.collect:FileCollector", "memory-mapped files", {})})
