"""Brings what every rank put aside to all ranks, in the order of one process, through files without names."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing.util
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import torch

from lightlite import distributed
from lightlite.distributed import Ranks
from lightlite.errors import NotSendableError
from lightlite.interfaces import OutputCollector
from lightlite.launch import messages, transport, unsendable
from lightlite.launch.blame import OtherRankFailed

CHUNK = 16 * 2**20
"""Bytes that travel between machines at a time."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TIMEOUT = 300.0
"""Seconds that a rank waits for the files of another; all have agreed to exchange them by then."""


class FileCollector(OutputCollector):
    """Writes outputs to this rank's own files, and maps the files of all ranks at the end.

    A rank has two files: tensors and arrays in one, the pickles that hold them together in the other. Neither has a
    name, so nobody else can read them and nothing is left behind, even by a kill. Between the ranks of a machine the
    open files are handed over; other machines get a copy, in chunks. What `collect` returns reads from the files
    as it is touched, so it costs no memory until then; it can be written to, which changes nothing elsewhere.

    Tensors come back on the CPU. With a single rank this is a list, and outputs stay as they are.

    Args:
        ranks: This process's place among the ranks. Ranks of one machine have consecutive numbers.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._kept: list[Any] = []
        self._files = _Files() if ranks.world_size > 1 else None
        self._count = 0

    def put(self, output: Any) -> None:
        """Set aside this rank's next output: anything that cloudpickle can pickle.

        Raises:
            NotSendableError: Naming the part of the output that cannot be pickled.
            OSError: Where the temporary folder is full, naming it.
        """
        if self._files is None:
            self._kept.append(output)
            return
        name = f"output {self._count} of rank {self._ranks.rank}"
        try:
            with self._files.complaining(f"{name} cannot be kept"):
                packed = transport.pack(output, self._files.data, outputs=True)
                pickle.dump(packed, self._files.index, protocol=5)
        except OSError:
            raise
        except Exception as error:
            raise NotSendableError(unsendable.explain({name: output}) or f"{name} cannot be sent: {error}") from error
        self._count += 1

    def collect(self) -> list[Any]:
        """All outputs: rank 0's first, rank 1's first, …, rank 0's second, … A collective call."""
        if self._files is None:
            kept, self._kept = self._kept, []
            return kept
        with self._files.complaining(f"the outputs of rank {self._ranks.rank} cannot be kept"):
            self._files.index.flush()
        counts = distributed.gather_objects(self._count)
        with contextlib.ExitStack() as opened:
            files = {self._ranks.rank: self._files}
            if self._ranks.num_nodes > 1:
                files.update(self._copy_from_other_machines(opened))
            readers = [_Reader(part) for _, part in sorted(self._exchange(files, opened).items())]
            outputs = [
                reader.read()
                for turn in range(max(counts))
                for rank, reader in enumerate(readers)
                if turn < counts[rank]
            ]
        self.close()
        return outputs

    def close(self) -> None:
        """Drop what `put` set aside. Outputs that `collect` has returned stay readable."""
        self._kept = []
        if self._files is not None:
            self._files.close()

    def _copy_from_other_machines(self, opened: contextlib.ExitStack) -> dict[int, _Files]:
        """Copies of the other machines' files, on the first rank of this machine; nothing on its other ranks."""
        assert self._files is not None
        copies: dict[int, _Files] = {}
        first = self._ranks.rank - self._ranks.local_rank
        here = range(first, first + self._ranks.local_world_size)
        for rank in range(self._ranks.world_size):
            keep = self._ranks.rank == first and rank not in here
            copy = opened.enter_context(_Files()) if keep else None
            for part in ("data", "index"):
                source = getattr(self._files, part) if rank == self._ranks.rank else None
                with contextlib.nullcontext() if copy is None else copy.complaining(f"rank {rank}'s cannot be copied"):
                    _broadcast_file(rank, source, getattr(copy, part, None))
            if copy is not None:
                copies[rank] = copy
        return copies

    def _exchange(self, files: dict[int, _Files], opened: contextlib.ExitStack) -> dict[int, _Files]:
        """Hand the open files round on this machine: all ranks' to the first one, and from there to all."""
        first = self._ranks.rank - self._ranks.local_rank
        try:
            if self._ranks.rank != first:
                return _exchange_with(distributed.gather_objects(None)[first], files, opened)
            folder, listener = _private_listener()
            try:
                with listener:
                    distributed.gather_objects(listener.getsockname())
                    return _gather_files(files, listener, self._ranks.local_world_size - 1, opened)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except (EOFError, ConnectionError, TimeoutError) as error:
            raise OtherRankFailed(f"another rank was lost while predictions were collected: {error}") from error


