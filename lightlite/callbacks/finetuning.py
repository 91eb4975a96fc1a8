"""Train a part of a model first, and thaw the rest as training goes on."""

from __future__ import annotations

from collections.abc import Callable as Function
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightlite.callbacks.callback import Callback
from lightlite.errors import CheckpointError, MisconfigurationException
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightlite.module import LightningModule
    from lightlite.trainer import Trainer

Modules: TypeAlias = "nn.Module | Iterable[nn.Module | Iterable[Any]]"


def multiplicative(epoch: int) -> float:
    """By what BackboneFinetuning multiplies its learning rate after each epoch, by default."""
    return 2.0


class BaseFinetuning(Callback):
    """What a callback that freezes and thaws is made of: override `freeze_before_training` and `finetune_function`.

    The first is called before `configure_optimizers`, which is to give the optimizer only what is trained then:
    `filter(lambda parameter: parameter.requires_grad, self.parameters())`. The second is called when an epoch starts,
    for each optimizer, and adds what is to be trained from then on as a new parameter group. A resumed fit has the
    groups, and trains and freezes the parameters, that the checkpoint was written with.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}
        self._trained: dict[str, list[str]] = {}
        self._restoring = False

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' parameter groups, by the names of the parameters, and what is trained."""
        return {"internal_optimizer_metadata": self._internal_optimizer_metadata, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, in `on_fit_start`, where there are optimizers."""
        self._internal_optimizer_metadata = state_dict["internal_optimizer_metadata"]
        self._trained = state_dict.get("trained", {})  # Lightning's have none
        self._restoring = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze before training."""
        if stage != "fit":
            return
        # A further fit of the same trainer goes on as a resumed one does.
        self._restoring = trainer.current_epoch > 0 and bool(self._internal_optimizer_metadata)
        if not self._restoring:
            self._forget()
        self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what had been added to the optimizers, and what was trained."""
        if not self._restoring:
            return
        self._restoring = False
        parameters = dict(pl_module.named_parameters())
        thawed: list[str] = []
        for index, optimizer in enumerate(trainer.optimizers):
            groups = self._internal_optimizer_metadata.get(index)
            if groups is not None:
                _check_names(groups, parameters, pl_module)
                thawed += [name for group in groups[len(optimizer.param_groups) :] for name in group["params"]]
                optimizer.param_groups = [
                    {**group, "params": [parameters[name] for name in group["params"]]} for group in groups
                ]
        if self._trained:
            _put_back(pl_module, self._trained)
        else:
            for name in thawed:
                _set_trained(pl_module.get_submodule(name.rpartition(".")[0]), True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Thaw what is due, and note it for checkpoints."""
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for index, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            known = self._internal_optimizer_metadata.setdefault(index, [])
            for group in optimizer.param_groups[len(known) :]:
                known.append({**group, "params": [names[parameter] for parameter in group["params"]]})
        self._trained = _what_is_trained(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what is not to be trained at first: `self.freeze(pl_module.backbone)`."""
        raise NotImplementedError(f"{type(self).__name__} has to define freeze_before_training(self, pl_module)")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Thaw what is due at the start of an epoch: `self.unfreeze_and_add_param_group(pl_module.net, optimizer)`."""
        raise NotImplementedError(f"{type(self).__name__} has to define finetune_function(self, pl_module, epoch, ...)")

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """The modules that have parameters of their own, and those that have no children.

        Args:
            modules: A module, or modules, in any nest.

        Raises:
            MisconfigurationException: For anything else.
        """
        if isinstance(modules, nn.Module):
            return [part for part in modules.modules() if part._parameters or not any(True for _ in part.children())]
        if not isinstance(modules, Iterable) or isinstance(modules, (str, nn.Parameter)):
            raise MisconfigurationException(
                f"{type(modules).__name__} is no module; freeze and thaw modules, or lists of them, and single "
                "parameters by parameter.requires_grad"
            )
        parts = [part for inner in modules for part in BaseFinetuning.flatten_modules(inner)]
        return list(dict.fromkeys(parts))

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that are trained, or are not.

        Args:
            modules: A module, or modules, in any nest.
            train_bn: Whether to count batch normalization's.
            requires_grad: Which of the two.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad == requires_grad:
                        yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Thaw modules: their parameters have gradients, and batch normalization gathers statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the parameters that are one module's own, and its statistics where it is batch normalization."""
        _set_trained(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze modules.

        Args:
            modules: A module, or modules, in any nest.
            train_bn: Whether batch normalization is trained nevertheless.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trained(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `params` that the optimizer does not have yet; a warning tells of the others."""
        had = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        params = list(params)
        new = [parameter for parameter in params if id(parameter) not in had]
        if len(new) < len(params):
            rank_zero_warn(
                f"{len(params) - len(new)} of the {len(params)} parameters that are to be thawed are in "
                f"{type(optimizer).__name__} already, with the learning rate that they have there; give it those with "
                "requires_grad only, in configure_optimizers"
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Thaw modules, and have the optimizer train them, as a new parameter group.

        Args:
            modules: A module, or modules, in any nest.
            optimizer: The optimizer.
            lr: The group's learning rate; by default that of the first group, divided by `initial_denom_lr`.
            initial_denom_lr: See `lr`.
            train_bn: Whether to train batch normalization too.
        """
        parts = BaseFinetuning.flatten_modules(modules)
        in_training = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        BaseFinetuning.make_trainable(parts)
        rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else float(lr)
        thawed = [p for p in BaseFinetuning.filter_params(parts, train_bn) if id(p) not in in_training]
        new = BaseFinetuning.filter_on_optimizer(optimizer, thawed)
        if new:
            optimizer.add_param_group({"params": new, "lr": rate})


class BackboneFinetuning(BaseFinetuning):
    """Trains what is around `pl_module.backbone` first, and from some epoch on the backbone too, at a rate that grows.

    Args:
        unfreeze_backbone_at_epoch: From which epoch on the backbone is trained, counted from 0; default 10.
        lambda_func: By what its learning rate is multiplied when a later epoch starts, from the epoch's number plus 1.
        backbone_initial_ratio_lr: Its first learning rate, as a share of the first group's; default 0.1.
        backbone_initial_lr: Its first learning rate itself; None for the share.
        should_align: Whether its learning rate stays at the first group's once it has come up with it.
        initial_denom_lr: Accepted for compatibility: the two before decide.
        train_bn: Whether to train batch normalization too.
        verbose: Whether to tell both learning rates as they change.
        rounding: To how many digits they are told.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Function[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding

    def _forget(self) -> None:
        super()._forget()
        self.previous_backbone_lr: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The backbone's learning rate, and what BaseFinetuning keeps."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone.

        Raises:
            MisconfigurationException: Where there is none.
        """
        backbone = getattr(pl_module, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise MisconfigurationException(
                f"BackboneFinetuning freezes and thaws the module `backbone`, but {type(pl_module).__name__}.backbone "
                f"is {'not there' if backbone is None else type(backbone).__name__}; set self.backbone in __init__, or "
                "write a callback on BaseFinetuning"
            )
        self.freeze(backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Thaw the backbone when it is due, and let its learning rate grow in later epochs."""
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        rate = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch or self.previous_backbone_lr is None:
            own = (
                rate * self.backbone_initial_ratio_lr if self.backbone_initial_lr is None else self.backbone_initial_lr
            )
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, own, train_bn=self.train_bn)
        else:
            own = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            own = rate if self.should_align and own > rate else own
            optimizer.param_groups[-1]["lr"] = own
        self.previous_backbone_lr = own
        if self.verbose:
            rank_zero_info(f"learning rate: {round(rate, self.rounding)}, the backbone's: {round(own, self.rounding)}")


def _set_trained(module: nn.Module, trained: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trained
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trained


def _what_is_trained(module: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters that have gradients, and of the batch normalizations that gather statistics."""
    norms = {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}
    return {
        "parameters": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
        "statistics": [name for name, norm in norms.items() if norm.track_running_stats],
    }


def _put_back(module: nn.Module, trained: dict[str, list[str]]) -> None:
    """Make trained what `_what_is_trained` found."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = name in trained["parameters"]
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = name in trained["statistics"]


def _check_names(groups: list[dict[str, Any]], parameters: Mapping[str, Any], pl_module: LightningModule) -> None:
    unknown = [name for group in groups for name in group["params"] if name not in parameters]
    if unknown:
        raise CheckpointError(
            f"the checkpoint's optimizer trains {', '.join(unknown)}, which {type(pl_module).__name__} does not have; "
            "go on with the module that it was written with"
        )
