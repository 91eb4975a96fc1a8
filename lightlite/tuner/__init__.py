"""Searches for learning rates and batch sizes."""

from __future__ import annotations

from lightlite.tuner.tuning import Tuner

__all__ = ["Tuner"]
