"""Modules whose parameters FSDP2 spreads over ranks: which parts are units, how they get values, how it is undone.

A unit is a module that was given to `torch.distributed.fsdp.fully_shard`: its parameters travel together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightlite import distributed
from lightlite.errors import MisconfigurationException

Policy = Any
"""Which modules are units: None, classes, a number of parameters, a function, or a policy of FSDP1."""

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip
_MAKERS = (
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "lightlite.plugins.turns",
)
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def units_of(module: nn.Module) -> list[FSDPModule]:
    """The units in a module, itself among them if it is one."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def choose_units(module: nn.Module, policy: Policy, by_hand: bool) -> list[nn.Module]:
    """The submodules that a policy makes units, inner ones before outer ones.

    Args:
        module: The user's module.
        policy: See `FSDPStrategy`.
        by_hand: Whether the user's code runs backward passes itself, after which a unit's parameters are gone: then
            what `module` consists of is more units.

    Raises:
        MisconfigurationException: For another kind of policy.
    """
    below = [part for name, part in module.named_modules() if name]
    chosen: list[nn.Module]
    if policy is None:
        chosen = _repeated(module)
        if by_hand:
            chosen += [part for part in module.children() if not isinstance(part, (nn.ModuleList, nn.ModuleDict))]
    elif isinstance(policy, int) and not isinstance(policy, bool):
        chosen = _by_size(module, lambda part, size: size >= policy)
    elif isinstance(policy, (set, frozenset, tuple, list)) and all(isinstance(kind, type) for kind in policy):
        kinds: tuple[type[nn.Module], ...] = tuple(policy)
        chosen = [part for part in below if isinstance(part, kinds)]
    elif hasattr(policy, "_run_policy"):
        chosen = list(policy._run_policy(module, set(), {}))
    elif callable(policy) and "recurse" in inspect.signature(policy).parameters:
        chosen = _by_size(module, lambda part, size: policy(module=part, recurse=False, nonwrapped_numel=size))
    elif callable(policy):
        chosen = [part for part in below if policy(part)]
    else:
        raise MisconfigurationException(
            f"auto_wrap_policy={policy!r}; give None, a set of classes of modules, a number of parameters from which "
            "on a module is sharded by itself, or a function of a module that returns whether it is"
        )
    wanted = {id(part) for part in chosen if any(True for _ in part.parameters())}
    return [part for part in reversed(below) if id(part) in wanted]


def _repeated(module: nn.Module) -> list[nn.Module]:
    """The outermost elements of lists of modules: of a transformer, its blocks."""
    found: list[nn.Module] = []
    for part in module.children():
        if isinstance(part, _LISTS):
            found += [inner for element in part.children() for inner in _elements(element)]
        else:
            found += _repeated(part)
    return found


def _elements(element: nn.Module) -> list[nn.Module]:
    is_list = isinstance(element, (nn.ModuleList, nn.ModuleDict))
    return [inner for one in element.children() for inner in _elements(one)] if is_list else [element]


def _by_size(module: nn.Module, decide: Callable[[nn.Module, int], Any]) -> list[nn.Module]:
    """The modules that are decided on, by the number of their parameters that are in no smaller such module."""
    found: list[nn.Module] = []

    def visit(part: nn.Module) -> int:
        own = sum(parameter.numel() for parameter in part.parameters(recurse=False))
        size = own + sum(visit(child) for child in part.children())
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)) or not decide(part, size):
            return size
        found.append(part)
        return 0

    visit(module)
    return found


def check_shared(module: nn.Module, units: Iterable[nn.Module]) -> None:
    """See that a parameter that several modules share travels with one unit.

    Args:
        module: The user's module.
        units: The submodules that are to be units; what is in none of them is the module's own.

    Raises:
        MisconfigurationException: Naming the parameter by all its names.
    """
    outer = {id(unit) for unit in units}
    found: dict[int, dict[int, str]] = {}

    def visit(part: nn.Module, prefix: str, unit: int) -> None:
        unit = id(part) if id(part) in outer else unit
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), {}).setdefault(unit, prefix + name)
        for name, child in part._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.", unit)

    visit(module, "", id(module))
    for names in found.values():
        if len(names) > 1:
            raise MisconfigurationException(
                f"{' and '.join(names.values())} are one parameter, which is shared by modules that are sharded apart; "
                "give the strategy an auto_wrap_policy, such as a set of classes, that leaves these modules out, or "
                "chooses one that holds them all"
            )


def owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    """Of each parameter and buffer: its name, the module it is in, its name there, itself, whether it is a parameter.

    Those that several modules share come several times.
    """
    for prefix, part in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for is_parameter, kept in ((True, part._parameters), (False, part._buffers)):
            for name, tensor in kept.items():
                if tensor is not None:
                    yield start + name, part, name, tensor, is_parameter


def put(part: nn.Module, name: str, tensor: Tensor, is_parameter: bool) -> None:
    """Set a module's parameter or buffer."""
    if is_parameter:
        part._parameters[name] = cast(nn.Parameter, tensor)
    else:
        part._buffers[name] = tensor


def replace(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put `make(name, tensor)` in the place of each parameter and buffer; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    for name, part, own, tensor, is_parameter in list(owners(module)):
        if id(tensor) not in made:
            fresh = make(name, tensor)
            changed = is_parameter and fresh is not tensor
            made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if changed else fresh
        put(part, own, made[id(tensor)], is_parameter)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Any) -> Tensor:
    """Overwrite a tensor by this rank's part of `source`, which has its shape; reads no more of it than that."""
    held = local(target.detach())
    if not isinstance(target, DTensor):
        held.copy_(source[tuple(slice(0, size) for size in target.shape)])
        return target
    for chunk in target.__create_chunk_list__():
        if held.numel():
            part = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            held.copy_(source[part])
    return target


def total_norm(gradients: list[Tensor], order: float, device: torch.device) -> Tensor:
    """The norm of all ranks' parts of the gradients, as one vector. A collective call, whatever there are.

    Args:
        gradients: The same ones in the same order on every rank.
        order: That of the norm, as for `torch.linalg.vector_norm`.
        device: Where the ranks meet.
    """
    spread: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        how = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        held = local(gradient.detach())
        norm = torch.linalg.vector_norm(held, order) if held.numel() else torch.zeros((), dtype=held.dtype)
        spread.setdefault(how, []).append(norm.to(device))
    totals = []
    for how, norms in spread.items():
        own = torch.stack(norms)
        for dimension, placement in enumerate(how[1] if how else ()):
            if placement.is_shard():
                parts = [torch.empty_like(own) for _ in range(how[0].size(dimension))]
                dist.all_gather(parts, own, group=how[0].get_group(dimension))
                own = torch.linalg.vector_norm(torch.stack(parts), order, dim=0)
        totals.append(torch.linalg.vector_norm(own, order))
    return torch.linalg.vector_norm(torch.stack(totals), order) if totals else torch.tensor(0.0, device=device)


def forget_whole_gradients(module: nn.Module) -> None:
    """Drop the gradients that units keep whole, until they are averaged over the ranks."""
    for unit in units_of(module):
        group = cast(Any, unit)._get_fsdp_state()._fsdp_param_group
        for parameter in () if group is None else group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None


