"""Runs programs under one framework, in one process, so that the framework is imported once: see `runner.Worker`.

`python worker.py FRAMEWORK` reads jobs from standard input, a line of JSON each, and answers each with a line: an empty
string, or the traceback of what went wrong.
"""

import contextlib
import json
import os
import runpy
import sys
import traceback
import warnings

import torch


def run(script, folder, ckpt_path=None, model=None):
    """Run a script in its folder; or, given `model`, only make its Model from that checkpoint, and keep the weights."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    sys.argv = [script, folder, *([] if ckpt_path is None else [ckpt_path])]
    if model is None:
        runpy.run_path(script, run_name="__main__")
        return
    made = runpy.run_path(script, run_name="program")["Model"].load_from_checkpoint(model)
    torch.save({"weights": made.state_dict(), "hparams": dict(made.hparams)}, os.path.join(folder, "loaded.pt"))


def main(answers):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        job = json.loads(line)
        trouble = ""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                run(**job)
        except BaseException:
            trouble = traceback.format_exc()
        answers.write(json.dumps(trouble) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.stdout)
