"""How fast a loop is, and how fast its device could be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lightlite.errors import MisconfigurationException
from lightlite.registry import AcceleratorRegistry

if TYPE_CHECKING:
    from lightlite.fabric import Fabric

Number = TypeVar("Number", int, float)


class Throughput:
    """Computes rates over the last batches from running totals. It uses no device, and no other rank.

    `compute()` returns the totals under "time", "batches", "samples" and "lengths", and once the window is full
    "device/batches_per_sec", "device/samples_per_sec", "device/items_per_sec" (with lengths), "device/flops_per_sec"
    (with flops) and "device/mfu" (the share of `available_flops`); with several ranks also the same without "device/",
    for all together, as if every rank was as fast as this one. The names are Lightning's.

    Args:
        available_flops: Operations a second that one device could do; see `get_available_flops`.
        world_size: Number of devices.
        window_size: Over how many updates to average, at least 2.
        separator: What stands behind "device".

    Raises:
        MisconfigurationException: For a world size below 1 or a window below 2.
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        if world_size < 1 or window_size < 2:
            raise MisconfigurationException(
                f"Throughput(world_size={world_size}, window_size={window_size}): give a world_size of 1 or more, and "
                "a window_size of 2 or more, as rates are counted from the first update in it to the last"
            )
        self.available_flops = available_flops
        self.world_size = world_size
        self.window_size = window_size
        self.separator = separator
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._time: _Increasing[float] = _Increasing("time", self.window_size)
        self._batches: _Increasing[int] = _Increasing("batches", self.window_size)
        self._samples: _Increasing[int] = _Increasing("samples", self.window_size)
        self._lengths: _Increasing[int] = _Increasing("lengths", self.window_size)
        self._flops: deque[int] = deque(maxlen=self.window_size)

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Take note of where the loop is. All but `flops` are totals, and have to rise from call to call.

        Args:
            time: Seconds since the start; wait for the device first, where it works on its own.
            batches: Batches that this device has seen.
            samples: Samples in them.
            lengths: Items in those, such as tokens.
            flops: Operations since the last update on this device; see `measure_flops`.

        Raises:
            ValueError: For a total that does not rise, or fewer samples than batches, or items than samples.
        """
        if samples < batches:
            raise ValueError(f"samples={samples} is less than batches={batches}; give totals since the start")
        if lengths is not None and lengths < samples:
            raise ValueError(f"lengths={lengths} is less than samples={samples}; give totals since the start")
        self._time.add(time)
        self._batches.add(batches)
        self._samples.add(samples)
        if lengths is not None:
            self._lengths.add(lengths)
        if flops is not None:
            self._flops.append(flops)

    def compute(self) -> dict[str, int | float]:
        """The totals, and once the window is full the rates."""
        totals: dict[str, _Increasing[Any]] = {
            "time": self._time,
            "batches": self._batches,
            "samples": self._samples,
            "lengths": self._lengths,
        }
        metrics: dict[str, int | float] = {name: total.last for name, total in totals.items() if total.values}
        if not self._time.full:
            return metrics
        elapsed = self._time.rise
        rates = {"batches_per_sec": self._batches.rise / elapsed, "samples_per_sec": self._samples.rise / elapsed}
        if self._lengths.full:
            rates["items_per_sec"] = self._lengths.rise / elapsed
        if len(self._flops) == self.window_size:
            rates["flops_per_sec"] = (sum(self._flops) - self._flops[0]) / elapsed
        metrics |= {f"device{self.separator}{name}": rate for name, rate in rates.items()}
        if self.world_size > 1:
            metrics |= {name: rate * self.world_size for name, rate in rates.items()}
        if self.available_flops and "flops_per_sec" in rates:
            metrics[f"device{self.separator}mfu"] = rates["flops_per_sec"] / self.available_flops
        return metrics


class ThroughputMonitor(Throughput):
    """A `Throughput` that counts and logs for a Fabric, on rank zero; on the other ranks it does nothing.

    Args:
        fabric: Says what device there is, and how many ranks; logs. Its ranks have to be there, from `launch` on.
        kwargs: `window_size` and `separator` of `Throughput`.

    Attributes:
        step: Under what step it logged last; -1 before.
    """

    def __init__(self, fabric: Fabric, **kwargs: Any) -> None:
        dtype = getattr(fabric._precision, "dtype", torch.float32)
        peak = fabric.accelerator.peak_flops(fabric.device, dtype) if fabric.is_global_zero else None
        super().__init__(available_flops=peak, world_size=fabric.world_size, **kwargs)
        self._fabric = fabric
        self.step = -1

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """See `Throughput.update`."""
        if self._fabric.is_global_zero:
            super().update(time=time, batches=batches, samples=samples, lengths=lengths, flops=flops)

    def compute_and_log(self, step: int | None = None) -> dict[str, int | float]:
        """Compute and log; on other ranks than zero the result is empty.

        Args:
            step: Where to log; by default one further than the last time.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute()
        if metrics:
            self._fabric.log_dict(metrics, step=self.step)
        return metrics


class _Increasing(Generic[Number]):
    """The last values of a total that rises."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self.values: deque[Number] = deque(maxlen=size)

    def add(self, value: Number) -> None:
        if self.values and value <= self.values[-1]:
            raise ValueError(f"{self._name}={value} after {self.values[-1]}: give totals, which rise with every update")
        self.values.append(value)

    @property
    def full(self) -> bool:
        return len(self.values) == self.values.maxlen

    @property
    def last(self) -> Number:
        return self.values[-1]

    @property
    def rise(self) -> Number:
        return self.values[-1] - self.values[0]


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor] | None = None
) -> int:
    """Count the floating-point operations of a forward, and of a backward where there is a loss.

    On the meta device, as in `with torch.device("meta"): model = Net(); x = torch.randn(2, 32)`, nothing is computed.

    Args:
        model: The module that `forward_fn` runs.
        forward_fn: Runs it, and returns its output.
        loss_fn: Makes a loss of the output; its operations and those of `loss.backward()` count too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        output = forward_fn()
        if loss_fn is not None:
            loss_fn(output).backward()
    return int(counter.get_total_flops())


def get_available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second that a device could do; see `Accelerator.peak_flops`.

    Args:
        device: The device.
        dtype: What it computes in.
    """
    known = device.type in AcceleratorRegistry
    return AcceleratorRegistry.create(device.type).peak_flops(device, dtype) if known else None