class _Files:
    """The two files of a rank."""

    def __init__(self, data: BinaryIO | None = None, index: BinaryIO | None = None) -> None:
        self.data = data or _unnamed_file(buffering=0)
        self.index = index or _unnamed_file(buffering=-1)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.data.close()
        # What is still to be written down is not wanted any more, and may find no room.
        with contextlib.suppress(OSError):
            self.index.close()

    @contextlib.contextmanager
    def complaining(self, what: str) -> Iterator[None]:
        """Say what is full, and how full it is, where something cannot be written."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            written = sum(os.fstat(file.fileno()).st_size for file in (self.data, self.index))
            folder = tempfile.gettempdir()
            free = shutil.disk_usage(folder).free
            raise OSError(
                error.errno,
                f"{error.strerror}: {what} in {folder}, where {_size(free)} are free and this "
                f"rank has written {_size(written)}; let the environment variable TMPDIR name a folder with more room, "
                "or return less",
            ) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _unnamed_file(buffering: int) -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile(buffering=buffering))


class _Reader:
    """Reads a rank's outputs one after the other."""

    def __init__(self, files: _Files) -> None:
        self._data = transport.map_private(files.data)
        self._index = io.BufferedReader(_FromStart(files.index.fileno()))

    def read(self) -> Any:
        return transport.unpack(pickle.load(self._index), self._data)


class _FromStart(io.RawIOBase):
    """An open file, read from its start with a position of its own: processes that share the file share its position.

    Unlike a map of the file, what was read does not count as this process's memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._position = descriptor, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _exchange_with(address: str, files: dict[int, _Files], opened: contextlib.ExitStack) -> dict[int, _Files]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT)
        connection.connect(address)
        _send_files(connection, files)
        return dict(_receive_files(connection, opened))


def _private_listener() -> tuple[str, socket.socket]:
    """A socket in a folder that only this user can enter. Its path must be short: systems allow about 100 bytes."""
    parent = multiprocessing.util.get_temp_dir()  # which is removed if this process is killed
    folder = tempfile.mkdtemp(prefix="lightlite-", dir=parent if len(parent) < 60 else "/tmp")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.join(folder, "files"))
    listener.listen(512)
    listener.settimeout(TIMEOUT)
    return folder, listener


def _gather_files(
    files: dict[int, _Files], listener: socket.socket, others: int, opened: contextlib.ExitStack
) -> dict[int, _Files]:
    connections = []
    for _ in range(others):
        connection = opened.enter_context(listener.accept()[0])
        connection.settimeout(TIMEOUT)
        connections.append(connection)
        files.update(_receive_files(connection, opened))
    for connection in connections:
        _send_files(connection, files)
    return files


def _send_files(connection: socket.socket, files: dict[int, _Files]) -> None:
    messages.send(connection, len(files))
    for rank, part in files.items():
        messages.send(connection, rank, [part.data.fileno(), part.index.fileno()])


def _receive_files(connection: socket.socket, opened: contextlib.ExitStack) -> Iterator[tuple[int, _Files]]:
    count, _ = messages.receive(connection)
    for _ in range(count):
        rank, descriptors = messages.receive(connection, max_files=2)
        yield rank, opened.enter_context(_Files(*(os.fdopen(number, "r+b", buffering=0) for number in descriptors)))


def _broadcast_file(source: int, original: BinaryIO | None, copy: BinaryIO | None) -> None:
    """Send a file from rank `source`, which has `original`, to all; those with a `copy` write it down."""
    size = distributed.broadcast_object(os.fstat(original.fileno()).st_size if original else 0, source)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        chunk = torch.empty(length, dtype=torch.uint8)
        if original is not None:
            chunk = torch.frombuffer(bytearray(os.pread(original.fileno(), length, start)), dtype=torch.uint8)
        distributed.broadcast(chunk, source)
        if copy is not None:
            rest = memoryview(cast("Any", chunk.numpy()))
            while rest:
                rest = rest[copy.write(rest) :]
    if copy is not None:
        copy.flush()
