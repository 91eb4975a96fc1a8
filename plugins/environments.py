"""Who may have started the ranks, under Lightning's names; served through the registry when first used."""

from __future__ import annotations

from typing import Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import ClusterEnvironment
from lightlite.registry import EnvironmentRegistry

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]

KubeflowEnvironment: Any
LSFEnvironment: Any
MPIEnvironment: Any
SLURMEnvironment: Any
TorchElasticEnvironment: Any

_REGISTERED = {
    "KubeflowEnvironment": "kubernetes",
    "LSFEnvironment": "lsf",
    "MPIEnvironment": "mpi",
    "SLURMEnvironment": "slurm",
    "TorchElasticEnvironment": "torchelastic",
}


def __getattr__(name: str) -> Any:
    if name in _REGISTERED:
        return EnvironmentRegistry.get(_REGISTERED[name])
    raise missing_attribute(__name__, name)
