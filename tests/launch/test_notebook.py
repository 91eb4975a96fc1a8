"""A real notebook: classes defined in its cells train on two ranks, again and again, whatever goes wrong in between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbclient.exceptions
import nbclient.util
import nbformat
import psutil
import pytest

CLASSES = """
import os, time, torch
from pathlib import Path
import lightlite as pl
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        return torch.full((4,), float(index))

class Net(pl.LightningModule):
    def __init__(self, act=lambda rank: None):
        super().__init__()
        self.net, self.act = torch.nn.Linear(4, 1), act
    def training_step(self, batch, batch_idx):
        self.act(self.global_rank)
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss, prog_bar=True)
        return loss
    def test_step(self, batch, batch_idx):
        self.log("mean", batch.mean(), batch_size=len(batch))
    def predict_step(self, batch, batch_idx):
        return batch[:, 0]
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

class Count(pl.Callback):
    batches = 0
    def on_train_batch_end(self, trainer, *args):
        self.batches += 1

def trainer(**settings):
    return pl.Trainer(devices=2, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, **settings)

def rows(**settings):
    return DataLoader(Rows(), batch_size=3, **settings)
"""


class Notebook:
    """A kernel, and the notebook whose cells it has run. The first cell defines `CLASSES`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client = nbclient.NotebookClient(
            nbformat.v4.new_notebook(), timeout=60, resources={"metadata": {"path": str(folder)}}
        )

    def __enter__(self) -> Notebook:
        self._kernel = self.client.setup_kernel()
        self._kernel.__enter__()
        self.pid = int(self.run(CLASSES + "print(os.getpid())"))
        return self

    def __exit__(self, *error: object) -> None:
        self._kernel.__exit__(*error)

    def run(self, code: str) -> str:
        """Run a cell; what it wrote to standard output."""
        cells = self.client.nb.cells
        cells.append(nbformat.v4.new_code_cell(code))
        cell = self.client.execute_cell(cells[-1], len(cells) - 1)
        return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")

    def fail(self, code: str) -> Any:
        """Run a cell that fails; its output of type "error", with `ename`, `evalue` and `traceback`."""
        with pytest.raises(nbclient.exceptions.CellExecutionError):
            self.run(code)
        return next(output for output in self.client.nb.cells[-1].outputs if output.output_type == "error")

    def family(self) -> list[psutil.Process]:
        """The kernel and all that it has started."""
        return [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]

    def when(self, name: str, act: Callable[[], object]) -> threading.Thread:
        """Call `act` once a file of that name stands in the kernel's folder."""

        def wait() -> None:
            deadline = time.monotonic() + 30
            while not (self.folder / name).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    with Notebook(tmp_path_factory.mktemp("notebook")) as notebook:
        yield notebook


def test_classes_of_cells_train_twice_test_and_predict(notebook: Notebook) -> None:
    printed = notebook.run(
        """
        count, net = Count(), Net()
        before = net.net.weight.clone()
        first = trainer(callbacks=count, enable_model_summary=False, log_every_n_steps=1)
        first.fit(net, rows())
        second = trainer(callbacks=count, enable_progress_bar=False, enable_model_summary=False)
        second.fit(net, rows())
        print()
        print(count.batches, second.global_step, bool((net.net.weight != before).any()))
        print(second.test(net, rows(), verbose=False)[0], torch.cat(second.predict(net, rows())).tolist())
        """
    )
    bar, *_, counts, values = printed.strip().split("\n")
    assert "Epoch 0/0: 100%" in bar
    assert "loss=" in bar
    assert counts == "4 2 True"
    assert values == f"{{'mean': 5.5}} {[float(index) for index in range(12)]}"


def test_a_class_defined_again_is_the_one_that_runs_on_the_helpers(notebook: Notebook) -> None:
    fit_and_tell = """
        net = Net()
        quiet = trainer(enable_progress_bar=False, enable_model_summary=False)
        print(torch.cat(quiet.predict(net, rows()))[[0, 3]].tolist())
        """
    assert notebook.run(fit_and_tell) == "[0.0, 3.0]\n"
    again = CLASSES.replace("return batch[:, 0]", "return batch[:, 0] + 100 * (1 + self.global_rank)")
    assert notebook.run(again + fit_and_tell.replace("\n        ", "\n")) == "[100.0, 203.0]\n"
    changed = "def step(self, batch, batch_idx):\n    return batch[:, 0] - 1\nNet.predict_step = step\n"
    assert notebook.run(changed + fit_and_tell.replace("\n        ", "\n")) == "[-1.0, 2.0]\n"
    notebook.run(CLASSES)


FIT = "trainer(enable_progress_bar=False, enable_model_summary=False).fit(Net({act}), rows())"
FINE = FIT.format(act="") + "\nprint('fine')"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_keeps_its_type_and_the_next_cell_fits(notebook: Notebook, rank: int) -> None:
    error = notebook.fail(
        "class Odd(Exception): pass\n"
        f"def act(rank):\n    if rank == {rank}: raise Odd(f'on rank {{rank}}')\n" + FIT.format(act="act")
    )
    assert (error.ename, error.evalue) == ("Odd", f"on rank {rank}")
    assert ("(host" in "".join(error.traceback)) == (rank == 1)
    assert notebook.run(FINE) == "fine\n"


@pytest.mark.parametrize("waits", ["in a step", "for the other rank"])
def test_the_stop_button_ends_the_cell_and_the_next_one_fits(notebook: Notebook, waits: str) -> None:
    mark = f"started {waits}".replace(" ", "-")
    sleeper = 0 if waits == "in a step" else 1
    button = notebook.when(mark, lambda: os.killpg(notebook.pid, signal.SIGINT))
    start = time.monotonic()
    error = notebook.fail(
        f"def act(rank):\n    Path({mark!r}).touch()\n    if rank == {sleeper}: time.sleep(25)\n"
        + FIT.format(act="act")
    )
    button.join()
    assert time.monotonic() - start < 12
    assert error.ename == "KeyboardInterrupt"
    assert notebook.run(FINE) == "fine\n"


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_the_end_of_a_kernel_leaves_no_process(tmp_path: Path, how: str) -> None:
    with Notebook(tmp_path) as notebook:
        notebook.run(FINE.replace("rows()", "rows(num_workers=1, persistent_workers=True)"))
        family = notebook.family()
        assert len(family) >= 2
        if how == "restart":
            nbclient.util.run_sync(notebook.client.km.restart_kernel)()
        else:
            os.kill(notebook.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
