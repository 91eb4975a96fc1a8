"""Fabric: your own loop, on the plugins and launchers of the Trainer."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightlite import config, distributed
from lightlite.data import RankLoader, check_loader
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.fabric import saving
from lightlite.fabric.attached import AsRecorder, AsTrainer
from lightlite.fabric.place import Place
from lightlite.fabric.wrappers import (
    BackwardPass,
    _FabricDataLoader,
    _FabricModule,
    _FabricOptimizer,
    is_wrapped,
    unwrap,
    unwrap_compiled,
)
from lightlite.interfaces import Accelerator, Strategy
from lightlite.loggers import Logger
from lightlite.module import LightningModule
from lightlite.nest import apply_to_tensors, move_to
from lightlite.optim import settle
from lightlite.utilities.initialisation import NoInitialisation
from lightlite.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn


class Fabric(Place):
    """What a loop of your own needs to run on any device, on several, in any precision.

        fabric = Fabric(devices=2, precision="bf16-mixed")

        def train(fabric):
            model = Net()
            model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
            for x, y in loader:
                optimizer.zero_grad()
                fabric.backward(loss(model(x), y))
                optimizer.step()

        fabric.launch(train)

    Names and arguments are those of Lightning 2.x's Fabric. On one device the numbers are those of the loop without
    Fabric, to the bit; W ranks with batch size b see the global batches that one process with W x b sees.

    Args:
        accelerator: "auto", "cpu", "gpu", "cuda", "mps", the name of an installed plugin, or an Accelerator.
        strategy: "auto", "single", "ddp", another registered name, or a Strategy. With several devices "auto" is ddp.
        devices: How many devices, which ("0,2", [0, 2]), or "auto" and -1 for all; on the CPU, how many processes.
        num_nodes: Number of machines; somebody has to start the ranks on each.
        precision: "32-true" (default), "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"; or 16, 32, 64,
            "bf16".
        plugins: A Precision, ClusterEnvironment, or list of them.
        callbacks: Any object, or several, whose methods `call` calls.
        loggers: A Logger, or several.

    Raises:
        MisconfigurationException: For a wrong argument, saying what was given and what is allowed.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: Any = None,
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Logger | list[Logger] | None = None,
    ) -> None:
        super().__init__(config.choose_hardware(accelerator, strategy, devices, num_nodes, precision, plugins))
        self._callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        self._callbacks = [callback for callback in self._callbacks if callback is not None]
        self._loggers = [] if loggers is None else config.as_instances(loggers, Logger, "loggers")  # type: ignore[type-abstract]
        self._precision = self._hardware.precision
        self._backward_pass = BackwardPass()
        self._begin_place()
        weakref.finalize(self, _save_logs, self._loggers)  # at the latest when the program ends

    def _begin_place(self) -> None:
        self._has_module = False
        self._modules: weakref.WeakSet[_FabricModule] = weakref.WeakSet()
        self._loaders: weakref.WeakSet[_FabricDataLoader] = weakref.WeakSet()
        self._optimizers: weakref.WeakSet[_FabricOptimizer] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_launcher", "_modules", "_loaders", "_optimizers")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._launcher = None
        self._begin_place()

    def _connect(self, ranks: Ranks) -> None:
        super()._connect(ranks)
        for logger in self._loggers:
            logger.share(self.strategy.broadcast)

    def _disconnect(self) -> None:
        """The ranks part: what was logged is written, loaders' workers end, modules go on without a wrapper."""
        _save_logs(self._loggers)
        for loader in list(self._loaders):
            loader._loader.close()
        for module in list(self._modules):
            module.unwrap()
        self._begin_place()
        super()._disconnect()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of "16-mixed", else None; with a state to be saved."""
        return self._precision.scaler

    @property
    def loggers(self) -> list[Logger]:
        """The loggers."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger."""
        if not self._loggers:
            raise MisconfigurationException(
                "fabric.logger: there is none; give one, as in Fabric(loggers=CSVLogger('logs'))"
            )
        return self._loggers[0]

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Set up a module and its optimizers.

        Args:
            module: Converted to the precision, moved to the device, and prepared for gradient sync. One that was given
                to `torch.compile` stays compiled.
            optimizers: Optimizers of its parameters.
            scheduler: A learning-rate scheduler; returned as it is.
            move_to_device: Whether to move the module.
            _reapply_compile: Accepted for compatibility.

        Returns:
            The module, or a tuple of the module, the optimizers and the scheduler, if given.

        Raises:
            ValueError: For what has been set up already.
            MisconfigurationException: For several ranks that nobody has started, or whose modules differ.
        """
        given = list(module.parameters()) if isinstance(module, nn.Module) else []
        wrapped = self._set_up_module("setup", module, move_to_device)
        _follow(optimizers, given, list(wrapped.parameters()))
        own = [self._set_up_optimizer("setup", optimizer) for optimizer in optimizers]
        self._attach(wrapped.module, own)
        self.call("on_after_setup", fabric=self, module=wrapped)
        if not own:
            return wrapped
        return (wrapped, *own) if scheduler is None else (wrapped, *own, scheduler)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> _FabricModule:
        """Set up a module alone; see `setup`."""
        wrapped = self._set_up_module("setup_module", module, move_to_device)
        self._attach(wrapped.module, [])
        return wrapped

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Set up optimizers of a module that was set up before.

        Returns:
            The optimizer, or a tuple of them.

        Raises:
            ValueError: For none, or for what has been set up already.
            MisconfigurationException: For an optimizer whose parameters have no values yet (device "meta").
        """
        if not optimizers:
            raise ValueError("fabric.setup_optimizers() was given no optimizer; give one or more")
        self._take_place()
        wrapped = tuple(self._set_up_optimizer("setup_optimizers", optimizer) for optimizer in optimizers)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _set_up_module(self, call: str, module: nn.Module, move_to_device: bool) -> _FabricModule:
        if not isinstance(module, nn.Module):
            raise TypeError(f"fabric.{call}({module!r}) of type {type(module).__name__}; give a torch.nn.Module")
        if is_wrapped(module):
            raise ValueError(f"fabric.{call} was given a {type(unwrap(module)).__name__} that is set up already")
        self._take_place()
        bare = unwrap_compiled(module)
        self._precision.convert_module(bare)
        if move_to_device:
            self.to_device(bare)
        synced = self.strategy.wrap(module)
        wrapped = _FabricModule(synced, module, self.strategy, self._precision, self._backward_pass)
        self._modules.add(wrapped)
        self._has_module = True
        return wrapped

    def _set_up_optimizer(self, call: str, optimizer: Optimizer) -> _FabricOptimizer:
        if is_wrapped(optimizer):
            raise ValueError(f"fabric.{call} was given a {type(unwrap(optimizer)).__name__} that is set up already")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"fabric.{call} was given {optimizer!r} of type {type(optimizer).__name__} as optimizer; give a "
                "torch.optim.Optimizer"
            )
        if any(parameter.is_meta for group in optimizer.param_groups for parameter in group["params"]):
            raise MisconfigurationException(
                f"fabric.{call} was given a {type(optimizer).__name__} of parameters that have no values yet (device "
                "'meta'); set up the module first: model = fabric.setup_module(model), then make the optimizer of "
                "model.parameters()"
            )
        return _FabricOptimizer(optimizer, self.strategy, self._precision, self._callbacks, self._optimizers)

    def _attach(self, module: nn.Module, optimizers: list[_FabricOptimizer]) -> None:
        """Let a LightningModule log, and reach what it reaches through its Trainer otherwise; call its hooks, too."""
        if isinstance(module, LightningModule):
            module.attach(AsTrainer(self, optimizers), AsRecorder(self))  # type: ignore[arg-type]
            if not any(callback is module for callback in self._callbacks):
                self._callbacks.append(module)

    def setup_dataloaders(
        self,
        *dataloaders: Any,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        evaluation: bool = False,
    ) -> Any:
        """Set up loaders: each rank iterates its share, on its device.

        On several ranks, all of them begin each pass through a loader together; a loader that one rank iterates alone
        is not to be set up.

        Args:
            dataloaders: DataLoaders, or other iterables of batches.
            use_distributed_sampler: Whether to deal batches out to ranks; False if the data is split by rank already.
            move_to_device: Whether batches are moved to the device.
            evaluation: Of lightlite alone. False: every rank gets its slice of each global batch, as for training; the
                last one is completed from the start of the order. True: ranks get whole batches in turn, each once, so
                that one may get a batch fewer, for scores in which no sample counts twice.

        Returns:
            The loader, or a list of them.

        Raises:
            ValueError: For none, or for what has been set up already.
            MisconfigurationException: For what is no iterable, or for several ranks that nobody has started.
        """
        if not dataloaders:
            raise ValueError("fabric.setup_dataloaders() was given no loader; give one or more")
        for loader in dataloaders:
            if is_wrapped(loader):
                raise ValueError("fabric.setup_dataloaders was given a loader that is set up already")
            check_loader(loader, "what fabric.setup_dataloaders was given")
        self._take_place()
        device = self.device if move_to_device else None
        pin = self.accelerator.pin_memory and move_to_device
        wrapped = [
            _FabricDataLoader(
                RankLoader(loader, training=not evaluation, deal=use_distributed_sampler, pin=pin),
                self.accelerator,
                device,
            )
            for loader in dataloaders
        ]
        self._loaders.update(wrapped)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def backward(self, tensor: Tensor, *args: Any, model: _FabricModule | None = None, **kwargs: Any) -> None:
        """Compute gradients, instead of `tensor.backward()`: scaled where the precision needs it.

        Args:
            tensor: The loss.
            args: For `Tensor.backward`.
            model: Accepted for compatibility.
            kwargs: For `Tensor.backward`.

        Raises:
            TypeError: For what is no tensor.
            MisconfigurationException: For a tensor that depends on no parameter, or, with several ranks, where no
                module was set up whose gradients would be averaged.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fabric.backward({tensor!r}) of type {type(tensor).__name__}; give the loss, a tensor")
        if not tensor.requires_grad:
            raise MisconfigurationException(
                "fabric.backward was given a tensor that requires no gradient: it was not computed from a module's "
                "parameters, or under torch.no_grad(), or it was detached"
            )
        if not self._has_module and self.world_size > 1:
            raise MisconfigurationException(
                "fabric.backward was called before any module was set up, so that gradients would not be averaged over "
                "the ranks; call model = fabric.setup(model) first, and compute the loss with what it returns"
            )
        scaler = self._precision.scaler
        if scaler is None:
            tensor.backward(*args, **kwargs)
            return
        settle(scaler, self._optimizers)
        self._backward_pass.active = True
        try:
            scaler.scale(tensor).backward(*args, **kwargs)
        finally:
            self._backward_pass.active = False

    def clip_gradients(
        self,
        module: nn.Module | None,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters in place, unscaled.

        Args:
            module: Accepted for compatibility.
            optimizer: Whose parameters.
            clip_val: The largest value; or:
            max_norm: The largest total norm.
            norm_type: Which norm: 2.0, or "inf" and others of `torch.linalg.vector_norm`.
            error_if_nonfinite: Whether a total norm that is infinite or NaN is an error. With a gradient scaler it is
                none: the scaler skips the step.

        Returns:
            The total norm before clipping, a scalar; None with `clip_val`.

        Raises:
            ValueError: For both limits, or none.
        """
        if (clip_val is None) == (max_norm is None):
            raise ValueError(
                f"fabric.clip_gradients(clip_val={clip_val}, max_norm={max_norm}); give one of the two: the largest "
                "value, or the largest total norm"
            )
        inner: Optimizer = unwrap(optimizer)
        if self._precision.scaler is not None:
            self._precision.scaler.unscale_(inner)
            for wrapped in self._optimizers:
                wrapped._unscaled |= wrapped.optimizer is inner
            error_if_nonfinite = False
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        if clip_val is not None:
            return self.strategy.clip_gradients(parameters, clip_val, "value")
        assert max_norm is not None
        return self.strategy.clip_gradients(parameters, max_norm, "norm", norm_type, error_if_nonfinite)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which operations run in the chosen precision, for what is computed outside of a module."""
        context = self._precision.forward_context()
        return nullcontext() if context is None else context()

    def to_device(self, obj: Any) -> Any:
        """A module, in place, or a nest of tensors, on this process's device."""
        if isinstance(obj, nn.Module):
            self.accelerator.setup_device(self.device)
            self.accelerator.move_module(obj, self.device)
            return obj
        return move_to(obj, self.device)

    def no_backward_sync(self, module: _FabricModule, enabled: bool = True) -> AbstractContextManager[Any]:
        """A context in which backward passes leave gradients local, for all but the last of an accumulation.

        The forward pass has to be in it, too.

        Args:
            module: A module that was set up.
            enabled: False for a context that does nothing.

        Raises:
            TypeError: For a module that was not set up.
        """
        found = unwrap_compiled(module)
        if not isinstance(found, _FabricModule):
            raise TypeError(
                f"fabric.no_backward_sync was given a {type(module).__name__} that is not set up; give what "
                "model = fabric.setup(model) returned"
            )
        return found.no_sync() if enabled else nullcontext()

    def sharded_model(self) -> AbstractContextManager[Any]:
        """Deprecated in favour of `init_module`; does nothing."""
        rank_zero_deprecation("fabric.sharded_model() is deprecated; use fabric.init_module() instead")
        self._take_place()
        return nullcontext()

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """A block in which new tensors are made on the device, in the format of the precision."""
        with self.device, self._precision.init_context():
            yield

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """A block in which new modules are made on the device, in the format of the precision.

        Args:
            empty_init: Whether to leave out their initialisation, where weights are loaded afterwards.
        """
        self._take_place()
        with self.init_tensor(), ExitStack() as stack:
            if empty_init:
                stack.enter_context(NoInitialisation())
            yield

    def save(
        self, path: str | Path, state: dict[str, Any], filter: dict[str, Callable[[str, Any], bool]] | None = None
    ) -> None:
        """Write states to a file, whole or not at all. Every rank has to call it; rank zero writes.

        Args:
            path: Path or URL.
            state: By name: modules, optimizers and whatever else has `state_dict` and `load_state_dict`; and plain
                values.
            filter: By name in `state`, a function of an entry's key and value: whether to save it.

        Raises:
            TypeError: For a filter that is no dict of functions.
            ValueError: For a filter's name that `state` has not.
            CheckpointError: Naming what only executing code could read again.
        """
        saving.check_filter({} if filter is None else filter, state)
        self._take_place()
        if self._precision.scaler is not None:
            settle(self._precision.scaler, self._optimizers)
        self.strategy.save_checkpoint(saving.collect(state, filter or {}, self.strategy), path)

    def load(
        self,
        path: str | Path,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file that `save` wrote, and put states back in place. Every rank has to call it.

        Args:
            path: Path or URL.
            state: As for `save`; plain values are replaced in the dict. None to put nothing back.
            strict: Whether the file must hold every name in `state`, and every weight of a module.
            weights_only: Accepted for compatibility; nothing in a file is ever executed.

        Returns:
            What is in the file besides; all of it without `state`.

        Raises:
            TypeError: For a state that is no dict.
            CheckpointError: For a file that is missing, damaged, or, if strict, lacks a name.
        """
        self._take_place()
        rest = saving.restore(path, state, strict, self.strategy)
        self.strategy.barrier("load")
        return rest

    def load_raw(
        self,
        path: str | Path,
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
    ) -> None:
        """Load a file that holds nothing but the state-dict of a module or an optimizer.

        Args:
            path: Path or URL.
            obj: The module or optimizer.
            strict: Whether the file must hold exactly the module's weights.
            weights_only: Accepted for compatibility; nothing in a file is ever executed.
        """
        self._take_place()
        saving.put_back(unwrap(obj), self.strategy.load_checkpoint(path), strict, self.strategy)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Hand a value to the loggers, on rank zero; see `log_dict`."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand values to the loggers, on rank zero.

        Args:
            metrics: Numbers or tensors of one element, by name.
            step: The x-axis; None leaves it to the logger.

        Raises:
            ValueError: For a tensor of several elements.
        """
        if self.is_global_zero and self._loggers:
            values = {name: apply_to_tensors(value, partial(_as_number, name)) for name, value in metrics.items()}
            for logger in self._loggers:
                logger.log_metrics(metrics=values, step=step)

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method of that name of every callback that has it.

        Args:
            hook_name: The method.
            args: For it.
            kwargs: For it; each method is given those that it takes.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if callable(method):
                method(*args, **_taken_by(method, kwargs))
            else:
                rank_zero_warn(f"{type(callback).__name__}.{hook_name} is not called: it is no method but {method!r}")


def _follow(optimizers: Iterable[Optimizer], given: list[nn.Parameter], moved: list[nn.Parameter]) -> None:
    """Have optimizers of parameters that were replaced, as on some devices a move does, hold the new ones."""
    replaced = {id(old): new for old, new in zip(given, moved, strict=True) if old is not new}
    if replaced:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]


def _as_number(name: str, value: Tensor) -> Any:
    if value.numel() != 1:
        raise ValueError(
            f"fabric.log({name!r}, …) was given a tensor of shape {tuple(value.shape)}; give a number, such as its "
            "mean()"
        )
    return value.item()


def _save_logs(loggers: list[Logger]) -> None:
    if distributed.rank() == 0:
        for logger in loggers:
            logger.save()


def _taken_by(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(method).parameters
    except ValueError:
        return kwargs
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
