from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightlite.plugins
from lightlite.errors import MisconfigurationException
from lightlite.interfaces import Precision
from lightlite.plugins import DoublePrecision, HalfPrecision, MixedPrecision, TruePrecision, precision
from lightlite.registry import PrecisionRegistry

DTYPES = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}


def train(precision: Precision, steps: int = 60) -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    net = precision.convert_module(net)
    context, convert = precision.forward_context(), precision.input_converter()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    inputs = torch.randn(64, 8)
    batch: Any = (inputs, (inputs.sum(1) > 0).long())
    if convert is not None:
        batch = convert(batch)
    assert batch[1].dtype == torch.int64
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        if context is None:
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        else:
            with context():
                loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        if precision.scaler is None:
            loss.backward()
            optimizer.step()
        else:
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
    return net, loss.item()


@pytest.mark.parametrize("name", PrecisionRegistry.names())
def test_every_precision_trains_on_the_cpu_and_keeps_its_format(name: str) -> None:
    precision = PrecisionRegistry.create(name, device="cpu")
    assert precision.precision == name
    net, loss = train(precision)
    assert loss < 0.25
    assert {p.dtype for p in net.parameters()} == {DTYPES.get(name, torch.float32)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", list(DTYPES))
def test_true_precision_makes_new_tensors_in_its_format_and_leaves_complex_ones(name: str) -> None:
    precision = TruePrecision(name)
    context, convert = precision.forward_context(), precision.input_converter()
    assert context is not None
    assert convert is not None
    with context():
        assert torch.ones(1).dtype == DTYPES[name]
    assert torch.get_default_dtype() == torch.float32
    module = nn.Module()
    module.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    assert precision.convert_module(module).phase.dtype == torch.complex64
    batch = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int32), "mask": torch.tensor([True])}
    converted = convert(batch)
    assert [tensor.dtype for tensor in converted.values()] == [DTYPES[name], torch.int32, torch.bool]


@pytest.mark.parametrize(("name", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_mixed_precision_computes_products_in_half_and_keeps_gradients_after_no_grad(
    name: str, dtype: torch.dtype
) -> None:
    layer, context = nn.Linear(3, 3), MixedPrecision(name).forward_context()
    assert context is not None
    with context():
        with torch.no_grad():
            layer(torch.ones(2, 3))
        output = layer(torch.ones(2, 3))
    assert output.dtype == dtype
    output.float().sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((3, 3), 2.0))


def test_the_scaler_is_kept_in_checkpoints() -> None:
    precision = MixedPrecision("16-mixed", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    train(precision, steps=1)
    other = MixedPrecision("16-mixed")
    other.load_state_dict(precision.state_dict())
    assert other.state_dict()["scale"] == 8.0
    assert MixedPrecision("bf16-mixed").state_dict() == {}


def test_what_cannot_be_is_refused_with_what_can() -> None:
    with pytest.raises(MisconfigurationException, match="'8-mixed' is not one of '16-mixed', 'bf16-mixed'"):
        MixedPrecision("8-mixed")
    with pytest.raises(MisconfigurationException, match="'64-true' is not one of '16-true', 'bf16-true'"):
        HalfPrecision("64-true")
    with pytest.raises(MisconfigurationException, match=r'mps, which has no double precision.*"32-true"'):
        DoublePrecision(device="mps")
    with pytest.raises(MisconfigurationException, match='not for meta; use precision="32-true"'):
        MixedPrecision("16-mixed", device="meta")
    with pytest.raises(MisconfigurationException, match="needs no scaler"):
        MixedPrecision("bf16-mixed", scaler=torch.amp.GradScaler("cpu"))


def test_public_names_of_plugins_lead_to_their_kinds() -> None:
    for name in lightlite.plugins.__all__:
        kind = lightlite.plugins.CheckpointIO if name.endswith("CheckpointIO") else Precision
        assert issubclass(getattr(lightlite.plugins, name), kind)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        lightlite.plugins.Nonsense  # noqa: B018


def test_a_scaler_is_asked_only_of_a_pytorch_that_has_one_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with pytest.raises(MisconfigurationException, match=r"for mps since 2\.8, and this is 2\.7\.1.*bf16-mixed"):
        MixedPrecision("16-mixed", device="mps")
    assert MixedPrecision("bf16-mixed", device="mps").scaler is None
    assert MixedPrecision("16-mixed", device="cpu").scaler is not None
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert MixedPrecision("16-mixed", device="mps").scaler is not None


@pytest.mark.parametrize(("instructions", "notes"), [({}, 1), ({"avx512_bf16": True}, 0), ({"bf16": True}, 0)])
def test_a_cpu_without_bfloat16_instructions_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, instructions: dict[str, bool], notes: int
) -> None:
    precision._note_emulation.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    with caplog.at_level("INFO"):
        for _ in range(2):
            MixedPrecision("bf16-mixed", device="cpu")
        MixedPrecision("bf16-mixed", device="cuda")
    assert len([record for record in caplog.records if "no instructions for bfloat16" in record.getMessage()]) == notes
