"""The name `lightning` for processes that have this folder on `sys.path`."""

from __future__ import annotations

from lightlite.compat import take_place_of

take_place_of(__name__)
