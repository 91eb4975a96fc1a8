"""Helpers that users import: seeds, messages of rank zero, tables about a model."""

from __future__ import annotations

from lightlite.errors import MisconfigurationException
from lightlite.utilities.rank_zero import (
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from lightlite.utilities.seed import isolate_rng, seed_everything

__all__ = [
    "MisconfigurationException",
    "isolate_rng",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]
