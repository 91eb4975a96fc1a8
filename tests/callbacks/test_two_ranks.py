from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightlite.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer, TQDMProgressBar
from lightlite.loggers import CSVLogger

from .programs import Net, checkpoints, loader, trainer


class Report(Callback):
    """Leaves what each rank knows at the end of the fit in a file."""

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        checkpoint = trainer.checkpoint_callback
        known = [checkpoint.best_model_path, checkpoint.last_model_path, trainer.logger.version, trainer.should_stop]
        Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(known))


def test_on_two_ranks_everything_is_written_once_and_known_to_both(capfd: Any) -> None:
    run = trainer(
        ModelCheckpoint(monitor="val_loss", save_last=True),
        EarlyStopping("val_loss", patience=1),
        LearningRateMonitor(),
        Timer("00:01:00:00"),
        TQDMProgressBar(),
        Report(),
        logger=CSVLogger("."),
        enable_progress_bar=True,
        devices=2,
        max_epochs=4,
    )
    try:
        run.fit(Net(), loader(8), loader(3))
    finally:
        run.close()
    folder = "./lightning_logs/version_0/checkpoints"
    expected = [f"{folder}/epoch=1-step=8.ckpt", f"{folder}/last.ckpt", 0, True]
    assert [json.loads(Path(f"rank{rank}.json").read_text()) for rank in (0, 1)] == [expected, expected]
    assert checkpoints(folder) == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 12}
    rows = Path("lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert sum(",0.01," in row for row in rows) == 12 + 3
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("Epoch 2/3: 4/4")]) == 1
