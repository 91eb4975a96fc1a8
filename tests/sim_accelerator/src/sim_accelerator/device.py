"""The device `sim:0`, as torch sees it: importing this registers it, as torch's PrivateUse1 device.

Tensors on it hold their values in an ordinary CPU tensor; every operator runs there. Known limits: one device a
process, no memory that is page-locked for it, and no storage that could be shared with another tensor by address.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "sim:0"
_MAY_MIX = {"copy_", "_to_copy", "_foreach_copy_", "set_", "index", "index_put_", "index_put", "_pack_padded_sequence"}
"""Operators that take tensors of two devices: copies, indices on the CPU, lengths on the CPU."""


class SimTensor(torch.Tensor):
    """A tensor that says it lives on `sim:0`; `raw` holds its values on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(DEVICE),
            requires_grad=False,
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self, **_: object) -> str:
        return f"SimTensor({self.raw})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: SimTensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.raw = new.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **_: object) -> Any:
        raise TypeError(
            f"can't convert a tensor on {DEVICE} to numpy; use Tensor.cpu() to copy it to host memory first"
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: int) -> Any:
        # It goes back to the device wherever it is read, as nothing in a wrapper could be mapped to another.
        parts = (self.raw, self.dtype, DEVICE, self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, parts

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_sim(func, *args, **(kwargs or {}))


def run_on_sim(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU's values; answer on the device that PyTorch's rules call for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    owners = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, SimTensor)}
    target = kwargs.get("device")
    if target is None:
        on_sim = bool(owners)
        if on_sim:
            _check_devices(func, tensors)
    else:
        on_sim = torch.device(target).type == "sim"
        kwargs = {**kwargs, "device": torch.device("cpu") if on_sim else target}

    def wrap(result: Any) -> Any:
        if not on_sim or not isinstance(result, Tensor):
            return result
        return owners[id(result)] if id(result) in owners else SimTensor(result)

    random = torch.Tag.nondeterministic_seeded in func.tags
    with _own_generator() if random and on_sim else nullcontext():
        results = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if func is torch.ops.aten._pack_padded_sequence.default:
        return wrap(results[0]), results[1]  # the lengths stay on the CPU, on every device
    return tree_map(wrap, results)


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, SimTensor) else value


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Refuse what a GPU refuses: tensors of the CPU beside those of the device, unless they are scalars to be read."""
    name = func.overloadpacket.__name__
    if name in _MAY_MIX:
        return
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, SimTensor)]
    written = name.endswith("_") and tensors[0] in elsewhere[:1]
    if written or any(tensor.dim() > 0 for tensor in elsewhere):
        found = sorted({str(tensor.device) for tensor in tensors})
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {', '.join(found)}")


_generator = torch.Generator()


@contextmanager
def _own_generator() -> Iterator[None]:
    """Random numbers are the device's own: the CPU's generator neither gives nor loses any."""
    cpu = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    try:
        yield
    finally:
        _generator.set_state(torch.get_rng_state())
        torch.set_rng_state(cpu)


def get_rng_state(device: Any = DEVICE) -> Tensor:
    """The generator's state, a byte tensor on the CPU."""
    return _generator.get_state()


def set_rng_state(state: Tensor, device: Any = DEVICE) -> None:
    """Put back what `get_rng_state` returned."""
    _generator.set_state(state.cpu())


def manual_seed(seed: int) -> None:
    """Seed the generator; `torch.manual_seed` does it too."""
    _generator.manual_seed(seed)


def memory_allocated() -> int:
    """Bytes that tensors of this process take on the device."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is SimTensor:
            storage = thing.raw.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# What torch looks for in `torch.sim`.
_MODULE = SimpleNamespace(
    is_initialized=lambda: True,
    is_available=lambda: True,
    current_device=lambda: 0,
    device_count=lambda: 1,
    get_device_name=lambda device=None: "simulated accelerator",
    synchronize=lambda device=None: None,
    empty_cache=lambda: None,
    manual_seed=manual_seed,
    manual_seed_all=manual_seed,
    get_rng_state=get_rng_state,
    set_rng_state=set_rng_state,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    _is_in_bad_fork=lambda: False,
)

_HALF = """
    conv1d conv2d conv3d linear matmul mm bmm addmm baddbmm scaled_dot_product_attention
"""
_FULL = """
    softmax.int log_softmax.int nll_loss nll_loss_nd cross_entropy_loss mse_loss l1_loss smooth_l1_loss
    binary_cross_entropy_with_logits layer_norm group_norm norm.Scalar sum exp log pow.Tensor_Scalar
"""


def _under_autocast(operator: Any, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
        return value.to(dtype()) if eligible else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return run


def _register() -> list[torch.library.Library]:
    backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=_MODULE)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run_on_sim, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in ("copy_", "zero_"):  # what torch.tensor(…, device="sim:0") calls past the fallback
        own.impl(name, partial(run_on_sim, getattr(torch.ops.aten, name).default))
    autocast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, dtype in ((_HALF, lambda: torch.get_autocast_dtype("sim")), (_FULL, lambda: torch.float32)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            autocast.impl(name, _under_autocast(operator, dtype))
    return [everything, own, autocast]


_libraries = _register()