def hollow(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor without values, spread over the ranks as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device=device)
    shard = torch.empty_like(tensor.to_local(), device=device)
    return DTensor.from_local(
        shard, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def materialize(module: nn.Module, values: Mapping[str, Tensor], device: torch.device, skip: Iterable[str]) -> None:
    """Give values to a module of device "meta", a layer at a time: no rank ever holds the whole.

    Args:
        module: Its parameters are spread already.
        values: Values of some, by name, on rank zero; the others are made by their module's `reset_parameters`, from
            rank zero's random state, inner modules first.
        device: Where they are to be.
        skip: Names of those that need no value.

    Raises:
        MisconfigurationException: Where a module has no `reset_parameters`, or it leaves something out.
    """
    known: list[str] = distributed.broadcast_object(list(values))
    blank: set[str] = set()

    def make(name: str, tensor: Tensor) -> Tensor:
        if not local(tensor).is_meta:
            return tensor
        empty = hollow(tensor, device)
        if name in known:
            fill(empty, _from_zero(values.get(name), tensor))
        else:
            blank.add(name)
        return empty

    replace(module, make)
    _initialize(module, blank, set(skip))


def _from_zero(value: Tensor | None, like: Tensor) -> Tensor:
    whole = torch.empty(like.shape, dtype=like.dtype) if value is None else value.detach().cpu().contiguous()
    if whole.numel():
        distributed.broadcast(whole.view(-1).view(torch.uint8))  # bytes, as not every backend knows every dtype
    return whole


def _initialize(module: nn.Module, blank: set[str], skip: set[str]) -> None:
    """Make the values of tensors that have none, of whose names `blank` has one for each."""
    own_state = torch.get_rng_state()
    torch.set_rng_state(distributed.broadcast_object(own_state))
    everything = list(owners(module))
    empty = {id(tensor) for name, _, _, tensor, _ in everything if name in blank}
    by_part: dict[nn.Module, dict[str, tuple[str, Tensor, bool]]] = {}
    for name, part, own, tensor, is_parameter in everything:
        if id(tensor) in empty:
            by_part.setdefault(part, {})[own] = (name, tensor, is_parameter)
    done: set[int] = set()
    for part in _inner_first(module):
        if part in by_part:
            _reset(part, by_part[part], skip, done)
    if distributed.rank() > 0:
        torch.set_rng_state(own_state)


def _inner_first(module: nn.Module) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for child in module.children():
        found.update(dict.fromkeys(_inner_first(child)))
    return [*found, module]


def _reset(part: nn.Module, tensors: dict[str, tuple[str, Tensor, bool]], skip: set[str], done: set[int]) -> None:
    """Make the values of one module's own tensors, and keep this rank's part of them."""
    reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
    names = [name for name, *_ in tensors.values() if name not in skip]
    if reset is None:
        if names:
            raise MisconfigurationException(
                f"{', '.join(names)} is on device 'meta', but {type(part).__name__} does not say how its values are "
                f"made; define {type(part).__name__}.reset_parameters(), which sets all parameters and buffers that "
                "are the module's own, or go on from a checkpoint"
            )
        return
    for own, (_, tensor, is_parameter) in tensors.items():
        kind = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
        empty = torch.full(tensor.shape, torch.nan if tensor.is_floating_point() else 0, dtype=kind)
        put(part, own, nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty, is_parameter)
    reset()
    for own, (name, tensor, is_parameter) in tensors.items():
        kept = part._parameters if is_parameter else part._buffers
        made = kept[own]
        assert made is not None
        if id(tensor) not in done and name not in skip:
            if made.is_floating_point() and bool(made.detach().isnan().any()):
                raise MisconfigurationException(
                    f"{type(part).__name__}.reset_parameters() leaves {name} without a value, which is on device "
                    "'meta'; set it there, too"
                )
            fill(tensor, made.detach())
            done.add(id(tensor))
        put(part, own, tensor, is_parameter)


def gather(module: nn.Module, keep: bool) -> None:
    """Make the parameters whole again, in the host's memory, one after the other. A collective call.

    Args:
        module: The user's module.
        keep: Whether this rank keeps them; they are on device "meta" otherwise.
    """

    def make(name: str, tensor: Tensor) -> Tensor:
        detached = tensor.detach()
        whole = detached.full_tensor() if isinstance(detached, DTensor) else detached
        return whole.cpu() if keep or not isinstance(tensor, nn.Parameter) else whole.to("meta")

    replace(module, make)


def abandon(module: nn.Module) -> None:
    """Put a module on device "meta" whose other parts are lost."""
    replace(module, lambda name, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))


def undo(module: nn.Module) -> None:
    """Take away what `fully_shard` and FSDPStrategy have added to a module: the class, the hooks, the marks."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.__class__ = type(part).__mro__[2]
        _module_state_mapping.pop(part, None)
        for kind in _HOOKS:
            hooks = part.__dict__[kind]
            for key in [key for key, hook in hooks.items() if _is_fsdp(hook)]:
                del hooks[key]
                for options in ("_with_kwargs", "_always_called"):
                    part.__dict__.get(f"{kind}{options}", {}).pop(key, None)
        for mark in [name for name in part.__dict__ if name in _MARKS or name.startswith("__composable_api")]:
            del part.__dict__[mark]


def _is_fsdp(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # what torch wraps some hooks in
    hook = getattr(hook, "func", hook)
    hook = getattr(hook, "__wrapped__", hook)
    return str(getattr(hook, "__module__", "")).startswith(_MAKERS)
