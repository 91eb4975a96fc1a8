"""Data parallel training: the whole model on every rank, gradients averaged by PyTorch's DistributedDataParallel."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, CheckpointIO, ClusterEnvironment, Precision, Strategy
from lightlite.plugins import batchnorm, replicas
from lightlite.plugins.comm_hooks import HookState, ModelAverager, named_for

_UNFINISHED = "Expected to have finished reduction in the prior iteration"
_START_METHODS = ("popen", "spawn", "fork", "forkserver")
_OURS = {
    "module": "the module that fit is called with",
    "device_ids": "Trainer(devices=…)",
    "output_device": "Trainer(devices=…)",
    "process_group": "process_group_backend and timeout",
    "device_mesh": "Trainer(devices=…, num_nodes=…)",
    "check_reduction": "nothing: it is without effect",
}
"""Options of DistributedDataParallel that are not for the user to give, each with what is."""


class DDPStrategy(Strategy):
    """A copy of the model on every rank. With one rank only, no process group is formed and nothing is wrapped.

    The arguments are those of Lightning's `DDPStrategy`; the last five, and `options`, those of
    `torch.nn.parallel.DistributedDataParallel`, whose documentation says more.

    Args:
        accelerator: For `Trainer(accelerator=…)`, where it has to be given; None here.
        parallel_devices: For `Trainer(devices=…)`, where they have to be given; None here.
        cluster_environment: As in `Trainer(plugins=…)`.
        checkpoint_io: As in `Trainer(plugins=…)`.
        precision_plugin: As in `Trainer(plugins=…)`.
        ddp_comm_state: What the hook keeps between steps; None for the process group. One with an attribute
            `process_group`, such as PowerSGDState, is made with None for it, and is begun anew with each fit and where
            parameters are frozen or unfrozen. Checkpoints keep what each rank has of it.
        ddp_comm_hook: How gradients travel: a hook of `torch.distributed.algorithms.ddp_comm_hooks`.
        ddp_comm_wrapper: Wraps the hook, as `fp16_compress_wrapper` does.
        model_averaging_period: With a PostLocalSGDState: optimizer steps from one averaging of the models to the next.
        process_group_backend: None for the backend that suits the accelerator.
        timeout: How long a collective waits for a missing rank; None for the default, 30 minutes.
        start_method: Accepted for the sake of Lightning's programs, and without effect: there is one way to start.
        find_unused_parameters: Look in every step for parameters that take no part in it. Costs a walk over the graph.
        static_graph: Promise that every step uses the same parameters in the same way.
        gradient_as_bucket_view: Let `.grad` share memory with the buckets that travel. Default True here.
        bucket_cap_mb: Size of a bucket of gradients, in MiB; None for PyTorch's default, 25.
        broadcast_buffers: Copy rank 0's buffers to all ranks before each step.
        options: Any other of DistributedDataParallel's.

    Raises:
        MisconfigurationException: For what is to be given elsewhere, saying where, and for an unknown option.
    """

    name = "ddp"
    launcher = "helpers"
    joins = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: Sequence[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "popen",
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        **options: Any,
    ) -> None:
        _refuse(accelerator, parallel_devices, start_method, options)
        self.plugins = [extra for extra in (cluster_environment, checkpoint_io, precision_plugin) if extra is not None]
        self.options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
            **options,
        }
        if not broadcast_buffers:  # PyTorch 2.13 renamed the option, and warns about the old name
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            self.options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
        self.process_group_backend = process_group_backend
        self.timeout = timeout or distributed.DEFAULT_TIMEOUT
        self.comm_hook, self.comm_wrapper, self._hook_state = ddp_comm_hook, ddp_comm_wrapper, HookState(ddp_comm_state)
        self._period = _averaging_period(model_averaging_period, ddp_comm_state)
        self._formed_group = False
        self._reset()

    def connect(self, accelerator: Accelerator, device: torch.device, ranks: Ranks) -> None:
        """Take the place of one rank: choose the device, form the process group unless it stands."""
        super().connect(accelerator, device, ranks)
        if ranks.world_size > 1:
            self._backend = self.process_group_backend or accelerator.process_group_backend
            self._formed_group = distributed.join(ranks, self._backend, self.timeout)

    def disconnect(self) -> None:
        """Leave the process group, if it was formed for this run.

        Where a launcher started the ranks, the group lives as long as they do, for the next run.
        """
        if self._formed_group and self.ranks.store is not None:
            distributed.leave()
            self._formed_group = False

    def _reset(self) -> None:
        self._ddp: DistributedDataParallel | None = None
        self._trained: list[bool] = []
        self._averager: ModelAverager | None = None
        self._evaluating = ExitStack()
        self._resumed: dict[str, Any] = {}
        self._resumed_optimizers: Sequence[Optimizer] = ()
        self._batchnorm: batchnorm.Former = []

    def synchronize_batchnorm(self, module: nn.Module) -> None:
        """Have batch normalization compute its statistics over all ranks, until `teardown`."""
        self._batchnorm += batchnorm.synchronize(module)

    def setup(self, module: nn.Module, training: bool) -> Callable[..., Any] | None:
        """Move the module, make the ranks' copies equal to rank 0's, and wrap it where gradients are to be averaged.

        Not wrapped are a module without trainable parameters and one that optimizes by hand, for which
        `sync_gradients` is called.

        Raises:
            MisconfigurationException: On every rank, where the ranks' modules differ in a name, shape or dtype.
        """
        self.module = module
        self.accelerator.move_module(module, self.root_device)
        step: Callable[..., Any] | None = cast(Any, module).training_step if training else None
        if self.world_size == 1:
            return step
        replicas.check_same_modules(module)
        if training and getattr(module, "automatic_optimization", True):
            self._wrap_anew()
            step = self._training_step
        if self._ddp is None:
            replicas.broadcast(tensor for _, tensor in replicas.parameters_and_buffers(module))
        return step

    def _wrap_anew(self) -> None:
        self._trained = _trained(self.module)
        self._ddp = None
        if any(self._trained):
            self._hook_state.begin(self.ranks)
            with batchnorm.bare(self._batchnorm):
                self._ddp = self._wrap(self.module, self._hook_state.given)
        if self._period is not None and self._averager is None:
            start = self._hook_state.given.start_localSGD_iter
            self._averager = ModelAverager(self.module, self._period, start)
            self.after_step = self._averager.after_step

    def _training_step(self, *args: Any) -> Any:
        return cast(Any, self.module).training_step(*args) if self._ddp is None else self._ddp("training_step", *args)

    def before_training_epoch(self) -> None:
        """Wrap the module anew where parameters were frozen or unfrozen, of which the wrapper does not take note."""
        if self._trained and _trained(self.module) != self._trained:
            if self._averager is not None:
                self._averager.restart()
            self._wrap_anew()
        if self._resumed:
            self._resume()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make the ranks' copies equal to rank 0's, and wrap the module unless nothing in it is trained.

        Raises:
            MisconfigurationException: On every rank, where the ranks' modules differ in a name, shape or dtype.
        """
        if self.world_size == 1:
            return module
        replicas.check_same_modules(module)
        if any(_trained(module)):
            return self._wrap(module, self._hook_state.separate(self.ranks))
        replicas.broadcast(tensor for _, tensor in replicas.parameters_and_buffers(module))
        return module

    def _wrap(self, module: nn.Module, hook_state: Any) -> DistributedDataParallel:
        # Without device_ids, which would only make it walk through every batch and copy what is elsewhere.
        ddp = _Wrapper(_Methods(module), **self.options)
        ddp.settle_buckets()
        if self.comm_hook is not None:
            hook = self.comm_hook if self.comm_wrapper is None else self.comm_wrapper(self.comm_hook)
            ddp.register_comm_hook(hook_state, named_for(self._backend, hook))
        return ddp

    def state_dict(self, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """What the communication hook keeps on this rank, and its model and optimizers where those differ by rank."""
        if self._resumed or self._ddp is None or self.comm_hook is None:
            return self._resumed
        state: dict[str, Any] = {"hook": self._hook_state.state_dict()}
        if self._averager is not None:
            state["averager"] = self._averager.state_dict()
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        return state

    def load_state_dict(self, state: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Put back what `state_dict` returned, when the next epoch of training begins."""
        self._resumed, self._resumed_optimizers = state, optimizers

    def _resume(self) -> None:
        state, self._resumed = self._resumed, {}
        if self._ddp is None:
            return
        if "hook" in state:
            self._hook_state.load_state_dict(state["hook"], self.root_device)
        if self._averager is not None and "averager" in state:
            self._averager.load_state_dict(state["averager"])
            for optimizer, kept in zip(self._resumed_optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)

    def teardown(self) -> None:
        """Drop the wrapper; the module is the bare one that was handed in."""
        batchnorm.restore(self._batchnorm)
        self._evaluating.close()
        self.after_step = None
        self._reset()
        super().teardown()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Context in which backward passes leave gradients local."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def sync_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average `.grad` over the ranks, for each of `parameters` that has one on any rank.

        A rank without a gradient counts as zero. Sparse gradients become dense.

        Args:
            parameters: The same ones in the same order on every rank.
        """
        if self.world_size == 1:
            return
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        present = torch.tensor([parameter.grad is not None for parameter in trainable], dtype=torch.uint8)
        anywhere = distributed.all_reduce(present, "max").tolist()
        used = [parameter for parameter, has_gradient in zip(trainable, anywhere, strict=True) if has_gradient]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.layout != torch.strided:
                parameter.grad = parameter.grad.to_dense()
        replicas.average(parameter.grad for parameter in used if parameter.grad is not None)

    def before_evaluation(self, module: nn.Module | None = None) -> None:
        """Give every rank rank 0's buffers, such as running means; parameters are equal already, or are averaged."""
        if self.world_size > 1:
            if self._averager is not None:
                self._evaluating.enter_context(self._averager.averaged())
            module = self.module if module is None else module
            names = {name for name, _ in module.named_buffers()}
            replicas.broadcast(tensor for name, tensor in replicas.parameters_and_buffers(module) if name in names)

    def after_evaluation(self) -> None:
        """Give each rank its own model back, where they were averaged."""
        self._evaluating.close()

    def module_state_dict(self) -> dict[str, Any]:
        """The bare module's state; between two averagings of models, that of the average. A collective call then."""
        if self._averager is None:
            return super().module_state_dict()
        with self._averager.averaged():
            return {name: value.clone() for name, value in super().module_state_dict().items()}


def _trained(module: nn.Module) -> list[bool]:
    """Of each parameter, whether it is trained."""
    return [parameter.requires_grad for parameter in module.parameters()]


class _Wrapper(DistributedDataParallel):
    """DistributedDataParallel, but that an error about unused parameters names them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if _UNFINISHED in str(error):
                _raise_with_names(error, self.module.module)
            raise

    def settle_buckets(self) -> None:
        """Have the buckets take now the order that they would else take after the first step.

        With it changes in which order gradients are added up, with three ranks or more, and what a communication hook
        keeps for a bucket: the first step of a resumed run would not be that of the uninterrupted one.
        """
        if self.find_unused_parameters or self.static_graph or self.mixed_precision is not None:
            return
        if any(getattr(part, "sparse", False) for part in self.modules()):  # a sparse gradient is expected
            return
        with torch.enable_grad():
            super().forward(None).backward()  # type: ignore[no-untyped-call]
        self.zero_grad()


class _Methods(nn.Module):
    """What DistributedDataParallel wraps: its `forward` runs any method of the user's module, by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        setattr(self, replicas.IGNORED, [f"module.{name}" for name in getattr(module, replicas.IGNORED, ())])

    def forward(self, method: str | None, *args: Any, **kwargs: Any) -> Any:
        if method is None:  # a zero that depends on every parameter, as if the first registered were used first
            return sum(p.sum().abs() * 0 for p in self.parameters() if p.requires_grad)
        run = self.module if method == "forward" else getattr(self.module, method)
        return run(*args, **kwargs)


def _raise_with_names(error: RuntimeError, module: nn.Module) -> NoReturn:
    """Say which parameters had no gradient; PyTorch counts them, among those it keeps in sync."""
    listed = re.search(r"did not receive grad for rank (\d+): ([\d ]+)", str(error))
    ignored = getattr(module, replicas.IGNORED, ())
    names = [name for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
    if listed is None:
        raise error
    unused = ", ".join(names[int(index)] for index in listed[2].split())
    raise MisconfigurationException(
        f"these parameters took no part in the loss of the training step before this one, on rank {listed[1]}: "
        f'{unused}. If that is meant, use strategy="ddp_find_unused_parameters_true", or set '
        "requires_grad=False on parameters that are never used."
    ) from error


def _refuse(accelerator: Any, parallel_devices: Any, start_method: str, options: dict[str, Any]) -> None:
    """Say of arguments that are given elsewhere where, and of unknown ones which there are."""
    if accelerator is not None or parallel_devices is not None:
        raise MisconfigurationException(
            f"DDPStrategy(accelerator={accelerator!r}, parallel_devices={parallel_devices!r}): a strategy knows no "
            "hardware; give Trainer(accelerator=…, devices=…) instead"
        )
    if start_method not in _START_METHODS:
        raise MisconfigurationException(
            f"DDPStrategy(start_method={start_method!r}): allowed are {', '.join(map(repr, _START_METHODS))}; all mean "
            "the same, helper processes of the calling script"
        )
    known = [name for name in inspect.signature(DistributedDataParallel).parameters if name not in _OURS]
    for option in options:
        if option in _OURS:
            raise MisconfigurationException(f"DDPStrategy({option}=…): give {_OURS[option]} instead")
        if option not in known:
            raise MisconfigurationException(
                f"DDPStrategy({option}=…): DistributedDataParallel of torch {torch.__version__} has no such option; "
                f"it has {', '.join(known)}"
            )


def _averaging_period(period: int | None, state: Any) -> int | None:
    """See that the two are given that belong together."""
    if period is not None and (isinstance(period, bool) or period < 1):
        raise MisconfigurationException(f"DDPStrategy(model_averaging_period={period!r}): give an int >= 1")
    if hasattr(state, "start_localSGD_iter") == (period is not None):
        return period
    raise MisconfigurationException(
        f"DDPStrategy(model_averaging_period={period!r}, ddp_comm_state={state!r}): for local SGD give both, with "
        "ddp_comm_state=PostLocalSGDState(None, None, start_localSGD_iter=…) and ddp_comm_hook=post_localSGD_hook"
    )
