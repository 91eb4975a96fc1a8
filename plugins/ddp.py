"""Data parallel training: the whole model on every rank, gradients averaged by PyTorch's DistributedDataParallel."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import zip_longest
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, Strategy

_BUCKET_BYTES = 25 * 2**20
_IGNORED = "_ddp_params_and_buffers_to_ignore"
_UNFINISHED = "Expected to have finished reduction in the prior iteration"


class DDPStrategy(Strategy):
    """A copy of the model on every rank. With one rank only, no process group is formed and nothing is wrapped.

    The options are those of `torch.nn.parallel.DistributedDataParallel`, whose documentation says more.

    Args:
        find_unused_parameters: Look in every step for parameters that take no part in it. Costs a walk over the graph.
        static_graph: Promise that every step uses the same parameters in the same way.
        gradient_as_bucket_view: Let `.grad` share memory with the buckets that travel. Default True here.
        bucket_cap_mb: Size of a bucket of gradients, in MiB; None for PyTorch's default, 25.
        broadcast_buffers: Copy rank 0's buffers to all ranks before each step.
        process_group_backend: None for the backend that suits the accelerator.
        timeout: How long a collective waits for a missing rank; None for the default, 30 minutes.
        ddp_comm_hook: How gradients travel: a hook of `torch.distributed.algorithms.ddp_comm_hooks`.
        ddp_comm_state: What the hook keeps between steps; None for the process group.
        ddp_comm_wrapper: Wraps the hook, as `fp16_compress_wrapper` does.
    """

    name = "ddp"
    launcher = "helpers"

    def __init__(
        self,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "bucket_cap_mb": bucket_cap_mb,
        }
        if not broadcast_buffers:  # PyTorch 2.13 renamed the option, and warns about the old name
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            self.options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
        self.process_group_backend = process_group_backend
        self.timeout = timeout or distributed.DEFAULT_TIMEOUT
        self.comm_hook, self.comm_state, self.comm_wrapper = ddp_comm_hook, ddp_comm_state, ddp_comm_wrapper
        self._ddp: DistributedDataParallel | None = None
        self._trained: list[bool] = []
        self._formed_group = False

    def connect(self, accelerator: Accelerator, device: torch.device, ranks: Ranks) -> None:
        """Take the place of one rank: choose the device, form the process group unless it stands."""
        super().connect(accelerator, device, ranks)
        if ranks.world_size > 1:
            backend = self.process_group_backend or accelerator.process_group_backend
            self._formed_group = distributed.join(ranks, backend, self.timeout)

    def disconnect(self) -> None:
        """Leave the process group, if it was formed for this run.

        Where a launcher started the ranks, the group lives as long as they do, for the next run.
        """
        if self._formed_group and self.ranks.store is not None:
            distributed.leave()
            self._formed_group = False

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
        _check_same_modules(module)
        if training and getattr(module, "automatic_optimization", True):
            self._wrap_anew()
            step = self._training_step
        if self._ddp is None:
            _broadcast(tensor for _, tensor in _parameters_and_buffers(module))
        return step

    def _wrap_anew(self) -> None:
        self._trained = _trained(self.module)
        self._ddp = self._wrap(self.module) if any(self._trained) else None

    def _training_step(self, *args: Any) -> Any:
        return cast(Any, self.module).training_step(*args) if self._ddp is None else self._ddp("training_step", *args)

    def before_training_epoch(self) -> None:
        """Wrap the module anew where parameters were frozen or unfrozen, of which the wrapper does not take note."""
        if self._trained and _trained(self.module) != self._trained:
            self._wrap_anew()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make the ranks' copies equal to rank 0's, and wrap the module unless nothing in it is trained.

        Raises:
            MisconfigurationException: On every rank, where the ranks' modules differ in a name, shape or dtype.
        """
        if self.world_size == 1:
            return module
        _check_same_modules(module)
        if any(_trained(module)):
            return self._wrap(module)
        _broadcast(tensor for _, tensor in _parameters_and_buffers(module))
        return module

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        # Without device_ids, which would only make it walk through every batch and copy what is elsewhere.
        ddp = _Wrapper(_Methods(module), **self.options)
        if self.comm_hook is not None:
            hook = self.comm_hook if self.comm_wrapper is None else self.comm_wrapper(self.comm_hook)
            ddp.register_comm_hook(self.comm_state, hook)
        return ddp

    def teardown(self) -> None:
        """Drop the wrapper; the module is the bare one that was handed in."""
        self._ddp, self._trained = None, []
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
        for bucket in _buckets(parameter.grad for parameter in used if parameter.grad is not None):
            # Divided first: the sum of many half-precision gradients could overflow.
            _unflatten(distributed.all_reduce(_flatten(bucket).div_(self.world_size), "sum"), bucket)

    def before_evaluation(self, module: nn.Module | None = None) -> None:
        """Give every rank rank 0's buffers, such as running means; parameters are equal already."""
        if self.world_size > 1:
            module = self.module if module is None else module
            names = {name for name, _ in module.named_buffers()}
            _broadcast(tensor for name, tensor in _parameters_and_buffers(module) if name in names)


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


