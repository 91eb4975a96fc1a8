from __future__ import annotations

from pathlib import Path

import pytest
from many_launches import LOOPBACK, launch_together


@pytest.mark.parametrize("way", ["cli", "script"])
def test_launches_at_the_same_time_do_not_meet_and_listen_on_loopback_only(way: str, tmp_path: Path) -> None:
    result = launch_together(3, way, tmp_path)
    assert result.failures == []
    assert result.listened
    assert result.listened <= LOOPBACK
