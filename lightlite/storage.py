"""Checkpoint files and folders: written whole or not at all, read without executing anything."""

from __future__ import annotations

import ctypes
import fcntl
import io
import os
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch

from lightlite import archive, distributed, shards
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
    content = plain(checkpoint)
    if is_url(path):
        _write_url(content, str(path))
        return
    target = local_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise CheckpointError(f"cannot write the checkpoint {target}: there is a folder of that name")
    _sweep(target.parent)
    try:
        with _temporary(target) as (handle, temporary):
            archive.write(content, temporary)
            os.fsync(handle)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        raise CheckpointError(
            f"the checkpoint {target} could not be written: {error}. What was there before is there still"
        ) from error
    _sync_folder(target.parent)


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[int, str]]:
    """A file beside `target` to write to, open and locked until that is done; removed if it is not renamed."""
    while True:
        handle, path = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED)
        if _keeps(handle, path):
            break
    try:
        yield handle, path
    finally:
        os.close(handle)
        Path(path).unlink(missing_ok=True)


def _keeps(handle: int, path: str) -> bool:
    """Lock a new file or folder, after whoever sweeps has it; False, and `handle` closed, where it was swept away."""
    with suppress(OSError):  # where the file system knows no locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    if os.path.exists(path):
        return True
    os.close(handle)
    return False


def _sweep(folder: Path) -> None:
    """Remove what writers left unfinished that were killed."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error, where its writer lives
                files.remove(path)
            finally:
                os.close(handle)


def write_folder(checkpoint: dict[str, Any], path: PathLike, write: Callable[[dict[str, Any], str], None]) -> None:
    """Write a checkpoint of whose tensors each rank has a part: a folder, at any moment the former one or the new one.

    A collective call. In the folder, "meta.pt" is a checkpoint file of all that is no tensor of a module or optimizer;
    the others are `torch.distributed.checkpoint`'s.

    Args:
        checkpoint: The same nest on every rank.
        path: A path that all ranks see. Missing folders are made.
        write: Writes a nest of tensors into a folder; a collective call.

    Raises:
        CheckpointError: On every rank; naming the entry that is no plain data, or what the file system said.
    """
    if is_url(path):
        raise CheckpointError(
            f"a sharded checkpoint cannot be written to {path}: every rank writes into one folder, of a file system "
            "that all of them see; give a path, or the strategy state_dict_type='full'"
        )
    tensors, rest = shards.split(plain(checkpoint))
    target, zero = local_path(path), distributed.rank() == 0
    with _by_rank_zero(_temporary_folder(target) if zero else nullcontext("")) as temporary:
        try:
            write(tensors, temporary)
            failure = ""
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        failures = [found for found in distributed.gather_objects(failure) if found]
        if zero and not failures:
            failures = _finish_folder(rest, Path(temporary), target)
        failures = distributed.broadcast_object(failures)
    if failures:
        raise CheckpointError(
            f"the checkpoint {target} could not be written: {failures[0]}. What was there before is there still"
        )


@contextmanager
def _by_rank_zero(making: AbstractContextManager[str]) -> Iterator[str]:
    """What rank zero's context manager yields, on every rank.

    Raises:
        CheckpointError: On every rank, where it could not be made.
    """
    with ExitStack() as stack:
        try:
            found = (stack.enter_context(making), "")
        except OSError as error:
            found = ("", str(error))
        made, failure = distributed.broadcast_object(found)
        if failure:
            raise CheckpointError(f"the checkpoint could not be written: {failure}")
        yield made


@contextmanager
def _temporary_folder(target: Path) -> Iterator[str]:
    """A folder beside `target` to write into, locked until that is done; removed if it is not renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    while True:
        path = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED)
        with suppress(FileNotFoundError):  # it was swept away
            handle = os.open(path, os.O_RDONLY)
            if _keeps(handle, path):
                break
    os.chmod(path, 0o777 & ~_umask())
    try:
        yield path
    finally:
        os.close(handle)
        files.remove(path)


def _finish_folder(rest: dict[str, Any], temporary: Path, target: Path) -> list[str]:
    """Write what is no shard, and give the folder its name; what kept it from that, if anything did."""
    try:
        write({**rest, TABLE_SUM: zlib.crc32((temporary / shards.TABLE).read_bytes())}, temporary / REST)
        _sync_folder(temporary)
        if os.path.lexists(target):
            _exchange(temporary, target)
        else:
            os.rename(temporary, target)
        _sync_folder(target.parent)
    except (OSError, CheckpointError) as error:
        return [str(error)]
    return []


REST, TABLE_SUM = "meta.pt", "lightlite_table_sum"


def _exchange(first: Path, second: Path) -> None:
    """Give two files or folders one another's name, at once where the system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return
    aside = tempfile.mkdtemp(dir=first.parent, prefix=f".{second.name}.", suffix=UNFINISHED)
    os.rename(second, os.path.join(aside, "former"))
    os.rename(first, second)
    files.remove(aside)


def remove(path: PathLike) -> None:
    """Remove a checkpoint; a folder is there whole, or not at all under this name."""
    if is_url(path) or os.path.islink(local_path(path)) or not local_path(path).is_dir():
        files.remove(path)
        return
    folder = local_path(path)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}{UNFINISHED}")
    os.rename(folder, aside)
    files.remove(aside)


def open_folder(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint that `write_folder` has written, but for its shards, in whose places are `shards.Stored`.

    Raises:
        CheckpointError: Where the folder is none.
        CorruptCheckpointError: Where it is damaged, as far as that is seen without reading the shards.
    """
    folder = local_path(path)
    if not (folder / REST).is_file():
        raise CheckpointError(
            f"{folder} is a folder without a {REST}, and no sharded checkpoint of a trainer; tensors that are in it "
            "are read by torch.distributed.checkpoint"
        )
    rest = read(folder / REST)
    kept = rest.pop(TABLE_SUM, None)
    stored = shards.open_folder(folder)
    if kept is not None and kept != zlib.crc32((folder / shards.TABLE).read_bytes()):
        raise CorruptCheckpointError(f"{folder / shards.TABLE} is damaged: it does not have the checksum kept of it")
    joined: dict[str, Any] = shards.join(rest, stored)
    return joined


