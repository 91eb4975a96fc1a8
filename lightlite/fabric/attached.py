"""What a LightningModule finds where it looks for its Trainer, in a user's own loop."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightlite.fabric.fabric import Fabric


class AsTrainer:
    """The part of a Trainer that a loop of one's own has: device, ranks, loggers, optimizers, backward.

    Args:
        fabric: Does it.
        optimizers: What `self.optimizers()` returns.
    """

    current_epoch = global_step = 0
    progress_bar_callback = None

    def __init__(self, fabric: Fabric, optimizers: list[Any]) -> None:
        self._fabric = self.fabric = fabric
        self.wrapped_optimizers = optimizers
        self.lr_scheduler_configs: list[Any] = []
        self.running_device = fabric.device

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers themselves."""
        return [wrapped.optimizer for wrapped in self.wrapped_optimizers]

    def __getattr__(self, name: str) -> Any:
        if name in _FROM_FABRIC:
            return getattr(self._fabric, name)
        raise AttributeError(
            f"trainer.{name}: the module was set up by a Fabric and has no Trainer; what there is of one is "
            f"{', '.join(_FROM_FABRIC)}, optimizers"
        )

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """See `LightningModule.manual_backward`."""
        self._fabric.backward(loss, *args, **kwargs)

    def clip_gradients(self, optimizer: Any, value: float | None, algorithm: str | None) -> None:
        """See `LightningModule.clip_gradients`."""
        if value and algorithm == "value":
            self._fabric.clip_gradients(None, optimizer, clip_val=value)
        elif value:
            self._fabric.clip_gradients(None, optimizer, max_norm=value, error_if_nonfinite=False)


_FROM_FABRIC = (
    "accelerator", "strategy", "global_rank", "local_rank", "node_rank", "world_size", "is_global_zero", "loggers",
    "logger",
)  # fmt: skip


class AsRecorder:
    """Where `self.log` goes: to Fabric's loggers, at once and as it is, unless `logger=False`.

    Args:
        fabric: Has the loggers.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def log(self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, *options: Any) -> None:
        """See `LightningModule.log`."""
        self.log_dict({name: value}, logger)

    def log_dict(self, values: Mapping[str, Any], logger: bool | None = None) -> None:
        """See `LightningModule.log_dict`; the values are one row.

        Raises:
            ValueError: For what is no number, such as a Metric: there is no epoch at whose end it would be computed.
        """
        for name, value in values.items():
            if isinstance(value, (Number, Tensor)):
                continue
            raise ValueError(
                f"self.log({name!r}, {value!r}): a module that a Fabric has set up logs numbers and tensors of one "
                "element; of a Metric, log metric.compute()"
            )
        if logger is not False:
            self._fabric.log_dict(dict(values.items()))
