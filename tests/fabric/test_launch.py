"""`fabric.launch()` without a function: ranks that exist already, and a script that is started over on each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightlite.errors import MisconfigurationException
from lightlite.fabric import Fabric

SCRIPT = """
import sys
from lightlite.fabric import Fabric

print("begin", flush=True)
fabric = Fabric(accelerator="cpu", devices={devices})
{launch}
ranks = fabric.all_gather(fabric.global_rank).tolist()
fabric.print(ranks, sys.argv[1:], flush=True)
fabric.barrier()  # rank 1 fails only after rank 0 has printed
if "fail" in sys.argv and fabric.global_rank == 1:
    raise ValueError("on purpose")
fabric.barrier()
"""


def run(folder: Path, command: list[str], launch: str = "fabric.launch()", devices: str = "2") -> tuple[int, str, str]:
    (folder / "script.py").write_text(SCRIPT.format(launch=launch, devices=devices))
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_plain_script_is_started_over_with_its_arguments(tmp_path: Path) -> None:
    code, out, error = run(tmp_path, ["script.py", "--rate", "0.1"])
    assert (code, out.split("\n")) == (0, ["begin", "begin", "[0, 1] ['--rate', '0.1']", ""]), error
    assert "the script starts over on 2 ranks, as `" in error


def test_the_exit_code_and_the_traceback_are_those_of_the_rank_that_failed(tmp_path: Path) -> None:
    code, out, error = run(tmp_path, ["-m", "script", "fail"])
    assert code == 1
    assert "[0, 1] ['fail']" in out
    assert error.rstrip().endswith("ValueError: on purpose")


def test_ranks_of_the_command_line_take_their_places_with_or_without_launch(tmp_path: Path) -> None:
    command = ["-m", "lightlite.launch", "--accelerator", "cpu", "--devices", "2", "script.py"]
    code, out, error = run(tmp_path, command, launch="", devices='"auto"')
    assert (code, out) == (0, "begin\n[0, 1] []\n"), error
    assert "starts over" not in error


def test_the_example_scores_every_image_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "scripts" / "examples" / "own_loop.py"
    lines = []
    for devices in ("1", "2"):
        command = [sys.executable, str(example), "--accelerator", "cpu", "--devices", devices, "--epochs", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
        lines.append(done.stdout.splitlines())
    (loss, accuracy), (same_loss, same_accuracy) = lines
    assert accuracy.endswith("% of 357 images, on 1 ranks")
    assert same_accuracy == accuracy.replace("1 ranks", "2 ranks")
    assert same_loss == loss


def test_where_there_is_no_script_to_start_over_the_error_says_what_to_do() -> None:
    with pytest.raises(MisconfigurationException, match=r"call fabric\.launch\(train\), or make it a script and start"):
        Fabric(accelerator="cpu", devices=2).launch()
