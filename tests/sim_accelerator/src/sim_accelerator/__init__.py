"""A simulated accelerator: `pip install` this, and `Trainer(accelerator="sim")` computes on the device `sim:0`.

It has no hardware: its tensors hold their values in the host's memory, where torch's CPU kernels compute. But torch
sees a device of its own, with its own random generator, and refuses operators that mix it with the CPU. What forgets
to move something to the device fails here as it does on a GPU.
"""

from __future__ import annotations

from sim_accelerator.accelerator import SimAccelerator

__all__ = ["SimAccelerator"]
