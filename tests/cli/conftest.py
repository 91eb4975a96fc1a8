"""The command line is the one that a test gives, not pytest's."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_words_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
