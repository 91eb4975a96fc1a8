"""Exceptions, where Lightning has them; lightlite's own are in `lightlite.errors`."""

from __future__ import annotations

from lightlite.errors import MisconfigurationException, SIGTERMException

__all__ = ["MisconfigurationException", "SIGTERMException"]
