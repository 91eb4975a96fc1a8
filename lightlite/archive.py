"""Writes the file that `torch.save` would write, without keeping Python's other threads waiting for it.

torch lays out the archive and leaves the tensors' bytes out; they are then written from where they lie, without the
interpreter's lock, and their checksums are entered. What is not an ordinary tensor is left to torch altogether.
"""

from __future__ import annotations

import ctypes
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.serialization import skip_data

CHUNK = 2**24
LOCAL_HEADER, CENTRAL_HEADER = 30, 46


def write(content: Any, path: str) -> None:
    """Write nested dicts, lists and tuples of tensors and plain data to a file.

    Raises:
        OSError: What the file system said.
        RuntimeError: The same, from within torch.
    """
    tensors = list(_tensors(content))
    if not all(map(_is_ordinary, tensors)):
        torch.save(content, path)
        return
    # In the order in which torch numbers them, each once.
    storages = list({tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values())
    with skip_data():
        torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        records, directory = archive.infolist(), archive.start_dir
    data = [record for record in records if "/data/" in record.filename]
    if [record.file_size for record in data] != [storage.nbytes() for storage in storages]:
        torch.save(content, path)
        return
    with open(path, "rb+", buffering=0) as file:
        sums = {
            record.filename: _fill(file.fileno(), record, storage)
            for record, storage in zip(data, storages, strict=True)
        }
        _enter(file.fileno(), records, directory, sums)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.__dict__
    return plain and tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"


def _fill(handle: int, record: zipfile.ZipInfo, storage: Any) -> int:
    """Write a record's bytes into the room that was left for them; return their checksum."""
    if not storage.nbytes():
        return 0
    kept = storage.cpu()
    view = memoryview((ctypes.c_char * kept.nbytes()).from_address(kept.data_ptr())).cast("B")
    place, checksum = _start(handle, record), 0
    for begin in range(0, len(view), CHUNK):
        chunk = view[begin : begin + CHUNK]
        checksum = zlib.crc32(chunk, checksum)
        while chunk:
            written = os.pwrite(handle, chunk, place)
            place, chunk = place + written, chunk[written:]
    return checksum


def _start(handle: int, record: zipfile.ZipInfo) -> int:
    name, extra = struct.unpack("<HH", os.pread(handle, 4, record.header_offset + 26))
    return int(record.header_offset + LOCAL_HEADER + name + extra)


def _enter(handle: int, records: list[zipfile.ZipInfo], directory: int, sums: Mapping[str, int]) -> None:
    """Enter checksums in the archive's directory, and in what follows each record."""
    place = directory
    for record in records:
        if record.filename in sums:
            packed = struct.pack("<L", sums[record.filename])
            os.pwrite(handle, packed, place + 16)
            after = _start(handle, record) + record.file_size
            if os.pread(handle, 4, after) == b"PK\x07\x08":
                os.pwrite(handle, packed, after + 4)
        name, extra, comment = struct.unpack("<HHH", os.pread(handle, 6, place + 28))
        place += CENTRAL_HEADER + name + extra + comment
