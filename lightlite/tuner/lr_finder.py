"""The result of a search for a learning rate, where Lightning has it."""

from __future__ import annotations

from lightlite.callbacks.lr_finder import LRFinder

_LRFinder = LRFinder
"""Its name in Lightning."""

__all__ = ["LRFinder", "_LRFinder"]
