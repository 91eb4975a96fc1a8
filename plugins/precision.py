"""Formats of numbers: one throughout ("true"), or float32 kept and half precision partly computed with ("mixed").

Each class takes the type of device it is for, as `torch.device.type` has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Precision
from lightlite.nest import apply_to_tensors
from lightlite.plugins.devices import computes_bfloat16

_log = logging.getLogger(__name__)
_TRUE = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
_WITHOUT_FLOAT64 = ("mps",)
_SCALER_SINCE = {"mps": "2.8"}
"""The version of PyTorch whose `torch.amp.GradScaler` works on a type of device, where not all supported ones do."""


class FullPrecision(Precision):
    """float32, or whatever the module has: nothing is converted.

    Args:
        device: Type of device; of no consequence here.
    """

    precision = "32-true"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device


class TruePrecision(Precision):
    """Parameters, buffers, inputs and newly made tensors in one format other than float32.

    Args:
        precision: "64-true", "16-true" or "bf16-true".
        device: Type of device.

    Raises:
        MisconfigurationException: For another `precision`, or one that the device does not have.
    """

    def __init__(self, precision: str, device: str = "cpu") -> None:
        self.precision, self.device = precision, device
        self.dtype = _look_up(_TRUE, precision)
        if self.dtype is torch.float64 and device in _WITHOUT_FLOAT64:
            raise MisconfigurationException(
                f'precision="64-true" was asked of {device}, which has no double precision; '
                'use precision="32-true", or accelerator="cpu"'
            )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Bring floating-point parameters and buffers to the format, in place; complex and integer ones stay."""
        convert = {torch.float64: nn.Module.double, torch.float16: nn.Module.half, torch.bfloat16: nn.Module.bfloat16}
        return convert[self.dtype](module)

    def input_converter(self) -> Callable[[Any], Any] | None:
        """Brings floating-point tensors of any nest to the format."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

        return partial(apply_to_tensors, function=convert)

    def forward_context(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """A context in which new tensors have the format."""
        return partial(_default_dtype, self.dtype)

    def output_converter(self) -> Callable[[Any], Any] | None:
        """Brings floating-point tensors of any nest to torch's default format."""
        return _to_default_dtype

    def init_context(self) -> AbstractContextManager[Any]:
        """A context in which new tensors have the format."""
        return _default_dtype(self.dtype)


class DoublePrecision(TruePrecision):
    """float64 throughout: `TruePrecision("64-true")`."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__("64-true", device)


class HalfPrecision(TruePrecision):
    """Half precision throughout: `TruePrecision("16-true")` or `TruePrecision("bf16-true")`."""

    def __init__(self, precision: str = "16-true", device: str = "cpu") -> None:
        _look_up({name: _TRUE[name] for name in ("16-true", "bf16-true")}, precision)
        super().__init__(precision, device)


class MixedPrecision(Precision):
    """float32 parameters; operations that bear it run in half precision, under `torch.autocast`.

    float16 comes with a scaler of the loss, as its small gradients would vanish; bfloat16 has float32's range.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device: Type of device.
        scaler: Instead of a new `torch.amp.GradScaler`; for "16-mixed" only.

    Raises:
        MisconfigurationException: For another `precision`, a device without autocast, or a scaler for bfloat16.
    """

    def __init__(self, precision: str, device: str = "cpu", scaler: torch.amp.GradScaler | None = None) -> None:
        self.precision, self.device = precision, device
        self.dtype = _look_up(_MIXED, precision)
        if not torch.amp.is_autocast_available(device):
            raise MisconfigurationException(
                f"precision={precision!r} needs autocast, which PyTorch {torch.__version__} has not for {device}; "
                'use precision="32-true" or "bf16-true"'
            )
        if device == "cpu" and self.dtype is torch.bfloat16 and not computes_bfloat16():
            _note_emulation(precision)
        since = _SCALER_SINCE.get(device, "0")
        if self.dtype is torch.float16 and Version(torch.__version__) < Version(since):
            raise MisconfigurationException(
                f"precision={precision!r} needs a gradient scaler, which PyTorch has for {device} since {since}, and "
                f'this is {torch.__version__}; update it, or use precision="bf16-mixed"'
            )
        if self.dtype is torch.float16:
            self.scaler = torch.amp.GradScaler(device) if scaler is None else scaler
        elif scaler is not None:
            raise MisconfigurationException(
                f'precision={precision!r} needs no scaler, but one was given; leave it out, or use precision="16-mixed"'
            )

    def forward_context(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """Autocast, without its cache of converted weights.

        Before PyTorch 2.10 a weight that was first used under `no_grad` stayed in the cache without its gradient.
        """
        return partial(torch.autocast, self.device, dtype=self.dtype, cache_enabled=False)

    def output_converter(self) -> Callable[[Any], Any] | None:
        """Brings floating-point tensors of any nest to torch's default format."""
        return _to_default_dtype


def _look_up(dtypes: dict[str, torch.dtype], precision: str) -> torch.dtype:
    if precision not in dtypes:
        allowed = ", ".join(map(repr, dtypes))
        raise MisconfigurationException(f"precision={precision!r} is not one of {allowed}")
    return dtypes[precision]


@cache
def _note_emulation(precision: str) -> None:
    _log.info(
        "precision=%r on this CPU, which has no instructions for bfloat16: the numbers are right, but it takes longer "
        'than precision="32-true".',
        precision,
    )


def _to_default_dtype(nest: Any) -> Any:
    return _as_default(nest) if isinstance(nest, Tensor) else apply_to_tensors(nest, _as_default)


def _as_default(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
