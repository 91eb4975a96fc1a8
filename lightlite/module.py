"""LightningModule: what a user writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightlite import distributed
from lightlite.errors import MisconfigurationException
from lightlite.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightlite.hparams import HyperparametersMixin
from lightlite.optim import LightningOptimizer
from lightlite.restore import module_from_checkpoint
from lightlite.utilities.compile import compile_steps

if TYPE_CHECKING:
    from lightlite.results import Recorder
    from lightlite.trainer import Trainer


class LightningModule(ModelHooks, DataHooks, CheckpointHooks, HyperparametersMixin, nn.Module):
    """A `torch.nn.Module` that says how it is trained, validated, tested and used for prediction.

    Write `training_step` and `configure_optimizers`, and what else is wanted of `validation_step`, `test_step`,
    `predict_step` and the hooks. Names, arguments and order are those of Lightning 2.x.
    """

    _not_sent: ClassVar[tuple[str, ...]] = ("_trainer", "_recorder")

    # What a subclass may set in `__init__`, on the class, or by a property of its own.
    automatic_optimization: bool = True
    """Whether the loop runs backward passes and steps; False for a `training_step` that does it itself."""
    strict_loading: bool = True
    """Whether a checkpoint's keys must be exactly the module's."""
    example_input_array: Any = None
    """What `forward` may be called with: a tensor, or a tuple or dict of arguments; for summaries and exports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__["_trainer"] = None
        self.__dict__["_recorder"] = None
        self.prepare_data_per_node = True

    def __getstate__(self) -> dict[str, Any]:
        compiled = self.__dict__.get("_compiled_steps", ())
        state = {name: value for name, value in self.__dict__.items() if name not in compiled}
        return {**state, **dict.fromkeys(self._not_sent)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_compiled_steps" in state:
            compile_steps(self, state["_compiled_steps"], state["_compiler"])

    def attach(self, trainer: Trainer | None, recorder: Recorder | None) -> None:
        """Make a trainer and its recorder known to the module, and to those within it; the trainer calls it."""
        for module in self.modules():
            if isinstance(module, LightningModule):
                module.__dict__["_trainer"], module.__dict__["_recorder"] = trainer, recorder

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module.

        Raises:
            RuntimeError: While none does.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None and not self.__dict__.get("_exporting"):  # TorchScript looks at every attribute
            raise RuntimeError(
                f"{type(self).__name__} is not attached to a Trainer; call trainer.fit(module) or another first"
            )
        return trainer  # type: ignore[return-value]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.attach(trainer, self.__dict__["_recorder"])

    @property
    def fabric(self) -> Any:
        """The Fabric that set this module up for a loop of the user's own, or None."""
        return getattr(self.__dict__.get("_trainer"), "fabric", None)

    @property
    def device(self) -> torch.device:
        """The device of the parameters and buffers, CPU if there are none; right everywhere outside `__init__`."""
        trainer = self.__dict__.get("_trainer")
        if trainer is not None and trainer.running_device is not None:
            return trainer.running_device  # type: ignore[no-any-return]
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point parameter or buffer, else the default."""
        tensors = (tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.is_floating_point())
        return next((tensor.dtype for tensor in tensors), torch.get_default_dtype())

    @property
    def current_epoch(self) -> int:
        """Index of the epoch in progress; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.current_epoch if trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, by all optimizers together; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.global_step if trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """This process's rank in the run."""
        return distributed.rank()

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine; 0 without a trainer."""
        trainer = self.__dict__.get("_trainer")
        return trainer.local_rank if trainer is not None else 0

    @property
    def device_mesh(self) -> Any:
        """The ranks as a `DeviceMesh`, for `fully_shard` in `configure_model`; None where the strategy has none."""
        trainer = self.__dict__.get("_trainer")
        return getattr(trainer.strategy, "device_mesh", None) if trainer is not None else None

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on another device than the CPU."""
        return self.device.type != "cpu"

    @property
    def logger(self) -> Any:
        """The trainer's first logger, or None."""
        return self.trainer.logger if self.__dict__.get("_trainer") is not None else None

    @property
    def loggers(self) -> list[Any]:
        """The trainer's loggers."""
        return self.trainer.loggers if self.__dict__.get("_trainer") is not None else []

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss of a batch: `training_step(self, batch, batch_idx)`.

        Returns:
            The loss, a scalar tensor; or a dict with it under "loss"; or None to skip the batch (one process only).
            In manual optimization, anything.
        """
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Score a validation batch: `validation_step(self, batch, batch_idx, dataloader_idx=0)`."""
        raise NotImplementedError

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Score a test batch: `test_step(self, batch, batch_idx, dataloader_idx=0)`."""
        raise NotImplementedError

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch: `predict_step(self, batch, batch_idx, dataloader_idx=0)`; by default `self(batch)`."""
        return self(args[0] if args else kwargs["batch"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute outputs, as in any `nn.Module`."""
        return super().forward(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        """Say with which optimizers, and learning-rate schedulers, the module is trained.

        Returns:
            An optimizer; a list of optimizers; two lists, of optimizers and of schedulers; a dict with "optimizer" and
            "lr_scheduler" (a scheduler, or a dict with "scheduler", "interval" ("epoch" or "step"), "frequency",
            "monitor", "strict", "name"); a list of such dicts; or None to train without one.
        """
        raise MisconfigurationException(
            f"{type(self).__name__} has no configure_optimizers; define it, or return None from it to train without one"
        )

    def configure_callbacks(self) -> Any:
        """Callbacks, or one, that this module wants; each replaces a callback of the same type in the trainer."""
        return []

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a value under a name.

        Args:
            name: The name; the same on every rank.
            value: A number, a tensor of one element, or a torchmetrics Metric.
            prog_bar: Whether the progress bar shows it.
            logger: Whether loggers get it; by default they do.
            on_step: Whether each step's value counts. By default yes in training_step and the hooks around it.
            on_epoch: Whether the epoch's value counts. By default yes everywhere else. With both, loggers get
                `<name>_step` and `<name>_epoch`.
            reduce_fx: How an epoch's value comes from its steps': "mean" (weighted by batch size), "sum", "min",
                "max", or a function from a tensor of shape (steps,) to a number.
            enable_graph: Accepted for compatibility; values are always detached.
            sync_dist: Accepted for compatibility: values are always brought together over the ranks.
            sync_dist_group: Accepted for compatibility.
            add_dataloader_idx: Whether `/dataloader_idx_<i>` is added where there are several loaders.
            batch_size: Samples in the batch; by default the length of the batch's first tensor.
            metric_attribute: Accepted for compatibility; where a Metric lies is found by itself.
            rank_zero_only: Whether rank zero alone logs it, so that it is not reduced.

        Raises:
            MisconfigurationException: In a hook that cannot log, or for options that contradict an earlier call.
            ValueError: For a value that is not one number.
        """
        recorder = self.__dict__.get("_recorder")
        if recorder is None:
            unattached = self.__dict__.get("_trainer") is None
            why = "the module is not attached to a Trainer" if unattached else "the Trainer has barebones=True"
            warnings.warn(f"self.log({name!r}, …) does nothing: {why}", stacklevel=2)
            return
        recorder.log(
            name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, batch_size, rank_zero_only
        )

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record several values.

        Args:
            dictionary: Value by name; a torchmetrics MetricCollection is one.
            prog_bar: This and what follows: as for `log`.
            logger: See `log`.
            on_step: See `log`.
            on_epoch: See `log`.
            reduce_fx: See `log`.
            enable_graph: See `log`.
            sync_dist: See `log`.
            sync_dist_group: See `log`.
            add_dataloader_idx: See `log`.
            batch_size: See `log`.
            rank_zero_only: See `log`.

        Raises:
            MisconfigurationException: For something else than a dictionary.
        """
        if not isinstance(dictionary, Mapping) and not hasattr(dictionary, "items"):
            raise MisconfigurationException(
                f"self.log_dict was given {type(dictionary).__name__}; give a dict from name to value"
            )
        if self.fabric is not None:
            self.__dict__["_recorder"].log_dict(dictionary, logger)
            return
        for name, value in dictionary.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, rank_zero_only=rank_zero_only,
            )  # fmt: skip

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank zero only, without breaking the progress bar."""
        trainer = self.__dict__.get("_trainer")
        bar = trainer.progress_bar_callback if trainer is not None else None
        if bar is not None and bar.is_enabled:
            bar.print(*args, **kwargs)
        elif distributed.rank() == 0:
            print(*args, **kwargs)  # noqa: T201

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizers, for manual optimization: one, or a list.

        Args:
            use_pl_optimizer: Whether to wrap them so that their steps are counted and scaled; leave it.
        """
        wrapped = self.trainer.wrapped_optimizers
        found: list[Any] = list(wrapped) if use_pl_optimizer else [optimizer.optimizer for optimizer in wrapped]
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """The schedulers, for manual optimization: one, a list, or None."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate in manual optimization: scaled if the precision needs it, averaged over the ranks.

        Args:
            loss: A scalar tensor.
            args: For `loss.backward`.
            kwargs: For `loss.backward`.
        """
        if self.automatic_optimization and self.fabric is None:
            raise MisconfigurationException(
                f"{type(self).__name__}.manual_backward was called in automatic optimization; set "
                "self.automatic_optimization = False in __init__, or return the loss from training_step instead"
            )
        self.trainer.manual_backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; override to do it otherwise.

        Args:
            loss: The loss, divided by the number of accumulated batches and scaled already.
            args: For `loss.backward`.
            kwargs: For `loss.backward`.
        """
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer; override to do it otherwise, and call `optimizer.step(closure=optimizer_closure)`.

        Args:
            epoch: Index of the epoch.
            batch_idx: Index of the batch in the epoch.
            optimizer: The optimizer.
            optimizer_closure: Runs `training_step` and the backward pass. Must be called.
        """
        optimizer.step(optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients; override to do it otherwise."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler; override for schedulers of another kind.

        Args:
            scheduler: The scheduler.
            metric: The monitored value for ReduceLROnPlateau, else None.
        """
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients before a step; override to do it otherwise, with `self.clip_gradients`.

        Args:
            optimizer: The optimizer about to step.
            gradient_clip_val: From the Trainer; None for no clipping.
            gradient_clip_algorithm: "norm", "value", or None for the Trainer's.
        """
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters, unscaled.

        Args:
            optimizer: Whose parameters.
            gradient_clip_val: The largest total norm, or the largest value; None does nothing.
            gradient_clip_algorithm: "norm" (default) or "value".
        """
        self.trainer.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only this optimizer's parameters require gradients, until `untoggle_optimizer`."""
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        kept: dict[nn.Parameter, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if id(parameter) not in mine and parameter not in kept:
                        kept[parameter] = parameter.requires_grad
                        parameter.requires_grad = False
        self.__dict__["_toggled"] = kept

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, required in self.__dict__.pop("_toggled", {}).items():
            parameter.requires_grad = required

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """Context in which only this optimizer's parameters require gradients."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Every rank's tensors, stacked.

        Args:
            data: A tensor, a number, a NumPy array, or a nest of them, of the same shapes on every rank.
            group: Accepted for compatibility; the whole world.
            sync_grads: Whether gradients flow back.

        Returns:
            The nest with tensors of shape (world_size, *shape); with one rank, of their own shape.
        """
        from lightlite.nest import apply_to_tensors, as_tensors

        data = as_tensors(data, self.device)
        if self.trainer.world_size == 1:
            return data
        return apply_to_tensors(data, lambda tensor: self.trainer.strategy.all_gather(tensor, group, sync_grads))

    def freeze(self) -> None:
        """Let no parameter require gradients, and go to evaluation mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """Let every parameter require gradients, and go to training mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a module from the hyper-parameters and weights that a checkpoint holds.

        Args:
            checkpoint_path: Path, URL or open file of a checkpoint of lightlite or Lightning.
            map_location: As for `torch.load`; by default the CPU.
            hparams_file: YAML file whose hyper-parameters are taken instead of the checkpoint's.
            strict: Whether keys must match exactly; by default `strict_loading` of the module.
            weights_only: Accepted for compatibility; nothing in a file is ever executed.
            kwargs: For `__init__`, over the stored hyper-parameters.

        Raises:
            CheckpointError: For a file that is missing or is no sound checkpoint.
        """
        return module_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, strict, kwargs)

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export to ONNX.

        Args:
            file_path: Where to.
            input_sample: Arguments of `forward`; by default `example_input_array`.
            kwargs: For `torch.onnx.export`.
        """
        sample = self._sample(input_sample, "to_onnx")
        with self._exportable():
            if isinstance(sample, Mapping):
                return torch.onnx.export(self, (), file_path, kwargs=dict(sample), **kwargs)
            return torch.onnx.export(self, sample if isinstance(sample, tuple) else (sample,), file_path, **kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Compile to TorchScript by "script" or "trace", and save to `file_path` if given."""
        if method not in ("script", "trace"):
            raise ValueError(f"to_torchscript(method={method!r}): allowed are 'script' and 'trace'")
        with self._exportable():
            if method == "script":
                compiled = torch.jit.script(self, **kwargs)
            else:
                compiled = torch.jit.trace(self, self._sample(example_inputs, "to_torchscript"), **kwargs)
        if file_path is not None:
            torch.jit.save(compiled, str(file_path))
        return compiled

    @contextmanager
    def _exportable(self) -> Iterator[None]:
        """Without a trainer, gradients, or what is for training only."""
        mode, trainer = self.training, self.__dict__["_trainer"]
        self.__dict__.update(_exporting=True, _trainer=None)
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(mode)
            self.__dict__["_trainer"] = trainer
            del self.__dict__["_exporting"]

    def _sample(self, given: Any, what: str) -> Any:
        sample = self.example_input_array if given is None else given
        if sample is None:
            raise ValueError(f"{what} needs an input: pass one, or set self.example_input_array")
        from lightlite.nest import move_to

        return move_to(sample, self.device)


# TorchScript compiles the attributes and properties of a module, unless it is told which ones are of no use there.
LightningModule.__jit_ignored_attributes__ = [  # type: ignore[attr-defined]
    "automatic_optimization", "strict_loading", "example_input_array", "prepare_data_per_node",
]  # fmt: skip
LightningModule.__jit_unused_properties__ = [  # type: ignore[attr-defined]
    name for base in LightningModule.__mro__ for name, member in vars(base).items() if isinstance(member, property)
]
