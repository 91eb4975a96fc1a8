"""Counts and cuts TensorBoard's event files.

An event file is a row of TFRecords: a length of 8 bytes, its checksum of 4, that many bytes, their checksum of 4, as
TensorFlow's `record_writer.h` has it. The first record names the format. A run that goes on opens a further file, which
TensorBoard reads as one with those before it, in the order of their names.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from itertools import chain

_FRAME = struct.Struct("<Q4x")
_CHECKSUM = 4
_PREFIX = "events.out.tfevents."
_BACKUP = "events.out.bak."


class EventFiles:
    """The event files of a run's folder and of those below it, which plots of several values have.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._ends: dict[str, list[int]] = {}  # where each file's records end, as far as they were read

    def count(self) -> dict[str, int]:
        """Number of events in each folder that has any, by its path from the run's."""
        return {place: sum(len(self._read(path)) - 1 for path in paths) for place, paths in self._paths().items()}

    def cut(self, counts: dict[str, int]) -> None:
        """Keep the first events of each folder, so many as `counts` has it.

        A file that loses some is kept as "events.out.bak.…", which TensorBoard does not read, until the next time.
        """
        for path in chain.from_iterable(self._paths(_BACKUP).values()):
            os.remove(path)
        for place, paths in self._paths().items():
            left = counts.get(place, 0)
            for path in paths:
                ends = self._read(path)
                kept = min(left, len(ends) - 1)
                left -= kept
                if os.path.getsize(path) > ends[kept]:
                    self._shorten(path, ends[kept] if kept else 0)

    def _shorten(self, path: str, length: int) -> None:
        folder, name = os.path.split(path)
        shutil.copyfile(path, os.path.join(folder, name.replace(_PREFIX, _BACKUP)))
        self._ends.pop(path)
        if length:
            os.truncate(path, length)
        else:
            os.remove(path)

    def _paths(self, prefix: str = _PREFIX) -> dict[str, list[str]]:
        found = {}
        for folder, _, names in os.walk(self._folder):
            paths = [os.path.join(folder, name) for name in sorted(names, key=_in_turn) if name.startswith(prefix)]
            if paths:
                found[os.path.relpath(folder, self._folder)] = paths
        return found

    def _read(self, path: str) -> list[int]:
        """Where each whole record ends; the last one of a killed run may be half a record."""
        ends = self._ends.setdefault(path, [])
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            while True:
                start = ends[-1] if ends else 0
                file.seek(start)
                frame = file.read(_FRAME.size)
                if len(frame) < _FRAME.size:
                    break
                end = start + _FRAME.size + _FRAME.unpack(frame)[0] + _CHECKSUM
                if end > size:
                    break
                ends.append(end)
        return ends or [0]


def _in_turn(name: str) -> list[int | str]:
    """By what a file's name is sorted: the time it was made at, then the process's number and its own in that."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
