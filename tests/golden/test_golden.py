"""lightlite does what Lightning did when the golden data was recorded, but for the differences on purpose.

`record.py` tells what the data is and how to record it anew.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import lightlite as pl

from .differences import DIFFERENCES, expected
from .programs import in_own_folder
from .record import AREAS, HERE

GOLDEN = {area: json.loads((HERE / f"{area}.json").read_text()) for area in AREAS}
CASES: dict[str, dict[str, Callable[[Any], Any]]] = {
    area: importlib.import_module(f"golden.{area}").CASES for area in AREAS
}


@pytest.mark.parametrize(("area", "case"), [(area, case) for area in AREAS for case in GOLDEN[area]])
def test_lightlite_does_as_lightning_does(area: str, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = in_own_folder(CASES[area][case], pl)
    assert json.loads(json.dumps(recorded)) == expected(area, case, GOLDEN[area][case])


@pytest.mark.parametrize("area", AREAS)
def test_the_golden_data_has_the_cases_that_there_are(area: str) -> None:
    assert list(GOLDEN[area]) == list(CASES[area])
    differing = {case for difference in DIFFERENCES if difference.area == area for case in difference.cases}
    assert differing <= set(GOLDEN[area])
