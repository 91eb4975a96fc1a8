"""lightlite imports without collecting garbage on the way, and leaves the collector as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from lightlite.importing import without_collections


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_lightlite_collects_nothing_and_what_it_made_is_not_gone_through_soon() -> None:
    printed = python(
        "import gc, torch\n"
        "def runs(): return sum(each['collections'] for each in gc.get_stats())\n"
        "before = runs()\n"
        "import lightlite\n"
        "print(runs() - before, len(gc.get_objects(0)) < 1000, gc.isenabled(), gc.get_freeze_count())"
    )
    assert printed.split() == ["0", "True", "True", "0"]


def test_whoever_disabled_the_collector_or_froze_objects_finds_them_so() -> None:
    printed = python(
        "import gc\ngc.disable()\ngc.freeze()\nfrozen = gc.get_freeze_count()\n"
        "import lightlite\nprint(gc.isenabled(), 0.9 * frozen < gc.get_freeze_count() <= frozen)"
    )
    assert printed.split() == ["False", "True"]


def test_the_collector_is_enabled_again_after_an_error() -> None:
    def fail() -> None:
        with without_collections():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_garbage_of_a_fit_is_not_kept_as_long_lived_by_the_next() -> None:
    printed = python(
        "import gc\n"
        "from lightlite import Trainer\n"
        "from lightlite.demos.boring_classes import BoringModel\n"
        "quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator='cpu')\n"
        "def fit(): Trainer(max_steps=1, **quiet).fit(BoringModel())\n"
        "fit()\n"
        "gc.collect()\n"
        "gc.disable()\n"
        "cycle = []\n"
        "cycle.append(cycle)\n"
        "fit()\n"
        "print(any(each is cycle for each in gc.get_objects(0)))\n"
    )
    assert printed.split() == ["True"]


def test_a_fit_has_torch_import_the_rest_before_the_ranks_meet() -> None:
    printed = python(
        "import sys\n"
        "from lightlite import Trainer\n"
        "from lightlite.demos.boring_classes import BoringModel\n"
        "class Watching(BoringModel):\n"
        "    def setup(self, stage): print(stage, 'torch._dynamo' in sys.modules)\n"
        "quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator='cpu')\n"
        "Trainer(max_steps=1, **quiet).validate(Watching(), verbose=False)\n"
        "Trainer(max_steps=1, **quiet).fit(Watching())\n"
    )
    assert printed.split() == ["validate", "False", "fit", "True"]
