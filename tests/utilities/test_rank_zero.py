from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

from lightlite.utilities.rank_zero import WarningCache, rank_zero_info, rank_zero_only, rank_zero_warn


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_only_rank_zero_runs_a_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    @rank_zero_only
    def answer() -> int:
        return 42

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert (answer(), rank_zero_only.rank) == (42, 0)
    monkeypatch.setenv("RANK", "3")
    assert (answer(), rank_zero_only.rank) == (None, 3)
    assert rank_zero_only(lambda: 1, default=7)() == 7
    monkeypatch.delenv("LOCAL_RANK")  # RANK alone is left over from something else
    assert (answer(), rank_zero_only.rank) == (42, 0)


def test_messages_show_in_a_program_that_did_not_configure_logging() -> None:
    code = "from lightlite.utilities import rank_zero_info; rank_zero_info('hello %s', 'you')"
    assert run(code).stderr == "hello you\n"
    assert run(code, RANK="1", LOCAL_RANK="1").stderr == ""


def test_messages_follow_a_program_that_configured_logging() -> None:
    code = (
        "import logging, sys; logging.basicConfig(stream=sys.stdout, format='%(name)s|%(message)s', level='INFO')\n"
        "from lightlite.utilities import rank_zero_info; rank_zero_info('hello')"
    )
    result = run(code)
    assert (result.stdout, result.stderr) == ("lightlite|hello\n", "")


def test_a_user_can_silence_messages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="lightlite"):
        rank_zero_info("not shown")
    assert not caplog.records


def test_a_warning_names_the_line_that_caused_it() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank_zero_warn("look here", category=RuntimeWarning)
    assert [(w.filename, w.category, str(w.message)) for w in caught] == [(__file__, RuntimeWarning, "look here")]


def test_a_cached_warning_comes_once() -> None:
    cache = WarningCache()
    with pytest.warns(UserWarning, match="once"):
        cache.warn("once")
    cache.warn("once")
