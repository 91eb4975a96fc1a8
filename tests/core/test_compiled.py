"""A LightningModule that went through torch.compile runs compiled, in every loop and on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightlite as pl

from .models import TRAINING_ALONE, Net, quiet_trainer, regression_loader

pytestmark = [
    pytest.mark.filterwarnings(TRAINING_ALONE),
    # PyTorch's own, while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


class CountingBackend:
    """Runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def fitted(folder: Path, model: Any, **arguments: Any) -> dict[str, Tensor]:
    trainer = quiet_trainer(folder, **arguments)
    trainer.fit(model, regression_loader(), regression_loader())
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_net() -> Net:
    pl.seed_everything(3, verbose=False)
    return Net()


def test_a_compiled_module_trains_to_the_same_weights_through_its_compiled_steps(tmp_path: Path) -> None:
    plain = fitted(tmp_path, make_net())
    backend = CountingBackend()
    assert equal(fitted(tmp_path, torch.compile(make_net(), backend=backend)), plain)
    assert backend.runs >= len(regression_loader())


def test_a_compiled_module_is_validated_and_predicted_compiled(tmp_path: Path) -> None:
    backend = CountingBackend()
    net = make_net()
    model = torch.compile(net, backend=backend)
    trainer = quiet_trainer(tmp_path)
    trainer.validate(model, regression_loader(), verbose=False)
    validated = backend.runs
    assert validated > 0
    trainer.predict(model, regression_loader())
    assert backend.runs > validated
    assert trainer.lightning_module is net


def test_a_compiled_module_trains_on_helper_ranks(tmp_path: Path) -> None:
    plain = fitted(tmp_path, make_net(), devices=2)
    assert equal(fitted(tmp_path, torch.compile(make_net(), backend="eager"), devices=2), plain)
