"""What a user has written, and what is there already."""

from __future__ import annotations

_BASES = {"LightningModule", "LightningDataModule", "Callback"}


def is_overridden(method_name: str, instance: object = None, parent: type | None = None) -> bool:
    """Whether `instance` has its own method instead of `parent`'s, by subclassing or by assignment.

    Args:
        method_name: The method.
        instance: The object; None has nothing.
        parent: By default the class of lightlite's that the object's is made from: LightningModule,
            LightningDataModule or Callback.

    Raises:
        ValueError: Where no parent is given, and there is none of these.
    """
    method = getattr(instance, method_name, None)
    if method is None:
        return False
    if parent is None:
        ours = (kind for kind in type(instance).__mro__ if kind.__module__.partition(".")[0] == "lightlite")
        parent = next((kind for kind in ours if kind.__name__ in _BASES), None)
    if parent is None:
        raise ValueError(
            f"is_overridden({method_name!r}, {type(instance).__name__}): whose method it overrides is only known of a "
            "LightningModule, LightningDataModule or Callback; give parent=…"
        )
    return getattr(method, "__func__", method) is not getattr(parent, method_name, None)
