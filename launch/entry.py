"""What each rank runs: the user's script, the way Python itself would run it.

Started by its path and not as a module, so that nothing of lightlite, and no torch, is imported before the
script asks for it. It uses the standard library only.
"""

from __future__ import annotations

import faulthandler
import os
import runpy
import sys
import traceback
from types import ModuleType, TracebackType

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run `[-m] script [args…]`, and leave word of how it failed where the launcher looks for it."""
    shown_by_launcher = os.environ.pop("LIGHTLITE_FAILURE_SHOWN_BY_LAUNCHER", "") == "1"
    die_with_launcher(int(os.environ.pop("LIGHTLITE_LAUNCHER_PID", "0")))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        read_nothing()
    if not faulthandler.is_enabled():
        faulthandler.enable()
    tell_where_when_asked()
    keep_sockets_in(os.environ.pop("LIGHTLITE_SCRATCH", ""))
    sys.excepthook = hook = Hook()
    try:
        run(sys.argv[1:])
    except SystemExit as request:
        code = exit_code(request)
        if code:
            record(request, code, "")
        raise
    except KeyboardInterrupt as interrupt:
        record(interrupt, 130, "")
        sys.exit(130)
    except BaseException as error:
        users_part = strip_frames(error.__traceback__)
        text = "".join(traceback.format_exception(type(error), error, users_part))
        recorded = record(error, 1, text)
        hook.left_to_launcher = recorded and shown_by_launcher
        sys.excepthook(type(error), error, users_part)
        sys.exit(1)


def run(command: list[str]) -> None:
    """Run a script, a directory, an archive or, after "-m", a module, as `__main__` in this process."""
    sys.modules["__mp_main__"] = MainOfTheMoment("__mp_main__")
    if command[0] == "-m":
        sys.argv[:] = command[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    script = command[0]
    sys.argv[:] = command
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    if os.path.isdir(script) or script.endswith((".pyc", ".pyz", ".zip")):
        runpy.run_path(script, run_name="__main__")
        return
    path = os.path.abspath(script)
    with open(path, "rb") as source:
        code = compile(source.read(), path, "exec", dont_inherit=True)
    module = ModuleType("__main__")
    vars(module).update(__file__=path, __builtins__=sys.modules["builtins"], __annotations__={})
    sys.modules["__main__"] = module
    exec(code, vars(module))


class MainOfTheMoment(ModuleType):
    """The main module by the name under which spawned children know it.

    multiprocessing lets that name lead to what was the main module when it was imported: to this file.
    """

    def __getattr__(self, name: str) -> object:
        """What the main module has by that name."""
        return getattr(sys.modules["__main__"], name)


def die_with_launcher(launcher: int) -> None:
    """Have the kernel kill this process when its launcher is gone; where it cannot, the launcher's guard does."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if launcher and os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def tell_where_when_asked() -> None:
    """Have SIGURG write the main thread's stack beside the error file, even where the interpreter hangs."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and hasattr(faulthandler, "register"):
        import signal

        file = os.open(os.path.join(os.path.dirname(path), "stack.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        faulthandler.register(signal.SIGURG, file=file, all_threads=False)


def keep_sockets_in(folder: str) -> None:
    """Have multiprocessing keep its sockets where they are removed however this process and its children end."""
    if folder:
        from multiprocessing import current_process

        current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]


def read_nothing() -> None:
    """Give this rank an empty standard input: the terminal's belongs to the first."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)


def exit_code(request: SystemExit) -> int:
    """The code that Python will exit with."""
    if request.code is None:
        return 0
    return request.code & 0xFF if isinstance(request.code, int) else 1


def strip_frames(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is the script's own."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace


class Hook:
    """Python's way to tell of an uncaught exception, except for the one that the launcher will tell of.

    It lies beneath whatever the script or torch.distributed sets as `sys.excepthook`.
    """

    def __init__(self) -> None:
        self.left_to_launcher = False

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print the traceback, unless it is left to the launcher."""
        if not self.left_to_launcher:
            sys.__excepthook__(kind, error, trace)


def first(error: BaseException) -> BaseException:
    """The exception in whose handling the others came."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__ or error
    return error


def tell(error: BaseException) -> str:
    """An exception's type and text."""
    return f"{type(error).__name__}: {error}"


def record(error: BaseException, code: int, text: str) -> bool:
    """Write the failure to elastic's error file, in elastic's format and with the exact time.

    Returns:
        Whether the launcher will find it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    import json
    import time

    now = time.time()
    origin = tell(first(error))
    more = {"py_callstack": text, "timestamp": str(int(now)), "time": now, "exitcode": code, "origin": origin}
    message = {"message": tell(error), "extraInfo": more}
    try:
        with open(f"{path}.part", "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump({"message": message}, file)
        os.replace(f"{path}.part", path)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
