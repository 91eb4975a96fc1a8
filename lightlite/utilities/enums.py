"""Enumerations whose members are strings."""

from __future__ import annotations

from enum import Enum


class LightningEnum(str, Enum):
    """Members that are strings, and found and compared whatever the case."""

    def __str__(self) -> str:
        return str(self.value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            other = other.value
        return isinstance(other, str) and self.value.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.value.lower())


class GradClipAlgorithmType(LightningEnum):
    """What `gradient_clip_algorithm` may be."""

    VALUE = "value"
    NORM = "norm"

    @staticmethod
    def supported_type(val: str) -> bool:
        """Whether a string is one of them."""
        return val in [member.value for member in GradClipAlgorithmType]

    @staticmethod
    def supported_types() -> list[str]:
        """All of them, as strings."""
        return [member.value for member in GradClipAlgorithmType]
