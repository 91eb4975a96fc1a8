"""Runs the programs of `side_by_side/programs` one after the other, each as the main program, and tells how each ended.

Arguments: a folder for their files, and the programs.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path

import pytorch_lightning

folder, programs = Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]
told = {"trainer": pytorch_lightning.Trainer.__module__}
for program in programs:
    own = folder / program.stem
    own.mkdir()
    sys.argv = [str(program), str(own)]
    try:
        runpy.run_path(str(program), run_name="__main__")
        told[program.stem] = ""
    except BaseException:
        told[program.stem] = traceback.format_exc()
(folder / "told.json").write_text(json.dumps(told))
