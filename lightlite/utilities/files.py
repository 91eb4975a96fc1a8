"""The few file operations that loggers and callbacks need, on local paths and on fsspec's URLs ("s3://…")."""

from __future__ import annotations

import os
import shutil
from typing import IO, Any

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether `path` is a URL, such as "s3://bucket/folder", and not a path of this machine."""
    return "://" in os.fspath(path)


def _filesystem(url: PathLike) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(os.fspath(url))
    return filesystem, str(path)


def exists(path: PathLike) -> bool:
    """Whether there is a file or folder of that name."""
    if not is_remote(path):
        return os.path.exists(path)
    filesystem, inner = _filesystem(path)
    return bool(filesystem.exists(inner))


def make_folder(path: PathLike, exist_ok: bool = True) -> None:
    """Make a folder, and those above it.

    Raises:
        FileExistsError: Where there is one already and `exist_ok` is False.
    """
    if not is_remote(path):
        os.makedirs(path, exist_ok=exist_ok)
        return
    filesystem, inner = _filesystem(path)
    filesystem.makedirs(inner, exist_ok=exist_ok)


def names_in(folder: PathLike) -> list[str]:
    """Names of what is in a folder, sorted; empty where there is no such folder."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    filesystem, inner = _filesystem(folder)
    if not filesystem.isdir(inner):
        return []
    return sorted(os.path.basename(entry.rstrip("/")) for entry in filesystem.ls(inner, detail=False))


def remove(path: PathLike) -> None:
    """Remove a file, or a folder and all that is in it. Nothing happens where there is neither."""
    if is_remote(path):
        filesystem, inner = _filesystem(path)
        if filesystem.exists(inner):
            filesystem.rm(inner, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def open_text(path: PathLike) -> IO[str]:
    """Open a text file for reading, its line ends untouched."""
    if not is_remote(path):
        return open(path, newline="", encoding="utf-8")
    filesystem, inner = _filesystem(path)
    file: IO[str] = filesystem.open(inner, "r", newline="")
    return file


def open_file(path: PathLike, mode: str) -> IO[Any]:
    """Open a file in a mode of Python's `open`, such as "a" or "wb"; text is UTF-8."""
    encoding = None if "b" in mode else "utf-8"
    if not is_remote(path):
        return open(path, mode, encoding=encoding)
    filesystem, inner = _filesystem(path)
    file: IO[Any] = filesystem.open(inner, mode, encoding=encoding)
    return file


def write_text(path: PathLike, text: str) -> None:
    """Write a whole text file: it has the old content or the new one at any moment, where the path is local."""
    if is_remote(path):
        filesystem, inner = _filesystem(path)
        with filesystem.open(inner, "w", newline="") as file:
            file.write(text)
        return
    half_written = f"{os.fspath(path)}.tmp"
    with open(half_written, "w", newline="", encoding="utf-8") as file:
        file.write(text)
    os.replace(half_written, path)
