"""Parameters, gradients and optimizer states spread over the ranks, by PyTorch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import CheckpointError, MisconfigurationException, MismatchedCheckpointError
from lightlite.interfaces import Accelerator, Strategy
from lightlite.nest import apply_to_tensors
from lightlite.plugins import batchnorm, sharding
from lightlite.plugins.replicas import broadcast, check_same_modules
from lightlite.plugins.turns import Root, Turns

SHARDING = {"FULL_SHARD": True, "SHARD_GRAD_OP": False, "HYBRID_SHARD": True, "_HYBRID_SHARD_ZERO2": False}
"""Names of FSDP1's sharding strategies, and whether parameters are gathered anew for the backward pass."""

_LOST, _GIVEN = "_lightlite_weights_lost", "_lightlite_units"
"""What is noted in a module: that its weights are lost, and the names of the units that `configure_model` chose."""


class FSDPStrategy(Strategy):
    """Each rank holds a part of every parameter, gradient and optimizer state; they are put together layer by layer.

    The loss curve is that of ddp. A module may be larger than what one rank could hold: see `configure_model` in the
    README. The semantics of the options are those of `torch.distributed.fsdp.fully_shard`, the names Lightning's.

    Args:
        auto_wrap_policy: Which submodules are gathered and released as one: a set of classes; a number of parameters
            from which on a module is; a function of a module that returns whether it is; a policy of FSDP1. None
            (default): the elements of lists of modules, such as a transformer's blocks. What is left belongs to the
            whole. A submodule that is one has to be run by calling it. Where `configure_model` has called `fully_shard`
            on any, that holds instead.
        mixed_precision: A `MixedPrecisionPolicy`; None for what the Trainer's precision says: with "16-mixed" and
            "bf16-mixed", parameters travel in half precision and gradients in float32.
        cpu_offload: Whether what each rank holds stays in the host's memory: True, or a `CPUOffloadPolicy`.
        sharding_strategy: "FULL_SHARD"; "SHARD_GRAD_OP" to keep parameters whole from the forward to the backward pass;
            "HYBRID_SHARD" to spread over the ranks of one machine, and replicate over machines.
        reshard_after_forward: As for `fully_shard`; None for what `sharding_strategy` says.
        device_mesh: A `DeviceMesh`, or its sizes; of two dimensions, to replicate over the first and to spread over the
            second. None for one that suits `sharding_strategy`.
        activation_checkpointing_policy: Modules whose activations are computed anew in the backward pass, as in
            `auto_wrap_policy`; None for none.
        state_dict_type: "full": a checkpoint is the file that ddp would write, put together on rank zero. "sharded": a
            folder that every rank writes its part of, by `torch.distributed.checkpoint`. Either is read by any strategy
            on any number of ranks.
        sync_each_batch: Whether gradients are averaged after every batch of an accumulation. False takes less
            communication, and memory for whole gradients on every rank; a checkpoint cannot be taken in between then.
        process_group_backend: None for the backend that suits the accelerator.
        timeout: How long a collective waits for a missing rank; None for the default, 30 minutes.

    Raises:
        MisconfigurationException: For values that are not allowed.
    """

    name = "fsdp"
    launcher = "helpers"
    spreads = True

    def __init__(
        self,
        auto_wrap_policy: sharding.Policy = None,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool | CPUOffloadPolicy | None = False,
        sharding_strategy: str = "FULL_SHARD",
        reshard_after_forward: bool | int | None = None,
        device_mesh: DeviceMesh | tuple[int, ...] | None = None,
        activation_checkpointing_policy: sharding.Policy = None,
        state_dict_type: Literal["full", "sharded"] = "full",
        sync_each_batch: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.sharding_strategy = str(getattr(sharding_strategy, "name", sharding_strategy))
        if self.sharding_strategy not in SHARDING:
            raise MisconfigurationException(
                f"{type(self).__name__}(sharding_strategy={sharding_strategy!r}): give "
                f"{', '.join(map(repr, SHARDING))}; where every rank is to hold the whole, use strategy='ddp'"
            )
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"{type(self).__name__}(state_dict_type={state_dict_type!r}): give 'full' for a file, or "
                "'sharded' for a folder"
            )
        self.auto_wrap_policy, self.mixed_precision = auto_wrap_policy, mixed_precision
        self.activation_checkpointing_policy = activation_checkpointing_policy
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.state_dict_type, self.sync_each_batch = state_dict_type, sync_each_batch
        self.process_group_backend = process_group_backend
        self.timeout = timeout or distributed.DEFAULT_TIMEOUT
        self._given_mesh = device_mesh
        self.device_mesh: DeviceMesh | None = None
        self._formed_group = False
        self._batchnorm: batchnorm.Former = []
        self._forget()

    def _forget(self) -> None:
        self._root: Root | None = None
        self._turns = Turns()
        self._waiting: tuple[Mapping[str, Any], bool] | None = None
        self._trained: list[bool] = []

    def __getstate__(self) -> dict[str, Any]:
        own = {"_root": None, "_waiting": None, "device_mesh": None, "_turns": Turns()}
        return {**super().__getstate__(), **own}

    # Ranks.

    def connect(self, accelerator: Accelerator, device: torch.device, ranks: Ranks) -> None:
        """Take the place of one rank: choose the device, form the process group unless it stands, and the mesh."""
        super().connect(accelerator, device, ranks)
        backend = self.process_group_backend or accelerator.process_group_backend
        self._formed_group = distributed.join(ranks, backend, self.timeout)
        given = self._given_mesh
        self.device_mesh = given if isinstance(given, DeviceMesh) else self._make_mesh(given)

    def _make_mesh(self, sizes: tuple[int, ...] | None) -> DeviceMesh:
        if sizes is None:
            hybrid = "HYBRID" in self.sharding_strategy
            sizes = (self.ranks.num_nodes, self.ranks.local_world_size) if hybrid else (self.world_size,)
        if len(sizes) > 2 or math.prod(sizes) != self.world_size:
            raise MisconfigurationException(
                f"{type(self).__name__}(device_mesh={sizes}): give one or two sizes whose product is the number of "
                f"ranks, {self.world_size}"
            )
        return init_device_mesh(self.root_device.type, tuple(sizes), mesh_dim_names=self._mesh_names(len(sizes)))

    def _mesh_names(self, dimensions: int) -> tuple[str, ...]:
        return ("replicate", "shard")[-dimensions:]

    def disconnect(self) -> None:
        """Leave the process group, if it was formed for this run, unless a launcher started the ranks."""
        self.device_mesh = None
        if self._formed_group and (self.ranks.store is not None or self.world_size == 1):
            distributed.leave()
            self._formed_group = False

    # The module.

    @contextmanager
    def configuring(self, module: nn.Module) -> Iterator[None]:
        """Let every rank configure the module as rank zero does: with its weights so far, and its random state."""
        if not any(distributed.gather_objects(_is_blank(module))):
            check_same_modules(module)
            broadcast(tensor for _, _, _, tensor, _ in sharding.owners(module))
        own = torch.get_rng_state()
        torch.set_rng_state(distributed.broadcast_object(own))
        try:
            yield
        finally:
            if self.global_rank > 0:
                torch.set_rng_state(own)

    def synchronize_batchnorm(self, module: nn.Module) -> None:
        """Have batch normalization compute its statistics over all ranks, until `teardown`."""
        self._batchnorm += batchnorm.synchronize(module)

    def setup(self, module: nn.Module, training: bool) -> Callable[..., Any] | None:
        """Spread the module over the ranks, with rank zero's weights, or those of a checkpoint.

        Raises:
            MisconfigurationException: On every rank, where the ranks' modules differ in a name, shape or dtype; where
                a module of device "meta" does not say how its values are made; where the weights are lost.
        """
        self.module = module
        by_hand = not getattr(module, "automatic_optimization", True)
        waiting, self._waiting = self._waiting, None
        if module.__dict__.pop(_LOST, False) and waiting is None:
            module.__dict__[_LOST] = True
            raise MisconfigurationException(
                f"the weights of this {type(module).__name__} were spread over the ranks of an earlier call, and are "
                "lost: it ended by an error, or they were saved in shards only; give ckpt_path, or a new module"
            )
        try:
            self._root = self._spread(module, by_hand, waiting[0] if waiting else {})
        except BaseException:
            if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
                self._lose(module)
            else:
                sharding.undo(module)
            raise
        if waiting is not None:
            try:
                self.load_module_state(*waiting)
            except (KeyError, RuntimeError, ValueError) as error:
                name = type(module).__name__
                raise MismatchedCheckpointError(f"the checkpoint does not hold {name}'s weights: {error}") from error
        self._trained = [parameter.requires_grad for parameter in module.parameters()]
        return self._training_step if training else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """Spread a module over the ranks; see `setup`. It has to be run by what is returned."""
        return self._spread(module, False, {})

    def unwrap(self, wrapper: nn.Module) -> None:
        """Make the module whole again; see `teardown`."""
        self._make_bare(cast(Root, wrapper))

    def _spread(self, module: nn.Module, by_hand: bool, waiting: Mapping[str, Any]) -> Root:
        values, came_whole = self._agree_on_values(module)
        policy = self.auto_wrap_policy
        recompute = self.activation_checkpointing_policy
        again = [] if recompute is None else sharding.choose_units(module, recompute, False)
        units: list[nn.Module] = []
        if sharding.units_of(module):
            module.__dict__[_GIVEN] = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
        else:  # first of all what configure_model had chosen, in an earlier call
            given = module.__dict__.get(_GIVEN, ())
            units = [part for name, part in module.named_modules() if name in given][::-1]
            units = units or sharding.choose_units(module, policy, by_hand)
            sharding.check_shared(module, units)
        for part in again:
            _recompute(part)
        options = self._shard_options(module)
        for unit in units:
            fully_shard(unit, **options)
        root = Root(module)
        root.came_whole = came_whole
        inner = options["mp_policy"]
        fully_shard(root, **{**options, "mp_policy": replace(inner, cast_forward_inputs=False)})
        if values is not None:
            device = torch.device("cpu") if "offload_policy" in options else self.root_device
            sharding.materialize(module, values, device, waiting)
        self._move_rest(module, self.root_device)
        root.prepare(self._turns)
        return root

    def _move_rest(self, module: nn.Module, device: torch.device) -> None:
        """Move what is no parameter."""
        for _, part, own, tensor, is_parameter in sharding.owners(module):
            if not is_parameter:
                part._buffers[own] = tensor.to(device)
        for part in module.modules():
            if not any(True for _ in part.parameters()):  # such as a metric, which knows what else there is to move
                self.accelerator.move_module(part, device)

    def _agree_on_values(self, module: nn.Module) -> tuple[dict[str, Tensor] | None, tuple[bool, bool]]:
        """Make the ranks' values equal to rank zero's.

        Returns:
            None where that is done. Where a rank's module is on device "meta": all ranks' are now, and these are the
            values that rank zero has of it. And `Root.came_whole`.
        """
        check_same_modules(module)
        own = {name: tensor for name, _, _, tensor, _ in sharding.owners(module)}
        is_blank = _is_blank(module)
        blank = distributed.gather_objects(is_blank)
        came_whole = (not is_blank, not blank[0])
        if not any(blank):
            if not sharding.units_of(module):
                broadcast(own.values())
            return None, came_whole
        if not sharding.units_of(module):
            sharding.abandon(module)
        whole = {name: tensor for name, tensor in own.items() if not sharding.local(tensor).is_meta}
        return whole if self.global_rank == 0 else {}, came_whole

    def _shard_options(self, module: nn.Module) -> dict[str, Any]:
        scalars = [name for name, parameter in module.named_parameters() if not parameter.dim()]
        if scalars:
            raise MisconfigurationException(
                f"{', '.join(scalars)}: a parameter without dimensions cannot be spread over ranks; give it the shape "
                "(1,)"
            )
        again = SHARDING[self.sharding_strategy] if self.reshard_after_forward is None else self.reshard_after_forward
        return {
            "mesh": self.device_mesh,
            "reshard_after_forward": None if again is True else again,
            "mp_policy": self.mixed_precision or _policy_of(self.precision.precision),
            **self._offload(),
        }

    def _offload(self) -> dict[str, OffloadPolicy]:
        given = self.cpu_offload
        if isinstance(given, OffloadPolicy):
            return {"offload_policy": given}
        offloads = getattr(given, "offload_params", given)  # FSDP1's CPUOffload has it
        return {"offload_policy": CPUOffloadPolicy(pin_memory=self.accelerator.pin_memory)} if offloads else {}

    def _training_step(self, *args: Any) -> Any:
        root = self._root
        assert root is not None
        if root.has_buffers:
            self.before_evaluation()
        return root("training_step", *args)

    def evaluation_step(self, name: str) -> Callable[..., Any]:
        """The function that runs the module's method with the parameters gathered."""
        assert self._root is not None
        return functools.partial(self._root, name)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Gather whatever any rank needs, on all of them, until none needs more; see `Turns`."""
        with self._turns.taken():
            yield

    def before_evaluation(self, module: nn.Module | None = None) -> None:
        """Give every rank rank zero's buffers, such as running means."""
        broadcast((self.module if module is None else module).buffers())

    def before_training_epoch(self) -> None:
        """Forget a window that was left open, and tell the whole parameters, too, which are trained now."""
        if self._root is None:
            return
        if not self.sync_each_batch:
            sharding.forget_whole_gradients(self._root)
        trained = [parameter.requires_grad for parameter in self.module.parameters()]
        if trained == self._trained:
            return
        self._trained = trained
        for unit in sharding.units_of(self._root):  # one after the other: together they may be too large
            unit.unshard()
            for parameter, is_trained in zip(self.module.parameters(), trained, strict=True):
                parameter.requires_grad_(is_trained)
            unit.reshard()

    def no_sync(self) -> AbstractContextManager[Any]:
        """Context in which backward passes leave gradients local; with `sync_each_batch`, they do not."""
        return nullcontext() if self._root is None or self.sync_each_batch else self._root.no_sync()

    def teardown(self) -> None:
        """Make the module the user's bare one again: whole, in the host's memory.

        A module that was whole is whole on every rank; of one that came on device "meta", rank zero has the whole,
        unless checkpoints are sharded. Where other ranks may be gone, the weights are lost.
        """
        if self._root is not None:
            self._make_bare(self._root)
        self._forget()
        batchnorm.restore(self._batchnorm)
        self._batchnorm = []
        self.accelerator.teardown()

    def _make_bare(self, root: Root) -> None:
        module, others_are_gone = root.module, distributed.world_size() < self.world_size
        root.turns.remove(root)
        had_values, zero_had_values = root.came_whole
        lost = others_are_gone or (self.state_dict_type == "sharded" and not zero_had_values)
        if lost:
            self._lose(module)
            return
        sharding.gather(module, had_values or self.global_rank == 0)
        sharding.undo(module)
        self._move_rest(module, torch.device("cpu"))

    @staticmethod
    def _lose(module: nn.Module) -> None:
        sharding.abandon(module)
        sharding.undo(module)
        module.__dict__[_LOST] = True

    # Gradients and states.

    def clip_gradients(
        self,
        parameters: list[Tensor],
        value: float,
        algorithm: str,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clip gradients in place, by the total "norm" of all ranks' parts or each "value".

        Returns:
            The total norm before, a scalar; None for "value".
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if algorithm == "value":
            for gradient in gradients:
                sharding.local(gradient).clamp_(-value, value)
            return None
        total = sharding.total_norm(gradients, norm_type, self.root_device)
        if error_if_nonfinite and not bool(total.isfinite()):
            raise RuntimeError(
                f"the gradients' total norm, of order {norm_type}, is not finite: they cannot be clipped"
            )
        factor = torch.clamp(value / (total + 1e-6), max=1.0)
        for gradient in gradients:
            sharding.local(gradient).mul_(factor.to(gradient.device))
        return total

    def part(self, tensor: Any, parameter: Tensor) -> Tensor:
        """What this rank holds of a tensor, which may lie in a checkpoint's folder."""
        return sharding.fill(torch.empty_like(parameter.detach()), tensor)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Put back `optimizer_state_dict`; what has a parameter's shape is spread as that is."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        spread = {}
        for index, entries in state["state"].items():
            like = parameters[index] if isinstance(index, int) and index < len(parameters) else None
            spread[index] = {key: self._own(value, like) for key, value in entries.items()}
        optimizer.load_state_dict({**state, "state": spread})

    @staticmethod
    def _own(value: Any, parameter: Tensor | None) -> Any:
        shape = getattr(value, "shape", None)
        if shape is None or isinstance(value, DTensor):
            return value
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            return sharding.fill(torch.empty_like(parameter.detach(), dtype=value.dtype), value)
        return value if isinstance(value, Tensor) else value.full_tensor()

    def module_state_dict(self) -> dict[str, Any]:
        """The module's state, with the names the user gave; of each parameter, this rank's part."""
        if self._root is not None:
            self.before_evaluation()
        return self.module.state_dict()

    def load_module_state(self, state: Mapping[str, Any], strict: bool = True, module: nn.Module | None = None) -> None:
        """Put back `module_state_dict`; before `setup`, keep it until then."""
        if module is None and self._root is None:
            self._waiting = (state, strict)
            return
        module = self.module if module is None else module
        own = module.state_dict()
        parts = {name: _part_of_state(value, own.get(name)) for name, value in state.items()}
        module.load_state_dict(parts, strict=strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Put what is spread together on rank zero, and write it; or write a folder, each rank its part.

        Raises:
            CheckpointError: Where what is spread cannot be put together any more, or not yet.
        """
        if self.device_mesh is not None and distributed.world_size() < self.world_size:
            raise CheckpointError(
                f"{path} cannot be written: the module is spread over {self.world_size} ranks, and the others may be "
                "gone; with this strategy nothing can be saved when a fit has failed"
            )
        if self.device_mesh is not None and self.state_dict_type == "sharded":
            self.checkpoint_io.save_shards(checkpoint, path, _write_shards)
        else:
            super().save_checkpoint(self.whole(checkpoint), path, storage_options)

    def whole(self, state: Any) -> Any:
        """A nest, put together on rank zero, in the host's memory, a tensor after the other; no other rank keeps any.

        Raises:
            CheckpointError: Where the ranks have parted, or the weights are lost.
        """
        return apply_to_tensors(state, self._whole)

    def _whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            if tensor.is_meta and self.is_global_zero:
                raise CheckpointError(
                    "the weights are lost, and cannot be saved any more: they were spread over ranks that have parted; "
                    "go on from a checkpoint that was saved within the fit"
                )
            return tensor
        if self.device_mesh is None:
            raise CheckpointError(
                "the optimizer's state was spread over ranks that have parted; save within the fit, by a "
                "ModelCheckpoint or a hook, or give save_checkpoint weights_only=True"
            )
        whole = tensor.full_tensor()
        return whole.cpu() if self.is_global_zero else whole.new_empty(0)

    def load_checkpoint(self, path: Any) -> dict[str, Any]:
        """Read a checkpoint; of a folder, each rank will read its part."""
        return self.checkpoint_io.open_checkpoint(path)


def _is_blank(module: nn.Module) -> bool:
    """Whether any of its tensors has no value here."""
    return any(sharding.local(tensor).is_meta for _, _, _, tensor, _ in sharding.owners(module))


def _policy_of(precision: str) -> MixedPrecisionPolicy:
    dtypes = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    if precision not in dtypes:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtypes[precision], reduce_dtype=torch.float32)


def _recompute(part: nn.Module) -> None:
    from torch.distributed._composable import checkpoint

    checkpoint(part)


def _part_of_state(value: Any, own: Any) -> Any:
    """What this rank loads for one name: its part, where the shapes agree; what torch complains of, where not."""
    shape = getattr(value, "shape", None)
    if shape is None or isinstance(value, DTensor):
        return value
    if isinstance(own, Tensor) and own.shape == shape:
        return sharding.fill(torch.empty_like(own), value)
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _write_shards(tensors: dict[str, Any], folder: str) -> None:
    # Without copying ahead on a stream, which a third party's device need not have, in use here or not.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, per_thread_copy_ahead=0)
    dcp.save(tensors, storage_writer=writer)
