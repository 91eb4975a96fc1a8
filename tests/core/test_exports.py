"""A module goes to TorchScript and ONNX in evaluation mode, and is as before afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightlite as pl

from .models import quiet_trainer

pytestmark = [
    # PyTorch has deprecated TorchScript, and its exporters use what it has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Scaler(pl.LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="example")
        self.layer, self.dropout = nn.Linear(3, 2), nn.Dropout(0.5)
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("loss", 1.0)
        return self(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


EXAMPLE = torch.arange(12.0).reshape(4, 3)


def evaluated(module: nn.Module) -> Tensor:
    mode = module.training
    with torch.no_grad():
        output = module.eval()(EXAMPLE)
    module.train(mode)
    return output


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_computes_what_the_module_does(tmp_path: Path, method: str) -> None:
    module = Scaler(EXAMPLE)
    compiled = module.to_torchscript(tmp_path / "module.pt", method=method)
    assert module.training
    assert torch.equal(compiled(EXAMPLE), evaluated(module))
    assert torch.equal(torch.jit.load(tmp_path / "module.pt")(EXAMPLE), evaluated(module))


def test_a_module_that_has_been_trained_keeps_its_trainer_through_an_export(tmp_path: Path) -> None:
    module = Scaler(EXAMPLE)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, torch.utils.data.DataLoader([(torch.ones(3),)] * 2))
    compiled = module.to_torchscript()
    assert torch.equal(compiled(EXAMPLE), evaluated(module))
    assert module.trainer is trainer


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_onnx_has_the_inputs_of_the_example(tmp_path: Path, make: Callable[[Tensor], Any]) -> None:
    onnx = pytest.importorskip("onnx")
    module = Scaler(make(EXAMPLE))
    module.to_onnx(tmp_path / "module.onnx", verbose=False)
    graph = onnx.load(tmp_path / "module.onnx").graph
    assert [entry.name for entry in graph.input] == ["x"]
    assert "Dropout" not in {node.op_type for node in graph.node}
    assert module.training


def test_an_export_without_an_example_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"to_onnx needs an input: pass one, or set self.example_input_array"):
        Scaler().to_onnx("unwritten.onnx")
    with pytest.raises(ValueError, match="to_torchscript needs an input"):
        Scaler().to_torchscript(method="trace")
    with pytest.raises(ValueError, match=r"method='jit'\): allowed are 'script' and 'trace'"):
        Scaler().to_torchscript(method="jit")