class _Methods(nn.Module):
    """What DistributedDataParallel wraps: its `forward` runs any method of the user's module, by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        setattr(self, _IGNORED, [f"module.{name}" for name in getattr(module, _IGNORED, ())])

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        run = self.module if method == "forward" else getattr(self.module, method)
        return run(*args, **kwargs)


def _raise_with_names(error: RuntimeError, module: nn.Module) -> NoReturn:
    """Say which parameters had no gradient; PyTorch counts them, among those it keeps in sync."""
    listed = re.search(r"did not receive grad for rank (\d+): ([\d ]+)", str(error))
    ignored = getattr(module, _IGNORED, ())
    names = [name for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
    if listed is None:
        raise error
    unused = ", ".join(names[int(index)] for index in listed[2].split())
    raise MisconfigurationException(
        f"these parameters took no part in the loss of the training step before this one, on rank {listed[1]}: "
        f'{unused}. If that is meant, use strategy="ddp_find_unused_parameters_true", or set '
        "requires_grad=False on parameters that are never used."
    ) from error


def _parameters_and_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    ignored = getattr(module, _IGNORED, ())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in ignored:
            yield name, tensor


def _check_same_modules(module: nn.Module) -> None:
    mine = [(name, _describe(name, tensor)) for name, tensor in _parameters_and_buffers(module)]
    digests = distributed.gather_objects(hashlib.sha256(repr(mine).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    described = distributed.gather_objects(mine)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    for ours, theirs in zip_longest(described[0], described[other], fillvalue=(None, "")):
        if ours != theirs:
            first, second = (f"{name!r}, {what}" if name else "not there" for name, what in (ours, theirs))
            raise MisconfigurationException(
                f"the ranks have different modules: the first parameter or buffer that differs is {first} on rank 0, "
                f"and {second} on rank {other}. Build the same module on every rank: its layers may not depend on the "
                "rank, nor on data that differs between ranks."
            )


def _describe(name: str, tensor: Tensor) -> str:
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise MisconfigurationException(
            f"{name!r} has no shape yet: ddp needs lazy layers to be initialized first. "
            "Run a batch through the module in setup() or configure_model(), or give the layers their sizes."
        )
    frozen = "" if tensor.requires_grad or not isinstance(tensor, nn.Parameter) else ", without requires_grad"
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}{frozen}"


def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place by rank 0's, a bucket at a time."""
    for bucket in _buckets(tensors):
        flat = _flatten(bucket)
        distributed.broadcast(flat.view(torch.uint8))  # bytes, as not every backend knows every dtype
        if distributed.rank() != 0:
            _unflatten(flat, bucket)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, up to `_BUCKET_BYTES` unless a single one is larger."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in by_kind.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _flatten(bucket: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _unflatten(flat: Tensor, bucket: list[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
