from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightlite.errors import MisconfigurationException
from lightlite.nest import apply_to_tensors, move_to

META = torch.device("meta")
CPU = torch.device("cpu")


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Sample:
    image: Any
    label: str
    size: int = field(init=False, default=3)


@dataclass(frozen=True)
class Frozen:
    image: Any
    name: str = "x"


@dataclass
class Slotted:
    __slots__ = ("image",)
    image: Any


class Tagged(dict[str, Any]):
    tag = "none"


class Movable:
    def __init__(self) -> None:
        self.device: object = "cpu"

    def to(self, device: torch.device) -> Movable:
        moved = Movable()
        moved.device = device
        return moved


class MovesInPlace(Movable):
    def to(self, device: torch.device) -> None:  # type: ignore[override]
        self.device = device


class Unmakeable(UserDict[str, Any]):
    def __init__(self) -> None:
        super().__init__()


def tensors_of(nest: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_tensors(nest, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize(
    "nest",
    [
        torch.ones(2),
        [torch.ones(2), "text", None, 3, 2.5, b"bytes", Ellipsis, object()],
        (torch.ones(2), [torch.ones(1)]),
        Pair(torch.ones(2), {"a": torch.ones(1)}),
        torch.max(torch.ones(2, 2), dim=0),
        deque([torch.ones(2)], maxlen=5),
        {"a": torch.ones(2), 1: (torch.ones(1),)},
        OrderedDict(b=torch.ones(2), a=torch.ones(1)),
        defaultdict(list, a=[torch.ones(2)]),
        UserDict(a=torch.ones(2)),
        MappingProxyType({"a": torch.ones(2)}),
        Sample(torch.ones(2), "cat"),
        Frozen((torch.ones(2),)),
        Slotted(torch.ones(2)),
    ],
    ids=lambda nest: type(nest).__name__,
)
def test_containers_keep_their_type_and_only_tensors_change(nest: Any) -> None:
    before = tensors_of(nest)
    moved = move_to(nest, META)
    assert type(moved) is type(nest)
    assert [tensor.device.type for tensor in tensors_of(moved)] == ["meta"] * len(before)
    assert [tensor.shape for tensor in tensors_of(moved)] == [tensor.shape for tensor in before]
    assert [tensor.device.type for tensor in tensors_of(nest)] == ["cpu"] * len(before), "the original was changed"


def test_what_is_no_tensor_is_the_same_object() -> None:
    thing = object()
    moved = move_to([torch.ones(1), thing, "text", None], META)
    assert moved[1] is thing
    assert moved[2:] == ["text", None]


def test_details_of_containers_are_kept() -> None:
    assert move_to(deque([torch.ones(2)], maxlen=5), META).maxlen == 5
    assert move_to(defaultdict(list, a=torch.ones(2)), META)["new"] == []
    assert list(move_to(OrderedDict(b=torch.ones(2), a=1), META)) == ["b", "a"]
    tagged = Tagged(a=torch.ones(2))
    tagged.tag = "mine"
    assert move_to(tagged, META).tag == "mine"
    sample = Sample(torch.ones(2), "cat")
    sample.size = 7
    moved = move_to(sample, META)
    assert (moved.label, moved.size) == ("cat", 7)


def test_nothing_is_copied_that_is_there_already() -> None:
    nest = {"a": [torch.ones(2), Pair(torch.ones(1), Sample(torch.ones(1), "cat"))]}
    assert move_to(nest, CPU) is nest


def test_shared_tensors_and_containers_move_once_and_stay_shared() -> None:
    tensor, calls = torch.ones(2), []
    shared = [tensor]
    result = apply_to_tensors(
        {"a": shared, "b": shared, "c": tensor},
        lambda t: calls.append(1) or t + 1,  # type: ignore[func-returns-value]
    )
    assert len(calls) == 1
    assert result["a"] is result["b"]
    assert result["a"][0] is result["c"]
    assert torch.equal(result["c"], torch.full((2,), 2.0))


def test_objects_with_a_to_method_move_themselves() -> None:
    movable, in_place = Movable(), MovesInPlace()
    moved = move_to([movable, in_place], META)
    assert moved[0].device == META
    assert movable.device == "cpu"
    assert moved[1] is in_place
    assert in_place.device == META


def test_packed_sequences_move_by_their_own_method() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to({"text": packed}, META)["text"]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device == META
    assert moved.batch_sizes.device.type == "cpu"


def test_classes_in_a_batch_are_left_alone() -> None:
    assert move_to([Movable, torch.float32], META) == [Movable, torch.float32]


def test_tensors_are_converted_before_they_move() -> None:
    moved = move_to([torch.ones(2, dtype=torch.float64)], META, convert=lambda tensor: tensor.float())
    assert (moved[0].dtype, moved[0].device) == (torch.float32, META)


def test_a_mapping_that_cannot_be_made_anew_is_named() -> None:
    nest = Unmakeable()
    nest["a"] = torch.ones(1)
    with pytest.raises(MisconfigurationException, match=r"type Unmakeable .* `to\(device\)`"):
        move_to(nest, META)
