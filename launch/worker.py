"""A helper process: it waits for work from the process that started it, and ends with that process.

Run as `python -m lightlite.launch.worker SOCKET PARENT FOLDER STACK`, with the descriptor of a connected socket, the
process id of the parent, the folder in which its multiprocessing keeps sockets, and the descriptor of the file that
is to show where it hangs. It never imports the parent's
main module: what it needs of that comes with the work.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import queue
import selectors
import signal
import socket
import sys
import threading

from lightlite import distributed
from lightlite.launch import messages, reports, spawning, stacks, transport
from lightlite.launch.ending import MARK
from lightlite.launch.messages import Task
from lightlite.launch.reports import Report

OWN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK", "LOCAL_RANK")
"""Environment variables in which a helper may differ from its parent."""


def main() -> None:
    """Serve one task after the other, until the parent is gone."""
    descriptor, parent, folder, stack = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
    spawning.send_by_value()
    faulthandler.enable()
    stacks.answer(stack)
    os.set_inheritable(descriptor, False)
    os.set_inheritable(stack, False)
    connection = socket.socket(fileno=descriptor)
    os.register_at_fork(after_in_child=connection.close)
    tasks: queue.SimpleQueue[tuple[Task, int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, parent, tasks), daemon=True).start()
    gc.freeze()
    while True:
        task, file = tasks.get()
        report = _serve(task, file, parent)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        try:
            messages.send(connection, report)
        except OSError:  # the parent is gone
            os.killpg(0, signal.SIGKILL)
        if report.stopped_caller:
            os.kill(parent, signal.SIGCONT)  # or it would never learn of it
        distributed.leave()
        gc.collect()


def _listen(connection: socket.socket, parent: int, tasks: queue.SimpleQueue[tuple[Task, int]]) -> None:
    """Take tasks in, and end the process group, loader workers included, once the parent is gone.

    The end of the connection tells at once. The parent's id is looked at as well, for a program that the parent
    started may have inherited its end. The guard, which does the same from outside, may be gone itself.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while os.getppid() == parent:
            if selector.select(timeout=1):
                try:
                    task, (file,) = messages.receive(connection, max_files=1)
                except EOFError:
                    break
                tasks.put((task, file))
    os.killpg(0, signal.SIGKILL)


def _serve(task: Task, file: int, parent: int) -> Report:
    try:
        _resemble_parent(task)
        try:
            function, args = transport.unpack(task.work, transport.map_private(file))
        finally:
            os.close(file)
        function(task.ranks, *args)
        return reports.of_success(task.ranks.rank)
    except BaseException as error:  # an interrupt or sys.exit ends the run as well, and the caller is told so
        return reports.of_error(task.ranks.rank, error, caller=parent)


def _resemble_parent(task: Task) -> None:
    sys.argv, sys.path[:] = task.argv, task.path
    if task.folder is not None:
        os.chdir(task.folder)
    own = {name: value for name, value in os.environ.items() if name in OWN_VARIABLES or name.startswith(MARK)}
    wanted = {**task.environ, **own}
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


if __name__ == "__main__":
    main()
