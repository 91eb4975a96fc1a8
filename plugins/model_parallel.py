"""FSDP2 for modules that call `fully_shard` themselves."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightlite.errors import MisconfigurationException
from lightlite.plugins.fsdp import FSDPStrategy


class ModelParallelStrategy(FSDPStrategy):
    """FSDP as `configure_model` says, by `fully_shard(block, mesh=self.device_mesh["data_parallel"])`.

    Args:
        data_parallel_size: "auto", or the number of ranks.
        tensor_parallel_size: "auto" or 1; parts of layers on several ranks are not in lightlite.
        save_distributed_checkpoint: Whether checkpoints are sharded; see `FSDPStrategy(state_dict_type=…)`.
        options: Others of FSDPStrategy.

    Raises:
        MisconfigurationException: For tensor parallelism.
    """

    name = "model_parallel"

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True,
        **options: Any,
    ) -> None:
        if tensor_parallel_size not in ("auto", 1):
            raise MisconfigurationException(
                f"ModelParallelStrategy(tensor_parallel_size={tensor_parallel_size!r}): tensor parallelism is not in "
                "lightlite; leave it out, to shard over all ranks"
            )
        sizes = None if data_parallel_size == "auto" else (data_parallel_size, 1)
        kind: Literal["full", "sharded"] = "sharded" if save_distributed_checkpoint else "full"
        super().__init__(**{"state_dict_type": kind, "device_mesh": sizes, **options})

    def _make_mesh(self, sizes: tuple[int, ...] | None) -> DeviceMesh:
        return super()._make_mesh(sizes or (self.world_size, 1))

    def _mesh_names(self, dimensions: int) -> tuple[str, ...]:
        return ("data_parallel", "tensor_parallel")

    def _shard_options(self, module: nn.Module) -> dict[str, Any]:
        assert self.device_mesh is not None
        return {**super()._shard_options(module), "mesh": self.device_mesh["data_parallel"]}
