"""Files of `archive.write` are those of `torch.save`, whatever tensors are in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightlite import archive

BASE = torch.arange(24.0).reshape(4, 6)
CONTENTS: dict[str, Any] = {
    "plain data": {"a": 1, "b": [2, "x", None]},
    "one": {"weight": BASE},
    "views of one storage": {"whole": BASE, "row": BASE[1], "turned": BASE.t(), "again": [BASE[2:3, ::2]]},
    "empty and scalar": {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "none": ()},
    "formats": [torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.bool, torch.complex64, torch.int8)],
    "conjugate": {"x": torch.tensor([1 + 2j]).conj(), "y": -torch.tensor([3j]).imag},
    "parameter": {"p": torch.nn.Parameter(BASE.clone()), "frozen": torch.nn.Parameter(BASE.clone(), False)},
    "more than a chunk": {"big": torch.arange(archive.CHUNK // 4 + 7, dtype=torch.float32), "after": BASE},
    "sparse": {"s": torch.eye(3).to_sparse(), "after": BASE},
    "the same one twice": {"a": (BASE, BASE), "b": BASE},
}


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for item in value.values() for part in flat(item)]
    return [part for item in value for part in flat(item)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    content = CONTENTS[name]
    archive.write(content, str(tmp_path / "mine"))
    torch.save(content, tmp_path / "torchs")

    with zipfile.ZipFile(tmp_path / "mine") as mine:
        assert mine.testzip() is None
    read = torch.load(tmp_path / "mine", weights_only=True)
    for got, expected in zip(flat(read), flat(torch.load(tmp_path / "torchs", weights_only=True)), strict=True):
        if isinstance(expected, torch.Tensor):
            assert got.dtype is expected.dtype
            assert got.layout is expected.layout
            assert torch.equal(got.to_dense(), expected.to_dense())
        else:
            assert got == expected


def test_what_shared_memory_shares_it_again_and_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x"
    archive.write(CONTENTS["views of one storage"], str(path))
    read = torch.load(path, weights_only=True, mmap=True)
    assert read["row"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()
    assert torch.equal(read["again"][0], BASE[2:3, ::2])
