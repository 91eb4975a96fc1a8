"""Everything that knows hardware, ranks or formats of numbers; also the public names for `Trainer(plugins=…)`.

The tables below are all that the rest of lightlite knows of what is here: a plugin is added by its file and a line in
one of them. Names are imported when they are first used, so that one plugin does not load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightlite.errors import missing_attribute
from lightlite.interfaces import CheckpointIO, Precision
from lightlite.registry import Declared

if TYPE_CHECKING:
    from lightlite.plugins.precision import (
        DoublePrecision,
        FullPrecision,
        HalfPrecision,
        MixedPrecision,
        TruePrecision,
    )
    from lightlite.saving import AsyncCheckpointIO, TorchCheckpointIO

__all__ = [
    "AsyncCheckpointIO",
    "CheckpointIO",
    "DoublePrecision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TorchCheckpointIO",
    "TruePrecision",
]

ACCELERATORS = Declared(
    plugins={
        "cuda": ("lightlite.plugins.cuda:CUDAAccelerator", "NVIDIA GPUs, and AMD GPUs under ROCm", {}),
        "mps": ("lightlite.plugins.mps:MPSAccelerator", "the GPU of Apple silicon", {}),
        "cpu": ("lightlite.plugins.cpu:CPUAccelerator", "processes on the CPU's cores", {}),
    },
    groups={"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")},
    exports={"find_usable_cuda_devices": "lightlite.plugins.cuda:find_usable_cuda_devices"},
    left_out=("tpu", "xla", "hpu"),
)

STRATEGIES = Declared(
    plugins={
        "single": ("lightlite.plugins.single:SingleDeviceStrategy", "one process, one device", {}),
        "single_device": ("lightlite.plugins.single:SingleDeviceStrategy", "the same as single", {}),
        "ddp": ("lightlite.plugins.ddp:DDPStrategy", "a copy of the model on every rank, gradients averaged", {}),
        **{
            name: ("lightlite.plugins.ddp:DDPStrategy", "the same as ddp", {})
            for name in ("ddp_spawn", "ddp_fork", "ddp_notebook")
        },
        **{
            f"{name}_find_unused_parameters_{word}": ("lightlite.plugins.ddp:DDPStrategy", *what)
            for word, what in {
                "true": ("ddp for models that leave parameters unused in a step", {"find_unused_parameters": True}),
                "false": ("the same as ddp", {}),
            }.items()
            for name in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
        },
        "fsdp": ("lightlite.plugins.fsdp:FSDPStrategy", "parameters and optimizer states spread over the ranks", {}),
        "fsdp_cpu_offload": (
            "lightlite.plugins.fsdp:FSDPStrategy",
            "fsdp that keeps them in the host's memory",
            {"cpu_offload": True},
        ),
        "model_parallel": (
            "lightlite.plugins.model_parallel:ModelParallelStrategy",
            "fsdp as configure_model says",
            {},
        ),
    },
    groups={"auto": ("single", "ddp")},
    left_out=("deepspeed", "xla", "bagua", "colossalai", "horovod", "hivemind"),
)

PRECISIONS = Declared(
    plugins={
        "32-true": ("lightlite.plugins.precision:FullPrecision", "float32", {}),
        "64-true": ("lightlite.plugins.precision:TruePrecision", "float64", {"precision": "64-true"}),
        "16-true": ("lightlite.plugins.precision:TruePrecision", "float16", {"precision": "16-true"}),
        "bf16-true": ("lightlite.plugins.precision:TruePrecision", "bfloat16", {"precision": "bf16-true"}),
        "16-mixed": ("lightlite.plugins.precision:MixedPrecision", "float16 autocast", {"precision": "16-mixed"}),
        "bf16-mixed": ("lightlite.plugins.precision:MixedPrecision", "bfloat16 autocast", {"precision": "bf16-mixed"}),
    },
    left_out=("transformer-engine", "bnb", "nf4", "int8"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        place = "lightlite.saving" if name.endswith("CheckpointIO") else "lightlite.plugins.precision"
        return getattr(import_module(place), name)
    raise missing_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
