from __future__ import annotations

import json
import logging
import pickle
import pstats
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TRAINING_ALONE, Net, quiet_trainer, regression_loader

import lightlite as pl
from lightlite.errors import MisconfigurationException
from lightlite.loggers import CSVLogger
from lightlite.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler

STRATEGY = "[Strategy]SingleDeviceStrategy"


class Watched(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(0.002)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class Timed(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.profiler.profile("own work"):
            time.sleep(0.002)
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        pass

    def on_train_epoch_start(self) -> None:
        pass


def fit(profiler: Any, folder: Path, module: Net | None = None, batches: int = 6, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(folder, profiler=profiler, **options)
    trainer.fit(module or Timed(), regression_loader(batches), regression_loader(batches))
    return trainer


def calls(profiler: SimpleProfiler) -> dict[str, int]:
    return {action: len(durations) for action, durations in profiler.recorded_durations.items()}


def test_every_hook_step_and_fetch_is_an_action(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    fit(
        profiler,
        tmp_path,
        callbacks=[Watched(), Watched()],
        gradient_clip_val=1.0,
        max_epochs=2,
        enable_checkpointing=True,
    )
    counted = calls(profiler)
    assert {action: counted[action] for action in counted if "Checkpoint" not in action} == {
        "[LightningModule]Timed.configure_model": 1,
        "[LightningModule]Timed.configure_optimizers": 1,
        "[LightningModule]Timed.configure_gradient_clipping": 12,
        "[LightningModule]Timed.on_before_zero_grad": 12,
        "[LightningModule]Timed.on_train_epoch_start": 2,
        "[Callback]Watched.on_train_batch_start": 12,
        "[Callback]Watched#2.on_train_batch_start": 12,
        "[Callback]Watched.on_validation_start": 2,
        "[Callback]Watched#2.on_validation_start": 2,
        "[FitLoop].train_dataloader_next": 14,
        "[EvaluationLoop].val_next": 14,
        f"{STRATEGY}.training_step": 12,
        f"{STRATEGY}.validation_step": 12,
        f"{STRATEGY}.backward": 12,
        "zero_grad": 12,
        "optimizer_step": 12,
        "own work": 12,
        "run_training_batch": 12,
        "run_training_epoch": 2,
        "save_checkpoint": 2,
        "train_dataloader": 1,
        "val_dataloader": 1,
    }
    assert "[Callback]ModelCheckpoint.setup" in counted


def test_times_are_those_that_were_spent(tmp_path: Path) -> None:
    profiler = SimpleProfiler()
    fit(profiler, tmp_path, callbacks=Watched())
    total = {action: sum(durations) for action, durations in profiler.recorded_durations.items()}
    assert total["own work"] >= 6 * 0.002
    assert total["own work"] <= total[f"{STRATEGY}.training_step"] <= total["run_training_batch"]
    assert total["[Callback]Watched.on_train_batch_start"] >= 6 * 0.002
    together = total["run_training_batch"] + total["[Callback]Watched.on_train_batch_start"]
    assert together <= total["run_training_epoch"]


def test_simple_logs_a_table_with_the_longest_action_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightlite"):
        fit("simple", tmp_path)
    report = next(record.getMessage() for record in caplog.records if "Profiler Report" in record.getMessage())
    lines = report.strip().splitlines()
    assert lines[0] == "FIT Profiler Report"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "Action",
        "Mean duration (s)",
        "Num calls",
        "Total time (s)",
        "Percentage %",
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[6:-1]]
    totals = [float(row[3]) for row in rows]
    assert totals == sorted(totals, reverse=True)
    assert next(row for row in rows if row[0] == "run_training_batch")[2] == "6"


def test_each_call_has_a_report_of_its_own(tmp_path: Path) -> None:
    profiler = SimpleProfiler(dirpath=tmp_path, filename="times")
    with profiler.profile("before the fit"):
        pass
    trainer = fit(profiler, tmp_path)
    trainer.test(Timed(), regression_loader(2), verbose=False)
    in_fit, in_test = (tmp_path / "fit-times.txt").read_text(), (tmp_path / "test-times.txt").read_text()
    assert in_fit.startswith("FIT Profiler Report")
    assert "before the fit" in in_fit
    assert "training_step" in in_fit
    assert in_test.startswith("TEST Profiler Report")
    assert f"{STRATEGY}.test_step" in in_test
    assert "training_step" not in in_test


def test_the_report_goes_where_the_logger_writes_unless_told_otherwise(tmp_path: Path) -> None:
    fit(SimpleProfiler(filename="times", extended=False), tmp_path, logger=CSVLogger(tmp_path, name="runs"))
    report = (tmp_path / "runs" / "version_0" / "fit-times.txt").read_text()
    assert "Num calls" not in report
    assert "Mean duration (s)" in report


@pytest.mark.filterwarnings(TRAINING_ALONE)
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_run_that_fails_is_reported_up_to_there_and_the_next_begins_anew(
    tmp_path: Path, profiler: type[Profiler]
) -> None:
    class Fails(Timed):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3 and self.fails:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path, profiler=profiler(dirpath=tmp_path, filename="p"))  # type: ignore[call-arg]
    module = Fails()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(module, regression_loader(6))
    first = (tmp_path / "fit-p.txt").read_text()
    assert "training_step" in first
    module.fails = False
    trainer.fit(module, regression_loader(6))
    assert len((tmp_path / "fit-p.txt").read_text()) > len(first)


class ByHand(Timed):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class WithLBFGS(Timed):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class WithOwnStep(Timed):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_zero_grad(*args, **kwargs)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (ByHand(), {"optimizer_step": 6, "backward": 6, f"{STRATEGY}.training_step": 6}),
        (WithLBFGS(), {"[LightningModule]WithLBFGS.optimizer_step": 6}),
        (
            WithOwnStep(),
            {
                "[LightningModule]WithOwnStep.optimizer_step": 6,
                "[LightningModule]WithOwnStep.optimizer_zero_grad": 6,
                f"{STRATEGY}.backward": 6,
            },
        ),
    ],
)
def test_every_way_to_optimize_is_recorded(tmp_path: Path, module: Net, expected: dict[str, int]) -> None:
    profiler = SimpleProfiler()
    fit(profiler, tmp_path, module)
    counted = calls(profiler)
    assert {action: counted.get(action) for action in expected} == expected


