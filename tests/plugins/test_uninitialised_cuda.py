"""CUDA is initialised by ranks that compute on it, and by nothing before: on a stand-in for a machine with two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch

class Initialised(BaseException):
    pass

def initialise(name):
    def fail(*args, **kwargs):
        raise Initialised("CUDA was initialised")
    setattr(torch.cuda, name, fail)

for name in ("_lazy_init", "set_device", "get_device_properties"):
    initialise(name)
torch.cuda.device_count = lambda: 2
torch.cuda.is_available = lambda: True

import lightlite as pl
import lightlite.accelerators, lightlite.strategies
import lightlite.plugins.cuda
from lightlite.demos.boring_classes import BoringModel
from lightlite.launch.cli import main

pl.seed_everything(1, verbose=False)
try:
    main(["--list"])
except SystemExit as end:
    assert not end.code
for precision in ("32-true", "16-mixed", "bf16-mixed", "16-true"):
    pl.Trainer(accelerator="auto", devices=1, precision=precision, logger=False)
trainer = pl.Trainer(accelerator="cuda", devices=2, precision="16-mixed", logger=False)
print([str(device) for device in trainer.hardware.devices], trainer.precision_plugin.scaler.is_enabled())
module = BoringModel()
trainer._launcher.run(lambda ranks: ranks.rank)  # the helpers start, meet, and leave
trainer._launcher.close()
pl.Fabric(accelerator="cuda", devices=2, precision="16-mixed")
try:
    pl.Trainer(accelerator="cuda", devices=1, logger=False, max_epochs=1).fit(module)
except Initialised:
    print("initialised by the run")
"""


def test_nothing_initialises_cuda_before_a_run_takes_its_place() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # what the stand-in hides stays hidden from helpers
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["['cuda:0', 'cuda:1'] True", "initialised by the run"]
