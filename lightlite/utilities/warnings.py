"""Kinds of warnings."""

from __future__ import annotations

import warnings


class PossibleUserWarning(UserWarning):
    """Of something that may be meant as it is."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Ignore warnings of the kind `PossibleUserWarning`.

    Args:
        module: A regular expression for the modules that they come from; by default all.
    """
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)
