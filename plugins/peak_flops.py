"""What GPUs could do, by their makers' data sheets."""

from __future__ import annotations

import re

import torch

from lightlite.utilities.rank_zero import rank_zero_warn

_PEAKS = {
    r"b200": (37e12, 75e12, 1100e12, 2250e12, 2250e12),
    r"h200 nvl|h100 nvl": (30e12, 60e12, 417.5e12, 835.5e12, 835.5e12),
    r"h100 pcie": (25.6e12, 51.2e12, 378e12, 756e12, 756e12),
    r"h200|gh200|h100|h800": (33.5e12, 66.9e12, 494.7e12, 989.4e12, 989.4e12),
    r"a100|a800": (9.7e12, 19.5e12, 156e12, 312e12, 312e12),
    r"a30\b": (5.2e12, 10.3e12, 82e12, 165e12, 165e12),
    r"a40\b": (None, 37.4e12, 74.8e12, 149.7e12, 149.7e12),
    r"a10g": (None, 35e12, 35e12, 70e12, 70e12),
    r"a10\b": (None, 31.2e12, 62.5e12, 125e12, 125e12),
    r"a6000": (None, 38.7e12, 77.4e12, 154.8e12, 154.8e12),
    r"l40s": (None, 91.6e12, 183e12, 362e12, 362e12),
    r"l40\b": (None, 90.5e12, 90.5e12, 181e12, 181e12),
    r"l4\b": (None, 30.3e12, 60e12, 121e12, 121e12),
    r"rtx 4090": (None, 82.6e12, 82.6e12, 165.2e12, 165.2e12),
    r"rtx 4080 super": (None, 52.2e12, 52.2e12, 104.4e12, 104.4e12),
    r"rtx 4080": (None, 48.7e12, 48.7e12, 97.5e12, 97.5e12),
    r"rtx 3090 ti": (None, 40e12, 40e12, 80e12, 80e12),
    r"rtx 3090": (None, 35.6e12, 35.6e12, 71e12, 71e12),
    r"rtx 3080 ti": (None, 34.1e12, 34.1e12, 68.2e12, 68.2e12),
    r"rtx 3080": (None, 29.8e12, 29.8e12, 59.5e12, 59.5e12),
    r"rtx 3070": (None, 20.3e12, 20.3e12, 40.6e12, 40.6e12),
    r"\bt4\b": (None, 8.1e12, None, None, 65e12),
    r"v100-sxm": (7.8e12, 15.7e12, None, None, 125e12),
    r"v100s": (8.2e12, 16.4e12, None, None, 130e12),
    r"v100": (7e12, 14e12, None, None, 112e12),
}
"""Operations a second by the makers' data sheets, by the device's name: float64, float32, TensorFloat-32, bfloat16,
float16; of dense matrices, for which sheets that advertise sparse ones give half. None: not in hardware."""


def of_gpu(name: str, dtype: torch.dtype) -> float | None:
    """Operations a second of a GPU; None, with a warning, where that is not known here.

    Args:
        name: As PyTorch calls it: "NVIDIA A100-SXM4-80GB".
        dtype: What it computes in; float32 counts as TensorFloat-32 where
            `torch.set_float32_matmul_precision` allows that.
    """
    peaks = next((peaks for pattern, peaks in _PEAKS.items() if re.search(pattern, name.lower())), None)
    if peaks is None or "laptop" in name.lower():
        rank_zero_warn(f"the operations a second of {name!r} are not known here: no share of them is computed")
        return None
    double, single, tensor_float, brain, half = peaks
    if dtype is torch.float32 and tensor_float and torch.get_float32_matmul_precision() != "highest":
        single = tensor_float
    peak = {torch.float64: double, torch.float32: single, torch.bfloat16: brain, torch.float16: half}.get(dtype)
    if peak is None:
        rank_zero_warn(f"{name!r} has no hardware for {dtype}: no share of its operations a second is computed")
    return peak
