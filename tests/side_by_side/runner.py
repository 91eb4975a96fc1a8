"""Runs the programs of this folder under Lightning and under lightlite, one import line apart."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROGRAMS = sorted(path.stem for path in (HERE / "programs").glob("*.py"))
"""Names of all programs, without `.py`."""

FRAMEWORKS = ("pytorch_lightning", "lightlite")


def has_lightning() -> bool:
    """Whether there is a Lightning to compare with; found without importing it."""
    return importlib.util.find_spec("pytorch_lightning") is not None


def run_program(name: str, framework: str, folder: Path, ckpt_path: Path | None = None) -> None:
    """Run one program, in a process of its own, so that it writes all that it writes into `folder`.

    Args:
        name: One of `PROGRAMS`.
        framework: What the program imports as `pl`: "pytorch_lightning" or "lightlite".
        folder: Is made if it is not there.
        ckpt_path: The checkpoint from which the program's (first) fit is to go on.

    Raises:
        AssertionError: Where the program fails, with its traceback.
    """
    with Worker(framework, folder.parent) as worker:
        worker.begin(name, folder, ckpt_path)
        trouble = worker.finish()
    assert not trouble, trouble


class Worker:
    """A process that runs programs under one framework, one after the other.

    Args:
        framework: What the programs import.
        folder: For the programs as they are run.
    """

    def __init__(self, framework: str, folder: Path) -> None:
        self.framework = framework
        self._sources = folder / f"programs_{framework}"
        with (folder / f"{framework}.out").open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), framework],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, name: str, folder: Path, ckpt_path: Path | None = None, model: Path | None = None) -> None:
        """Have a program run; `finish` waits for it.

        Args:
            name: One of `PROGRAMS`.
            folder: Where the program writes.
            ckpt_path: The checkpoint that its fit goes on from.
            model: Do not run the program, but make its `Model` from this checkpoint.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        job: dict[str, Any] = {"script": str(self._source(name)), "folder": str(folder)}
        job["ckpt_path"] = None if ckpt_path is None else str(ckpt_path)
        job["model"] = None if model is None else str(model)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def finish(self) -> str:
        """Wait for the program that began first of those not waited for yet; what went wrong with it, or ""."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer, f"the process that runs programs under {self.framework} died"
        trouble = json.loads(answer)
        return f"under {self.framework}:\n{trouble}" if trouble else ""

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _source(self, name: str) -> Path:
        """A copy of the program with its imports changed; made once, as a program may be reading it."""
        path = self._sources / f"{name}.py"
        if not path.exists():
            text = (HERE / "programs" / f"{name}.py").read_text()
            text = re.sub(r"^(import|from) pytorch_lightning\b", rf"\1 {self.framework}", text, flags=re.MULTILINE)
            self._sources.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path
