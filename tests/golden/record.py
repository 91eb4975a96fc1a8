"""Records what a framework does: `python tests/golden/record.py --framework pytorch_lightning`.

Writes `hooks.json`, `logged.json`, `files.json` and `callbacks.json` into the folder given with `--into`, by default
this one, where Lightning's are kept as the golden data: recorded with PyTorch Lightning 2.6.6. `--framework lightlite
--into FOLDER` gives the same of lightlite; `differences.py` names where the two are not the same on purpose.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

AREAS = ("hooks", "logged", "files", "callbacks")
HERE = Path(__file__).parent


def record(framework: str, area: str) -> Any:
    """What `framework` does in an area, as plain data. Its files lie in the working directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder = importlib.import_module(f"golden.{area}")
        return recorder.record(importlib.import_module(framework))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("pytorch_lightning", "lightlite"), required=True)
    parser.add_argument("--into", type=Path, metavar="FOLDER")
    parser.add_argument("--areas", nargs="+", choices=AREAS, default=AREAS, help="by default all")
    arguments = parser.parse_args()
    if arguments.into is None and arguments.framework == "lightlite":
        parser.error("the golden data is Lightning's: give a folder for lightlite's, as in --into /tmp/recorded")
    sys.path.insert(0, str(HERE.parent))
    into = (arguments.into or HERE).resolve()
    into.mkdir(parents=True, exist_ok=True)
    for area in arguments.areas:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            recorded = record(arguments.framework, area)
            os.chdir(into)
        (into / f"{area}.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