def test_a_profiler_changes_no_number(tmp_path: Path) -> None:
    weights = []
    for profiler in (None, "simple"):
        torch.manual_seed(1)
        module = Net()
        fit(profiler, tmp_path, module, accumulate_grad_batches=2, gradient_clip_val=0.1)
        weights.append(module.layer.weight.detach())
    assert torch.equal(*weights)


def test_without_a_profiler_nothing_is_wrapped(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looks(Timed):
        on_before_zero_grad = pl.LightningModule.on_before_zero_grad

        def on_train_batch_end(self, *args: Any) -> None:
            step = self.trainer.fit_loop.step
            seen.append((step._plain_optimizer, step._backward, step._clear_gradients))

    module = Looks()
    trainer = fit(None, tmp_path, module)
    assert type(trainer.profiler) is PassThroughProfiler
    plain, backward, clear = seen[0]
    assert isinstance(plain, torch.optim.SGD)
    assert backward is torch.Tensor.backward
    assert clear == plain.zero_grad

    def function() -> None:
        pass

    assert trainer.profiler.wrap("action", function) is function


def test_advanced_names_the_functions_of_each_action(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path, "p", line_count_restriction=5, dump_stats=True)
    fit(profiler, tmp_path)
    report = (tmp_path / "fit-p.txt").read_text()
    step = report.split(f"Profile stats for: {STRATEGY}.training_step\n")[1].split("Profile stats for:")[0]
    assert "(training_step)" in step
    assert "(run_backward)" not in step
    assert len(re.findall(r"^ +\d+(?:/\d+)? ", step, re.MULTILINE)) <= 6
    dumped = pstats.Stats(str(tmp_path / f"fit-p-{STRATEGY}.training_step.prof"))
    assert any(name == "training_step" for _, _, name in dumped.stats)  # type: ignore[attr-defined]


def test_advanced_goes_on_with_an_action_after_the_one_within_it() -> None:
    profiler = AdvancedProfiler()

    def later() -> None:
        pass

    with profiler.profile("outer"):
        with profiler.profile("inner"):
            pass
        later()
    names = {code.co_name for code in _codes(profiler.profiled_actions["outer"])}
    assert "later" in names


def _codes(profile: Any) -> list[Any]:
    return [entry.code for entry in profile.getstats() if not isinstance(entry.code, str)]


def test_pytorch_records_three_batches_of_each_kind(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "p")
    trainer = fit(profiler, tmp_path, num_sanity_val_steps=2)
    report = (tmp_path / "fit-p.txt").read_text()
    assert re.findall(r"Profile stats for: (\w+)", report) == ["training_step", "validation_step"]
    assert "aten::" in report
    events = _events(tmp_path, "fit-p-training_step")
    assert sum(name == f"[pl][profile]{STRATEGY}.training_step" for name in events) == 3
    assert sum(name == "[pl][profile]own work" for name in events) == 3
    assert sum("[pl][module]torch.nn.modules.linear.Linear: layer" in name for name in events) >= 3
    assert sum(name.endswith(".validation_step") for name in _events(tmp_path, "fit-p-validation_step")) == 3
    assert not any(module._forward_hooks for module in trainer.lightning_module.modules())


def _events(folder: Path, name: str) -> list[str]:
    (trace,) = folder.glob(f"{name}.*.pt.trace.json")
    return [event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("cat") != "overhead"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_pytorch_records_few_batches_and_schedules_of_ones_own(tmp_path: Path) -> None:
    fit(PyTorchProfiler(tmp_path / "few", "p"), tmp_path, batches=2)
    assert sum(name.endswith(".training_step") for name in _events(tmp_path / "few", "fit-p-training_step")) == 2

    ready: list[int] = []
    profiler = PyTorchProfiler(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=2),
        on_trace_ready=lambda window: ready.append(window.step_num),
        record_module_names=False,
        sort_by_key="cuda_time_total",
        table_kwargs={"max_name_column_width": 30},
    )
    quiet_trainer(tmp_path, profiler=profiler).test(Net(), regression_loader(8), verbose=False)
    assert ready == [3, 6]
    assert profiler.function_events


@pytest.mark.filterwarnings(TRAINING_ALONE)
def test_every_rank_writes_a_report_of_its_own(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, profiler=SimpleProfiler(tmp_path, "p"), devices=2)
    try:
        trainer.fit(Net(), regression_loader(6))
    finally:
        trainer.close()
    for rank in (0, 1):
        report = (tmp_path / f"fit-p-{rank}.txt").read_text()
        assert re.search(r"\[Strategy\]DDPStrategy\.training_step +\| +[\d.]+ \| +3 \|", report)
    assert len(list(tmp_path.glob("*.txt"))) == 2


@pytest.mark.parametrize("profiler", [SimpleProfiler(), AdvancedProfiler(), PyTorchProfiler(), PassThroughProfiler()])
def test_a_profiler_at_work_can_be_sent_to_other_ranks(profiler: Profiler) -> None:
    profiler.start("action")
    sent = pickle.loads(pickle.dumps(profiler))
    profiler.stop("action")
    profiler.teardown(None)
    with sent.profile("another"):
        pass
    sent.teardown(None)


def test_a_profiler_of_ones_own_is_told_of_everything(tmp_path: Path) -> None:
    class Mine(Profiler):
        def __init__(self) -> None:
            super().__init__(filename="mine")
            self.open: list[str] = []
            self.closed: list[str] = []

        def start(self, action_name: str) -> None:
            self.open.append(action_name)

        def stop(self, action_name: str) -> None:
            self.closed.append(self.open.pop())
            assert self.closed[-1] == action_name

        def summary(self) -> str:
            return f"{len(self.closed)} actions"

    profiler = Mine()
    fit(profiler, tmp_path)
    assert profiler.open == []
    assert (tmp_path / "fit-mine.txt").read_text() == f"{len(profiler.closed)} actions\n"
    assert list(profiler.profile_iterable("ab", "letters")) == ["a", "b"]
    assert profiler.closed[-3:] == ["letters"] * 3


@pytest.mark.parametrize("given", ["fast", True, SimpleProfiler, 3])
def test_what_is_no_profiler_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"profiler=.*give 'simple', 'advanced', 'pytorch'") as raised:
        quiet_trainer(tmp_path, profiler=given)
    assert repr(given) in str(raised.value)


