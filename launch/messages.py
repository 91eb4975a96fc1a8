"""Objects and open files on their way between processes of one machine, over connected sockets."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightlite.distributed import Ranks
from lightlite.launch.transport import Packed

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Task:
    """To a helper: call the function that lies in the file sent along, as this rank, in surroundings like these."""

    ranks: Ranks
    work: Packed
    argv: list[str]
    path: list[str]
    folder: str | None
    environ: dict[str, str]


def send(connection: socket.socket, message: Any, files: Sequence[int] = ()) -> None:
    """Send an object that pickles, and open files along with it.

    Raises:
        OSError: Where nobody is there any more.
    """
    data = pickle.dumps(message, protocol=5)
    header = _LENGTH.pack(len(data))
    if files:
        socket.send_fds(connection, [header], list(files))
    else:
        connection.sendall(header)
    connection.sendall(data)


def receive(connection: socket.socket, max_files: int = 0) -> tuple[Any, list[int]]:
    """Wait for an object, and for the descriptors of at most `max_files` files along with it.

    Raises:
        EOFError: Where the other side is gone.
    """
    try:
        header, files, _, _ = socket.recv_fds(connection, _LENGTH.size, max_files)
        header += _exactly(connection, _LENGTH.size - len(header)) if header else b""
        if not header:
            raise EOFError("the other side closed the connection")
        for file in files:
            os.set_inheritable(file, False)
        return pickle.loads(_exactly(connection, _LENGTH.unpack(header)[0])), files
    except ConnectionError as error:
        raise EOFError(str(error)) from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, received = memoryview(data), 0
    while received < size:
        count = connection.recv_into(view[received:])
        if not count:
            raise EOFError("the other side closed the connection in the middle of a message")
        received += count
    return bytes(data)
