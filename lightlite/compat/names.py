"""The table: which modules Lightning has, and where lightlite has the names in them.

A name of `pytorch_lightning.a.b` is looked for in `lightlite.a.b`, where there is such a module, then in the modules
that `elsewhere` tells for `a.b`, and then, the same way, for `a`. So what lightlite keeps under the same name, or one
level higher, needs no entry. What is not listed here cannot be imported: Lightning's internals (its loops, connectors
and launchers) and what lightlite leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Tree:
    """Lightning's modules under one root.

    Attributes:
        homes: Packages of lightlite in which a module of the same name is looked for, one after the other.
        modules: The modules there are, without the root; "" is the root itself.
        elsewhere: By module: modules of lightlite that have its names under another name, besides those of the last
            home.
    """

    homes: tuple[str, ...]
    modules: frozenset[str]
    elsewhere: Mapping[str, str]

    def levels(self, place: str) -> Iterator[list[str]]:
        """Modules of lightlite that may have the names of one of Lightning's, if they exist; the likeliest first."""
        parts = place.split(".")
        upwards = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        for home in self.homes:
            for name in upwards:
                more = self.elsewhere.get(name, "").split() if home == self.homes[-1] else []
                yield [f"{home}.{name}".rstrip("."), *(f"lightlite.{other}" for other in more)]


PYTORCH_MODULES = """
    accelerators accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps
    callbacks callbacks.batch_size_finder callbacks.callback callbacks.checkpoint callbacks.device_stats_monitor
    callbacks.early_stopping callbacks.finetuning callbacks.gradient_accumulation_scheduler
    callbacks.lambda_function callbacks.lr_finder callbacks.lr_monitor callbacks.model_checkpoint
    callbacks.model_summary callbacks.on_exception_checkpoint callbacks.prediction_writer callbacks.progress
    callbacks.progress.progress_bar callbacks.progress.rich_progress callbacks.progress.tqdm_progress
    callbacks.rich_model_summary callbacks.spike callbacks.stochastic_weight_avg callbacks.throughput_monitor
    callbacks.timer callbacks.weight_averaging
    cli
    core core.datamodule core.hooks core.mixins core.mixins.hparams_mixin core.module core.optimizer core.saving
    demos demos.boring_classes
    loggers loggers.csv_logs loggers.logger loggers.mlflow loggers.tensorboard loggers.utilities loggers.wandb
    plugins plugins.environments plugins.io plugins.io.async_plugin plugins.io.checkpoint_plugin
    plugins.io.torch_plugin plugins.precision plugins.precision.amp plugins.precision.double
    plugins.precision.half plugins.precision.precision
    profilers profilers.advanced profilers.base profilers.profiler profilers.pytorch profilers.simple
    strategies strategies.ddp strategies.single_device strategies.strategy
    trainer trainer.states trainer.trainer
    tuner tuner.batch_size_scaling tuner.lr_finder tuner.tuning
    utilities utilities.argparse utilities.combined_loader utilities.compile utilities.data utilities.enums
    utilities.exceptions utilities.grads utilities.memory utilities.model_helpers utilities.model_summary
    utilities.model_summary.model_summary utilities.parameter_tying utilities.parsing utilities.rank_zero
    utilities.seed utilities.types utilities.upgrade_checkpoint utilities.warnings
"""

PYTORCH = Tree(
    homes=("lightlite",),
    modules=frozenset(PYTORCH_MODULES.split()),
    elsewhere={
        "accelerators": "interfaces",
        "core": "module datamodule",
        "core.hooks": "hooks module datamodule",
        "core.mixins": "hparams",
        "core.optimizer": "optim",
        "core.saving": "hparams",
        "loggers.utilities": "loggers.logger",
        "trainer": "utilities",
        "trainer.states": "progress",
        "utilities.combined_loader": "data",
        "utilities.exceptions": "errors",
        "utilities.types": "optim",
    },
)

FABRIC_MODULES = """
    accelerators accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps accelerators.registry
    fabric
    loggers loggers.csv_logs loggers.logger loggers.tensorboard
    plugins plugins.environments plugins.environments.cluster_environment plugins.environments.kubeflow
    plugins.environments.lsf plugins.environments.mpi plugins.environments.slurm plugins.environments.torchelastic
    plugins.io plugins.io.checkpoint_io plugins.io.torch_io plugins.precision
    plugins.precision.amp plugins.precision.double plugins.precision.half plugins.precision.precision
    strategies strategies.ddp strategies.registry strategies.single_device strategies.strategy
    utilities utilities.apply_func utilities.cloud_io utilities.data utilities.device_dtype_mixin
    utilities.distributed utilities.enums utilities.exceptions utilities.logger utilities.rank_zero utilities.seed
    utilities.spike utilities.throughput utilities.types utilities.warnings
    wrappers
"""

FABRIC = Tree(
    homes=("lightlite.fabric", "lightlite"),
    modules=frozenset(FABRIC_MODULES.split()),
    elsewhere={
        "accelerators": "interfaces",
        "utilities.data": "data",
        "utilities.device_dtype_mixin": "module",
        "utilities.exceptions": "errors",
        "utilities.logger": "loggers.logger",
        "utilities.spike": "callbacks.spike",
        "wrappers": "fabric",
    },
)

TREES = {
    "lightning.pytorch": PYTORCH,
    "lightning.fabric": FABRIC,
    "pytorch_lightning": PYTORCH,
    "lightning_fabric": FABRIC,
    "lightning": Tree(("lightlite",), frozenset({"pytorch", "fabric"}), {}),
}
"""Lightning's packages, and for each what is below it."""
