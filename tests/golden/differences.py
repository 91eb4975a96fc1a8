"""Where lightlite differs from Lightning on purpose: what the golden data says, turned into what lightlite does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One difference from Lightning.

    Attributes:
        why: What lightlite does instead, and why.
        area: The golden file it is in.
        cases: The changes, by the case's name.
    """

    why: str
    area: str
    cases: dict[str, Callable[[Any], Any]]


def without(*hooks: str) -> Callable[[list[str]], list[str]]:
    """Leave out the calls of these hooks."""
    return lambda lines: [line for line in lines if line.partition(".")[2].partition(" ")[0] not in hooks]


def instead(old: str, *new: str) -> Callable[[list[str]], list[str]]:
    """Put lines in place of a line, wherever it is."""

    def change(lines: list[str]) -> list[str]:
        assert old in lines, f"{old!r} is not in the golden data"
        return [changed for line in lines for changed in (new if line == old else [line])]

    return change


def steps_of_evaluation_at_its_end(lines: list[str]) -> list[str]:
    """Hand what was logged on_step in an evaluation to the loggers as its last epoch hooks have run."""
    changed, waiting = [], []
    for line in lines:
        if line.startswith("step") and "each_step=" in line:
            waiting.append(line)
            continue
        changed.append(line)
        if line.startswith("on_validation_epoch_end"):
            changed += waiting
            waiting = []
    return changed


def without_indices(lines: list[str]) -> list[str]:
    """Give None where Lightning has no indices: for each batch, and for each of two in the epoch."""
    return [line.replace(", [[]]", ", [[None, None]]").replace(", []", ", None") for line in lines]


def files(listed: dict[str, str | None] | None = None, **told: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Put other lines, or none, in the place of files that are listed, and change what the callback tells."""

    def change(case: dict[str, Any]) -> dict[str, Any]:
        kept = [(listed or {}).get(line, line) for line in case["files"]]
        callback = "callback 0" if "callback 0" in case else "callback"
        return {**case, "files": [line for line in kept if line is not None], callback: {**case[callback], **told}}

    return change


STEP_8 = "checkpoints/epoch=1-step=8.ckpt"
BEST_IS_STEP_8 = {"best_model_path": STEP_8, "kth_best_model_path": STEP_8, "best_k_models": {STEP_8: 0.3}}
STEP_10 = {"checkpoints/epoch=2-step=10.ckpt: step 10": f"{STEP_8}: step 8"}

DIFFERENCES = [
    Difference(
        "Without an optimizer the hooks about optimizers are not called: there is none to hand them.",
        "hooks",
        {
            "no optimizer": without(
                "optimizer_step",
                "on_before_zero_grad",
                "optimizer_zero_grad",
                "on_before_optimizer_step",
                "configure_gradient_clipping",
            )
        },
    ),
    Difference(
        "A fit that is resumed from an epoch's end has left that epoch when it asks for the training loader.",
        "hooks",
        {
            case: instead(
                "= fit train, epoch 0, step 3, batches inf, last batch",
                "= fit train, epoch 1, step 3, batches inf, last batch",
            )
            for case in ("resumed from an epoch's end", "resumed from the end")
        },
    ),
    Difference(
        "A validation that fails puts the module's modes back.",
        "hooks",
        {
            "validation_step fails": instead(
                "module.validation_step", "module.validation_step", "module.on_validation_model_train"
            )
        },
    ),
    Difference(
        "What evaluation logs on_step reaches the loggers at its end: only then is the order of all batches known.",
        "logged",
        {
            "rows": steps_of_evaluation_at_its_end,
            "rows, every 2 of accumulated steps": steps_of_evaluation_at_its_end,
        },
    ),
    Difference(
        "The last checkpoint is always the newest state.",
        "files",
        {
            "save_last True, best": files({"checkpoints/last.ckpt: step 8": "checkpoints/last.ckpt: step 12"}),
            "save_last link, best": files(
                {"checkpoints/last.ckpt -> epoch=1-step=8.ckpt": "checkpoints/last.ckpt: step 12"}
            ),
            "max_steps within an epoch, by steps": files(
                {"checkpoints/last.ckpt: step 4": "checkpoints/last.ckpt: step 6"}
            ),
        },
    ),
    Difference(
        "A state that is saved by steps is judged by the validation of that state, not by the one before.",
        "files",
        {
            "save_last True, best by steps": files(STEP_10, **BEST_IS_STEP_8),
            "save_last False, best by steps": files(STEP_10, **BEST_IS_STEP_8),
            "save_last link, best by steps": files(
                {**STEP_10, "checkpoints/last.ckpt -> epoch=2-step=10.ckpt": "checkpoints/last.ckpt: step 12"},
                **BEST_IS_STEP_8,
            ),
            "every_n_train_steps 2, best of a validation value": lambda case: files(
                best_model_path=STEP_8,
                kth_best_model_path="checkpoints/epoch=0-step=4.ckpt",
                current_score=0.4,
                best_k_models={
                    "checkpoints/epoch=0-step=4.ckpt": 0.5,
                    **case["callback 0"]["best_k_models"],
                    STEP_8: 0.3,
                    "checkpoints/epoch=2-step=12.ckpt": 0.4,
                },
            )({**case, "files": ["checkpoints/epoch=0-step=4.ckpt: step 4", *case["files"]]}),
            "every_n_train_steps 3, mid-epoch validation": lambda case: files(
                best_k_models={**case["callback 0"]["best_k_models"], "checkpoints/epoch=1-step=6.ckpt": 0.4}
            )(case),
        },
    ),
    Difference(
        "fast_dev_run saves nothing, the last checkpoint neither.",
        "files",
        {"fast_dev_run": files({"checkpoints/last.ckpt: step 1": None}, last_model_path="")},
    ),
    Difference(
        "What is best survives being resumed with another dirpath.",
        "files",
        {
            "resumed elsewhere": files(
                {"d/epoch=2-step=12.ckpt: step 12": None},
                kth_best_model_path="c/epoch=1-step=8.ckpt",
                kth_value=0.3,
                best_k_models={"c/epoch=1-step=8.ckpt": 0.3, "d/epoch=3-step=16.ckpt": 0.2},
            )
        },
    ),
    Difference(
        "Samples of an iterable dataset have no indices: a writer is given None for each batch, as is documented.",
        "callbacks",
        {
            "writer: batch, a stream": without_indices,
            "writer: epoch, a stream": without_indices,
            "writer: batch_and_epoch, a stream": without_indices,
        },
    ),
]


def expected(area: str, case: str, golden: Any) -> Any:
    """What lightlite is to do, given what Lightning does."""
    for difference in DIFFERENCES:
        if difference.area == area and case in difference.cases:
            changed = difference.cases[case](golden)
            assert changed != golden, f"{case}: Lightning does the same now: {difference.why}"
            golden = changed
    return golden
