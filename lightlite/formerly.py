"""What Lightning 1.x had and Lightning 2.x has not, and what to write now instead."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from lightlite.utilities.rank_zero import rank_zero_warn

P = ParamSpec("P")

ARGUMENTS = {
    "amp_backend": "precision='16-mixed'",
    "amp_level": "precision='16-mixed'",
    "auto_lr_find": "lightlite.tuner.Tuner(trainer).lr_find(model), before trainer.fit(model)",
    "auto_scale_batch_size": "lightlite.tuner.Tuner(trainer).scale_batch_size(model), before trainer.fit(model)",
    "auto_select_gpus": "accelerator='gpu', devices=N, which takes free ones",
    "checkpoint_callback": "enable_checkpointing=…",
    "distributed_backend": "strategy=…",
    "flush_logs_every_n_steps": "logger=CSVLogger(…, flush_logs_every_n_steps=…)",
    "gpus": "accelerator='gpu', devices=…",
    "ipus": "another accelerator: IPUs are not supported any more",
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "move_metrics_to_cpu": "nothing: leave it out",
    "multiple_trainloader_mode": "trainer.fit(model, CombinedLoader(loaders, mode=…))",
    "num_processes": "accelerator='cpu', devices=…",
    "prepare_data_per_node": "self.prepare_data_per_node = … in __init__ of the LightningDataModule or LightningModule",
    "process_position": "callbacks=[TQDMProgressBar(process_position=…)]",
    "progress_bar_refresh_rate": "callbacks=[TQDMProgressBar(refresh_rate=…)], or enable_progress_bar=False",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "use_distributed_sampler=…",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path=…)",
    "stochastic_weight_avg": "callbacks=[StochasticWeightAveraging(swa_lrs=…)]",
    "terminate_on_nan": "detect_anomaly=True",
    "tpu_cores": "another accelerator: TPUs are left out of lightlite",
    "track_grad_norm": "self.log_dict(grad_norm(self, norm_type=2)) in on_before_optimizer_step",
    "truncated_bptt_steps": "self.automatic_optimization = False, and a loop over parts of the batch in training_step",
    "weights_save_path": "callbacks=[ModelCheckpoint(dirpath=…)]",
    "weights_summary": "callbacks=[ModelSummary(max_depth=…)], or enable_model_summary=False",
}
"""The Trainer's arguments of 1.x: what to give instead."""

REFUSED = {
    "training_epoch_end": "on_train_epoch_end(self)",
    "validation_epoch_end": "on_validation_epoch_end(self)",
    "test_epoch_end": "on_test_epoch_end(self)",
}
"""Hooks of 1.x with which Lightning 2.x refuses a module: what to define instead."""

CHECKED = {
    "fit": ("training_epoch_end", "validation_epoch_end"),
    "validate": ("validation_epoch_end",),
    "test": ("test_epoch_end",),
}

NOT_CALLED = {
    "configure_sharded_model": "configure_model(self)",
    "get_progress_bar_dict": "get_metrics of a progress bar",
    "on_batch_end": "on_train_batch_end(self, outputs, batch, batch_idx)",
    "on_batch_start": "on_train_batch_start(self, batch, batch_idx)",
    "on_epoch_end": "on_train_epoch_end(self), on_validation_epoch_end(self) or on_test_epoch_end(self)",
    "on_epoch_start": "on_train_epoch_start(self), on_validation_epoch_start(self) or on_test_epoch_start(self)",
    "on_hpc_load": "on_load_checkpoint(self, checkpoint)",
    "on_hpc_save": "on_save_checkpoint(self, checkpoint)",
    "on_pretrain_routine_end": "on_fit_start(self)",
    "on_pretrain_routine_start": "on_fit_start(self)",
    "tbptt_split_batch": "a loop over parts of the batch in training_step, with self.automatic_optimization = False",
    "test_step_end": "the rest of test_step",
    "training_step_end": "the rest of training_step",
    "validation_step_end": "the rest of validation_step",
}
"""Hooks of 1.x that nobody calls any more, which a module may have for reasons of its own: what to define instead."""


def explain_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Make the Trainer's `__init__` say, of an argument that it does not have, what to give instead."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if len(args) > 1:
            raise TypeError(
                f"Trainer({', '.join(map(repr, args[1:]))}): give arguments by name, as in Trainer(max_epochs=3)"
            )
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            raise TypeError(_of_unknown(unknown, kwargs[unknown], known))
        init(*args, **kwargs)

    return checked


def _of_unknown(name: str, value: object, known: list[str]) -> str:
    given = f"Trainer({name}={value!r}): there is no argument {name!r}"
    if name in ARGUMENTS:
        return f"{given}, which Lightning 1.x had; write instead: {ARGUMENTS[name]}"
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{given}; {hint}There are: {', '.join(known)}"


def check_hooks(module: object, fn: str) -> None:
    """Tell of hooks that a module has, and that nobody calls any more.

    Args:
        module: The user's module.
        fn: The Trainer's method that was called.

    Raises:
        NotImplementedError: For those that Lightning 2.x refuses, saying what to define instead.
    """
    name = type(module).__name__
    for hook in CHECKED.get(fn, ()):
        if callable(getattr(module, hook, None)):
            raise NotImplementedError(
                f"{name} defines {hook}, which Lightning 1.x called and nobody calls any more; define "
                f"{REFUSED[hook]} instead, and keep what it needs of the steps' outputs in an attribute of the module"
            )
    for hook, instead in NOT_CALLED.items():
        if callable(getattr(module, hook, None)):
            rank_zero_warn(
                f"{name} defines {hook}, which Lightning 1.x called and nobody calls any more: see {instead}"
            )