def test_an_action_that_does_not_fit_is_named() -> None:
    profiler = SimpleProfiler()
    profiler.start("a")
    with pytest.raises(ValueError, match=r"'a'.*runs already"):
        profiler.start("a")
    with pytest.raises(ValueError, match=r"stop\('b'\): it was never started; what runs is 'a'"):
        profiler.stop("b")
    with pytest.raises(ValueError, match=r"stop\('b'\): it was never started; what runs is nothing"):
        AdvancedProfiler().stop("b")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdvancedProfiler(line_count_restriction=1.5), MisconfigurationException, "line_count_restriction=1.5"),
        (
            lambda: PyTorchProfiler(sort_by_key="speed"),
            MisconfigurationException,
            "sort_by_key='speed'.*cpu_time_total",
        ),
        (lambda: PyTorchProfiler(schedule=3), MisconfigurationException, "schedule=3.*torch.profiler.schedule"),
        (lambda: PyTorchProfiler(schedule=lambda step: 1), MisconfigurationException, "returns 1: give a function"),
        (lambda: PyTorchProfiler(colour=1), MisconfigurationException, "colour=1.*record_shapes"),
        (lambda: PyTorchProfiler(table_kwargs={"row_limit": 1}), KeyError, "'row_limit' is none of"),
    ],
)
def test_wrong_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_ranges_for_an_external_profiler_are_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"emit_nvtx=True.*'cpu'"):
        fit(PyTorchProfiler(emit_nvtx=True), tmp_path)


def test_statistics_without_a_folder_are_refused() -> None:
    profiler = AdvancedProfiler(dump_stats=True)
    with profiler.profile("a"):
        pass
    with pytest.raises(MisconfigurationException, match="dirpath"):
        profiler.describe()
