"""What Fabric hands back in place of a module, an optimizer and a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSet, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightlite.data import RankLoader
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Accelerator, Precision, Strategy
from lightlite.loops.batches import one_ahead
from lightlite.nest import apply_to_tensors
from lightlite.optim import LightningOptimizer

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods that run as `forward` does, without being marked."""


class BackwardPass:
    """Whether `fabric.backward` is at work now. One for all that a Fabric has set up, copies included."""

    active = False

    def __deepcopy__(self, memo: Any) -> BackwardPass:
        return self

    def watch(self, tensor: Tensor) -> Tensor:
        """Have a backward pass through `tensor` fail that is not `fabric.backward`'s."""
        if tensor.requires_grad:
            tensor.register_hook(self._check)
        return tensor

    def _check(self, gradient: Tensor) -> None:
        if not self.active:
            raise MisconfigurationException(
                "loss.backward() was called, but precision='16-mixed' needs the loss to be scaled; call "
                "fabric.backward(loss) instead"
            )


class _FabricModule(nn.Module):
    """A module whose `forward` runs in the chosen precision, and so that gradients are averaged over the ranks.

    Attributes and methods are those of the module itself, which is `module`; parameters, buffers and the state have
    its names. Without gradients (`torch.no_grad`) the bare module runs, so that ranks may evaluate different numbers of
    batches; where it is spread over the ranks, that takes `with fabric.strategy.evaluating():` around the loop.

    Args:
        forward_module: What the strategy made of the module.
        module: The module, compiled or not.
        strategy: The strategy.
        precision: The precision.
        backward_pass: Shared by all that one Fabric has set up.
    """

    device: torch.device
    """Where the module is; the run's device for one without parameters and buffers."""
    dtype: torch.dtype
    """The format of its first floating-point parameter or buffer."""

    def __init__(
        self,
        forward_module: nn.Module,
        module: nn.Module,
        strategy: Strategy,
        precision: Precision,
        backward_pass: BackwardPass,
    ) -> None:
        super().__init__()
        self._forward_module = forward_module
        self.training = module.training
        # Beside the registered submodule, these are plain attributes: quick to find, and not registered twice.
        self.__dict__.update(
            _original_module=unwrap_compiled(module),
            _runs=module,
            _is_synced=forward_module is not module,
            _wrapper=forward_module,
            _strategy=strategy,
            _forward_methods=set(STEPS),
            _convert_input=precision.input_converter(),
            _context=precision.forward_context() or nullcontext,
            _convert_output=precision.output_converter(),
            _backward_pass=None if precision.scaler is None else backward_pass,
        )
        # With nothing to convert, no context and no wrapper, forward is no more than the module's own.
        self.__dict__["_is_plain"] = (
            self._convert_input is None
            and self._context is nullcontext
            and self._convert_output is None
            and self._backward_pass is None
        )
        self.__dict__["_is_bare"] = self._is_plain and not self._is_synced

    @property
    def module(self) -> nn.Module:
        """The module that was set up."""
        return self._original_module  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's `forward`."""
        return self._runs(*args, **kwargs) if self._is_bare else self._run("forward", *args, **kwargs)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the module in the chosen precision, through the strategy's wrapper."""
        if self._is_synced and (torch.is_grad_enabled() or self._strategy.spreads):
            run: Callable[..., Any] = partial(self._wrapper, method)
        else:
            run = self._runs if method == "forward" else getattr(self._original_module, method)
        if self._is_plain:
            return run(*args, **kwargs)
        if self._convert_input is not None:
            args, kwargs = self._convert_input((args, kwargs))
        with self._context():
            output = run(*args, **kwargs)
        if self._convert_output is not None:
            output = self._convert_output(output)
        if self._backward_pass is not None:
            apply_to_tensors(output, self._backward_pass.watch)
        return output

    def mark_forward_method(self, method: MethodType | str) -> None:
        """Have a method run as `forward` does: in the chosen precision, and with gradients in sync.

        Args:
            method: The module's method, or its name.

        Raises:
            TypeError: For anything else.
            ValueError: For `forward`, which does so anyway.
            AttributeError: Where the module has no such method.
        """
        if not isinstance(method, (MethodType, str)):
            raise TypeError(
                f"mark_forward_method({method!r}): {type(method).__name__}; give a method of the module, or its name"
            )
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError(
                "mark_forward_method('forward'): leave it out, forward is what other methods are made like"
            )
        if not isinstance(getattr(self._original_module, name, None), MethodType):
            raise AttributeError(
                f"mark_forward_method({name!r}): {type(self._original_module).__name__} has no method of that name"
            )
        self._forward_methods.add(name)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Context in which backward passes leave gradients local; see `Fabric.no_backward_sync`."""
        return self._wrapper.no_sync() if self._is_synced else nullcontext()

    def unwrap(self) -> None:
        """Go on without the strategy's wrapper: the ranks are about to part."""
        if self._is_synced:
            self._strategy.unwrap(self._wrapper)
        self._forward_module = self._runs
        self.__dict__.update(_is_synced=False, _is_bare=self._is_plain, _wrapper=self._runs)

    def train(self, mode: bool = True) -> _FabricModule:
        """Set the mode. With several ranks, `eval()` gives all of them rank zero's buffers: call it on every rank."""
        if self._is_synced and self.training and not mode:
            self._strategy.before_evaluation(self._original_module)
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self._original_module.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's own."""
        return self._original_module.named_parameters(*args, **kwargs)  # type: ignore[no-any-return]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The module's own."""
        return self._original_module.named_buffers(*args, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Whatever this wrapper has not is the module's."""
        own = self.__dict__
        if "_original_module" not in own or name in own["_modules"]:
            return super().__getattr__(name)
        original = own["_original_module"]
        if name in _PLACE and not hasattr(original, name):
            return _PLACE[name](original, own["_strategy"])
        found = getattr(original, name)
        if name in own["_forward_methods"] and callable(found):
            return partial(self._run, name)
        return self._guarded(found, name) if own["_is_synced"] and isinstance(found, MethodType) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it where it is: on the module, unless only this wrapper has it."""
        original = self.__dict__.get("_original_module")
        mine = name in self.__dict__ or name in self.__dict__.get("_modules", ()) or hasattr(type(self), name)
        if original is None or mine:
            super().__setattr__(name, value)
        if original is not None and (not mine or hasattr(original, name)):
            setattr(original, name, value)

    def _guarded(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A method that must not compute gradients past the wrapper, where they would not be averaged."""

        def refuse(*_: Any) -> None:
            if torch.is_grad_enabled():
                kind = type(self._original_module).__name__
                raise MisconfigurationException(
                    f"{kind}.{name}() was called and runs the model, but not through its forward: with several ranks "
                    f"its gradients would not be averaged. After fabric.setup, call "
                    f"model.mark_forward_method({name!r}), or call it under torch.no_grad()"
                )

        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            hooks = [module.register_forward_pre_hook(refuse) for module in self._original_module.modules()]
            try:
                return method(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()

        return guarded


def _device_of(module: nn.Module, strategy: Strategy) -> torch.device:
    found = next(chain(module.parameters(), module.buffers()), None)
    return strategy.root_device if found is None else found.device


def _dtype_of(module: nn.Module, strategy: Strategy) -> torch.dtype:
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())


_PLACE: dict[str, Callable[[nn.Module, Strategy], Any]] = {"device": _device_of, "dtype": _dtype_of}
"""What a wrapped module tells of itself, where the module does not."""


class _FabricOptimizer(LightningOptimizer):
    """An optimizer whose steps are scaled back where the precision needs it; otherwise the optimizer itself.

    Args:
        optimizer: The optimizer.
        strategy: The strategy.
        precision: The precision.
        callbacks: Objects, of which those with a method `on_after_optimizer_step(strategy, optimizer)` are called.
        together: All that share the scaler, this one included.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        strategy: Strategy,
        precision: Precision,
        callbacks: Sequence[Any] = (),
        together: MutableSet[_FabricOptimizer] | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.peers = set() if together is None else together
        self.peers.add(self)
        self.scaler = precision.scaler
        self._strategy = strategy
        self._precision = precision
        self.zero_grad = optimizer.zero_grad  # found at once, not by __getattr__
        found = (getattr(callback, "on_after_optimizer_step", None) for callback in callbacks)
        self._after_step = [hook for hook in found if callable(hook)]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_FabricOptimizer, (self.optimizer, self._strategy, self._precision))

    def __repr__(self) -> str:
        return f"Fabric{self.optimizer!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step the optimizer; with a gradient scaler, unless gradients overflowed.

        Args:
            closure: Computes the loss and, by `fabric.backward`, its gradients, and returns the loss.
            kwargs: Handed to the optimizer.
        """
        if self.scaler is not None:
            loss = None if closure is None else closure()
            result = self._scaled_step(None, **kwargs)
            output = result if closure is None else loss
        else:
            output = self.optimizer.step(**kwargs) if closure is None else self.optimizer.step(closure, **kwargs)
        for hook in self._after_step:
            hook(strategy=self._strategy, optimizer=self.optimizer)
        return output

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's whole state."""
        return self._strategy.optimizer_state_dict(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._strategy.load_optimizer_state(self.optimizer, state_dict)


class _FabricDataLoader:
    """This rank's batches of a loader, on its device. Every attribute is that of the loader itself.

    Args:
        loader: What this rank iterates.
        accelerator: Moves batches.
        device: The device that batches are moved to; None where they are to stay.
    """

    def __init__(self, loader: RankLoader, accelerator: Accelerator, device: torch.device | None) -> None:
        self._loader, self.device = loader, device
        self._begin = None if device is None else accelerator.background_mover(device)
        self._move = None if device is None else accelerator.batch_mover(device)
        self._epoch = 0

    def __len__(self) -> int:
        total = self._loader.length
        if total is None:
            raise TypeError(f"the {type(self._loader.source).__name__} that was set up has no length")
        return len(range(self._loader.first, total, self._loader.stride))

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass, the next epoch of samplers that shuffle by epoch."""
        self._loader.set_epoch(self._epoch)
        self._epoch += 1
        batches = self._loader.start()
        if self._begin is not None:
            moving = map(self._begin, batches)
            return (moved() for moved in (one_ahead(moving) if self._loader.may_fetch_ahead else moving))
        return batches if self._move is None else map(self._move, batches)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is, to samplers that shuffle by epoch; passes are counted from 0 otherwise."""
        self._epoch = epoch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._loader.loader, name)


def unwrap_compiled(module: Any) -> Any:
    """The module that was given to `torch.compile`, or the module itself."""
    compiled = isinstance(module, nn.Module) and "_orig_mod" in module._modules
    return module._modules["_orig_mod"] if compiled else module


def is_wrapped(obj: object) -> bool:
    """Whether a module, an optimizer or a loader is what Fabric has set up."""
    # not isinstance: a wrapped optimizer passes for the optimizer itself
    return issubclass(type(unwrap_compiled(obj)), (_FabricModule, _FabricOptimizer, _FabricDataLoader))


def unwrap(obj: Any) -> Any:
    """The user's own module, optimizer or loader; anything else as it is."""
    inner = unwrap_compiled(obj)
    if issubclass(type(inner), _FabricModule):
        return inner.module
    if issubclass(type(inner), LightningOptimizer):
        return inner.optimizer
    if issubclass(type(inner), _FabricDataLoader):
        return inner._loader.source
    return inner if isinstance(obj, nn.Module) else obj