def _whole(value: Any, map_location: Any) -> Any:
    """A nest with the tensors that are in a folder read."""
    if isinstance(value, shards.Stored):
        return _located(value.full_tensor(), map_location)
    if isinstance(value, dict):
        return type(value)((key, _whole(item, map_location)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_whole(item, map_location) for item in value)
    return value


def _located(tensor: torch.Tensor, map_location: Any) -> Any:
    """A tensor where `torch.load` would put it."""
    if isinstance(map_location, (str, torch.device)):
        return tensor.to(map_location)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)


UNFINISHED = ".ckpt-tmp"
"""How the name of a file ends that is being written."""


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
    torch.save(checkpoint, buffer)
    file_system, path = fsspec.core.url_to_fs(url)
    file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
    file_system.pipe_file(path, buffer.getvalue())


def plain(value: Any, where: str = "checkpoint") -> Any:
    """A copy of `value` made of plain data and tensors only, which can be read again without executing anything.

    NumPy's numbers, paths, and subclasses of str, int, float, list and dict (enumerations, `defaultdict`) become what
    they stand for.

    Raises:
        CheckpointError: Naming the entry that is no plain data, and its type.
    """
    if isinstance(value, torch.Tensor):
        return _with_bytes(value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        items = {plain(key, f"a key of {where}"): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        return OrderedDict(items) if type(value) is OrderedDict else items
    if isinstance(value, (list, tuple)):
        parts = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, (set, frozenset)):
        return {plain(item, f"an item of {where}") for item in value}
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Enum):
        return plain(value.value, where)
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    raise CheckpointError(
        f"{where} is {value!r} of type {type(value).__name__}, which a checkpoint cannot hold: it could only be read "
        "again by executing code. Keep numbers, strings, tensors, and lists and dicts of them"
    )


def _with_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that torch writes so that it can be read without its device; the same one where it is that already."""
    of_torch = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return tensor if of_torch or tensor.device.type in ("cpu", "meta") else tensor.detach().cpu()


_PLAIN = {
    type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size,
}  # fmt: skip


def read(path: PathLike | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, a folder's whole. Nothing in it is executed.

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
        whole: dict[str, Any] = _whole(open_folder(source), map_location)
        return whole
    require(source)
    try:
        with source.open("rb") as file:
            return _load(file, str(source), map_location)
    except PermissionError:
        raise CheckpointError(f"the checkpoint {source} may not be read by this user") from None


def _check_sums(file: Any, name: str) -> None:
    """Compare the checksums that a zip archive keeps of its records; torch reads without doing so.

    Raises:
        CorruptCheckpointError: Naming the first record that was changed after it was written.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as opened:
            damaged = opened.testzip()
    except Exception as error:  # whatever a flipped bit makes of an archive's directory
        raise CorruptCheckpointError(f"{name} is damaged: {type(error).__name__}: {error}") from None
    if damaged is not None:
        raise CorruptCheckpointError(f"{name} is damaged: its record {damaged} does not have the checksum kept of it")


def damage(path: PathLike) -> str | None:
    """What is wrong with a checkpoint, as far as its checksums tell; None for nothing. URLs are not looked into."""
    if is_url(path):
        return None
    try:
        if local_path(path).is_dir():
            open_folder(path)
            for stored in shards.open_folder(local_path(path)).values():
                stored.check()
            return None
        with local_path(path).open("rb") as file:
            if not zipfile.is_zipfile(file):
                return f"{path} is truncated, or no checkpoint at all"
            _check_sums(file, str(path))
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def origin(path: PathLike) -> tuple[str, int]:
    """Which run of a Trainer wrote a checkpoint, and at which step; ("", -1) where it does not say."""
    try:
        file = local_path(path)
        file = file / REST if file.is_dir() else file
        read = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return str(read["lightlite"]["run"]), int(read["global_step"])
    except Exception:  # a file of whatever kind, which is somebody else's
        return "", -1


def _load(file: Any, name: str, map_location: Any) -> dict[str, Any]:
    _check_sums(file, name)
    file.seek(0)
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
    text = os.fspath(path).removeprefix("file://")
    folder = os.path.dirname(text if files.is_remote(text) else os.path.abspath(text))
    beside = [name for name in files.names_in(folder) if name.endswith(".ckpt")]
    hint = f"beside it are {', '.join(beside[:8])}" if beside else f"nor any *.ckpt in {folder}"
    raise CheckpointNotFoundError(f"there is no checkpoint at {path}; {hint}")


def exists(path: PathLike) -> bool:
    """Whether there is a file of that path or URL; a link to nowhere is none."""
    return files.exists(path)


def modified(path: PathLike) -> float:
    """When a file was last written, in seconds since the epoch; for comparing files of one file system."""
    if not is_url(path):
        return local_path(path).stat().st_mtime
    import fsspec

    file_system, inner = fsspec.core.url_to_fs(str(path))
    written = file_system.modified(inner)
    return float(written.timestamp())
