"""Checkpoint files: written whole or not at all, read without executing anything."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lightlite.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from lightlite.utilities import files

PathLike = str | os.PathLike[str]


def is_url(path: Any) -> bool:
    """Whether a path names a file system other than the machine's own: "memory://…", "s3://…"."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def local_path(path: PathLike) -> Path:
    """The path on this machine that a path or file:// URL names."""
    return Path(os.fspath(path).removeprefix("file://"))


def write(checkpoint: Mapping[str, Any], path: PathLike) -> None:
    """Write a checkpoint so that at any moment the file is the former one or the new one, never half of one.

    Args:
        checkpoint: Plain data and tensors: what `torch.load(weights_only=True)` reads again.
        path: A path, or a URL that fsspec knows. Missing folders are made.

    Raises:
        CheckpointError: Naming the entry that is no plain data, or what the file system said.
    """
    refuse_objects(checkpoint)
    if is_url(path):
        _write_url(checkpoint, str(path))
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise CheckpointError(f"cannot write the checkpoint {target}: there is a folder of that name")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot sync a folder, and order their renames themselves
    finally:
        os.close(handle)


def _write_url(checkpoint: Mapping[str, Any], url: str) -> None:
    import fsspec

    buffer = io.BytesIO()
    torch.save(dict(checkpoint), buffer)
    file_system, path = fsspec.core.url_to_fs(url)
    file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
    file_system.pipe_file(path, buffer.getvalue())


def refuse_objects(checkpoint: Any, where: str = "checkpoint") -> None:
    """Check that everything in a checkpoint can be read again without executing anything.

    Raises:
        CheckpointError: Naming the entry and its type.
    """
    if isinstance(checkpoint, Mapping):
        for key, value in checkpoint.items():
            refuse_objects(value, f"{where}[{key!r}]")
    elif isinstance(checkpoint, (list, tuple, set, frozenset)):
        for index, value in enumerate(checkpoint):
            refuse_objects(value, f"{where}[{index}]")
    elif not isinstance(checkpoint, _PLAIN):
        raise CheckpointError(
            f"{where} is {checkpoint!r} of type {type(checkpoint).__name__}, which a checkpoint cannot hold: it "
            "could only be "
            "read again by executing code. Keep numbers, strings, tensors, and lists and dicts of them; leave "
            "the object out with save_hyperparameters(ignore=[…]) if it is a hyper-parameter"
        )


_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.Size,
)


def read(path: PathLike | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Nothing in the file is executed.

    Args:
        path: A path, a URL that fsspec knows, or an open file.
        map_location: As for `torch.load`.

    Raises:
        CheckpointNotFoundError: Where there is no such file; lists the checkpoints beside it.
        CorruptCheckpointError: Where it is truncated, damaged, or no checkpoint.
        CheckpointError: Where it holds objects that only executing code could restore.
    """
    if hasattr(path, "read"):
        return _load(path, "the open file", map_location)
    if is_url(path):
        import fsspec

        try:
            with fsspec.open(str(path), "rb") as file:
                return _load(io.BytesIO(file.read()), str(path), map_location)
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"there is no checkpoint at {path}") from None
    source = local_path(path)
    if source.is_dir():
        raise CheckpointError(f"{source} is a folder, not a checkpoint file")
    require(source)
    try:
        with source.open("rb") as file:
            return _load(file, str(source), map_location)
    except PermissionError:
        raise CheckpointError(f"the checkpoint {source} may not be read by this user") from None


def _load(file: Any, name: str, map_location: Any) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        file.seek(0)
        sound = zipfile.is_zipfile(file)
        if sound and "Weights only load failed" in str(error):
            raise CheckpointError(
                f"{name} holds objects that only executing code could restore, which is never done: "
                f"{_reason(error)}. If you "
                "trust the file, load it once by torch.load(weights_only=False) and save it again without them"
            ) from None
        raise CorruptCheckpointError(
            f"{name} is truncated, damaged, or no checkpoint at all ({type(error).__name__}: {_reason(error)})"
        ) from None
    if not isinstance(checkpoint, dict):
        raise CorruptCheckpointError(f"{name} holds a {type(checkpoint).__name__}, not a checkpoint's dict")
    return checkpoint


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = next(
        (line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line), lines[0] if lines else ""
    )
    return chosen[:300]


def require(path: PathLike) -> None:
    """Check that there is a checkpoint at a path or URL.

    Raises:
        CheckpointNotFoundError: Listing the checkpoints beside it.
    """
    if files.exists(path):
        return
    folder = local_path(path).parent
    beside = [name for name in files.names_in(folder) if name.endswith(".ckpt")]
    hint = f"; beside it are {', '.join(beside[:8])}" if beside else ""
    raise CheckpointNotFoundError(f"there is no checkpoint at {path}{hint}")


def modified(path: PathLike) -> float:
    """When a file was last written, in seconds since the epoch; for comparing files of one file system."""
    if not is_url(path):
        return local_path(path).stat().st_mtime
    import fsspec

    file_system, inner = fsspec.core.url_to_fs(str(path))
    written = file_system.modified(inner)
    return float(written.timestamp())
