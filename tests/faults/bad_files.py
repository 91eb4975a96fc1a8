"""Makes a folder of files that are no sound checkpoint, each bad in a way of its own.

    python tests/faults/bad_files.py FOLDER

prints what lightlite says of each.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

TRUNCATIONS = 20
FLIPS = 40


class Malicious:
    """When it is unpickled, a file appears."""

    def __init__(self, evidence: Path) -> None:
        self._evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._evidence),)


def make(sound: Path, folder: Path, evidence: Path) -> dict[str, str]:
    """Write the bad files.

    Args:
        sound: A checkpoint to spoil.
        folder: Where to write; it is made.
        evidence: What appears if one of them is executed.

    Returns:
        For each file's name, a part of what is to be said of it.
    """
    folder.mkdir()
    content = sound.read_bytes()
    checkpoint = torch.load(sound, weights_only=True)
    expected: dict[str, str] = {}

    def add(name: str, says: str, data: bytes | None = None) -> Path:
        expected[name] = says
        if data is not None:
            (folder / name).write_bytes(data)
        return folder / name

    for number in range(TRUNCATIONS):
        add(f"truncated-{number}.ckpt", "truncated, damaged", content[: len(content) * number // TRUNCATIONS])
    for number, place in enumerate(random.Random(1).sample(_checked_bytes(sound), FLIPS)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        add(f"flipped-{number}.ckpt", "damaged", bytes(flipped))
    add("text.ckpt", "truncated, damaged", b"no checkpoint at all\n" * 100)
    add("pickle.ckpt", "truncated, damaged, or no checkpoint", pickle.dumps(Malicious(evidence)))
    torch.save(
        {**checkpoint, "callbacks": {"x": Malicious(evidence)}},
        add("malicious.ckpt", "only executing code could restore"),
    )
    torch.save(Malicious(evidence), add("malicious-alone.ckpt", "only executing code could restore"))
    torch.save(checkpoint["state_dict"], add("state-dict.ckpt", "has no 'state_dict'"))
    torch.save([1, 2], add("list.ckpt", "not a checkpoint's dict"))
    torch.save({**checkpoint, "lightlite": {"format": 99}}, add("future.ckpt", "newer lightlite"))
    weights = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
    torch.save(weights, add("weights-only.ckpt", "holds weights only"))
    torch.save({**checkpoint, "optimizer_states": []}, add("no-optimizer.ckpt", "the state of 0 optimizers"))
    add("folder.ckpt", "is a folder").mkdir()
    add("missing.ckpt", "there is no checkpoint")
    add("forbidden.ckpt", "may not be read", content).chmod(0)
    return expected


def _checked_bytes(path: Path) -> list[int]:
    """Places of the bytes of an archive's records: what is between them is padding, which nobody reads."""
    places: list[int] = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = record.header_offset + 30 + name + extra
            places += range(start, start + record.file_size)
    return places


def main() -> None:
    """Show what is said of each."""
    import lightlite as pl
    from lightlite import storage
    from lightlite.demos.boring_classes import BoringModel

    folder = Path(sys.argv[1])
    folder.mkdir()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(folder / "sound.ckpt")
    for name in make(folder / "sound.ckpt", folder / "bad", folder / "evidence"):
        try:
            storage.read(folder / "bad" / name)
            print(f"{name}: readable")
        except pl.errors.CheckpointError as error:
            print(f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
