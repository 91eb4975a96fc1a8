"""The command line: `python -m lightlite.launch [options] script.py [args…]`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightlite.errors import MisconfigurationException

if TYPE_CHECKING:
    from lightlite.launch.agent import Launch

ENTRY = Path(__file__).with_name("entry.py")
DEFAULT_PORT = 29400
LEAST_NODE_TIMEOUT = 3.0
"""Machines give a sign of life every second."""

DESCRIPTION = "Run a training script once on every device, as the ranks of one run."
EXAMPLES = """
examples:
  %(prog)s train.py --lr 0.1                          every device of this machine
  %(prog)s --gpus 4 train.py                          four GPUs
  %(prog)s --devices 0,3 --accelerator cuda train.py  the first and the fourth
  %(prog)s --devices 2 --accelerator cpu train.py     two processes on the CPU
  %(prog)s --devices 2 -m mypackage.train --lr 0.1    a module
  %(prog)s --max-restarts 2 --log-dir logs train.py   start anew after a failure, keep the output
  %(prog)s --as-lightning train.py                    a program for PyTorch Lightning, as it is
  %(prog)s --dry-run --gpus 4 train.py                show what would run

two machines, the same line on each but for the node rank:
  %(prog)s --gpus 8 --nnodes 2 --node-rank 0 --master-addr host0 --master-port 29400 train.py
from two to four machines, which may come and go:
  %(prog)s --gpus 8 --nnodes 2:4 --max-restarts 3 --rdzv-endpoint host0:29400 --rdzv-id job7 train.py

The exit code is that of the rank that failed first, 128 + N if signal N ended it, 2 for a wrong command line.
"""


class _List(argparse.Action):
    """`--list`: print and exit, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from lightlite.registry import AcceleratorRegistry, StrategyRegistry

        width = max(map(len, [*AcceleratorRegistry, *StrategyRegistry])) + 2
        lines = ["accelerators:"]
        for name in AcceleratorRegistry:
            reason = AcceleratorRegistry.unavailable_reason(name)
            here = f"not here: {reason}" if reason else "available here"
            lines.append(f"  {name:<{width}}{'; '.join(filter(None, (AcceleratorRegistry.describe(name), here)))}")
        lines.append("strategies:")
        for name in StrategyRegistry:
            reason = StrategyRegistry.unavailable_reason(name)
            lines.append(f"  {name:<{width}}{f'not here: {reason}' if reason else StrategyRegistry.describe(name)}")
        sys.stdout.write("\n".join(lines) + "\n")
        parser.exit(0)


def build_parser(program: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=program or "python -m lightlite.launch",
        usage="%(prog)s [options] script.py [args...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_argument_group("where it runs")
    count = where.add_mutually_exclusive_group()
    count.add_argument("--gpus", metavar="N", help="run on N GPUs (CUDA, ROCm or Apple); or a list of indices: 0,3")
    count.add_argument("--devices", metavar="N", help="run on N devices; 'auto' for all (default); or a list: 0,3")
    where.add_argument("--accelerator", metavar="NAME", default="auto", help="kind of device (default: what is here)")
    where.add_argument("--list", action=_List, nargs=0, help="list accelerators and strategies, and exit")

    what = parser.add_argument_group("what it runs")
    what.add_argument("script", metavar="script.py", help="the script; its own arguments follow it")
    what.add_argument("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    form = what.add_mutually_exclusive_group()
    form.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as in python -m")
    form.add_argument("--no-python", action="store_true", help="the script is a program to be run as it is")
    what.add_argument(
        "--as-lightning",
        action="store_true",
        help="let imports of pytorch_lightning and lightning find lightlite; without further options the script is "
        "run once, and starts its ranks itself",
    )
    what.add_argument("--dry-run", action="store_true", help="print what would run where, and exit")

    several = parser.add_argument_group("several machines (the same command on each)")
    several.add_argument("--nnodes", metavar="N", type=_node_range, default=(1, 1), help="machines, or MIN:MAX")
    several.add_argument("--node-rank", metavar="N", type=int, help="which machine this is, from 0")
    several.add_argument("--master-addr", metavar="HOST", help="host name or address of machine 0")
    several.add_argument("--master-port", metavar="PORT", type=int, help=f"free port there (default: {DEFAULT_PORT})")
    several.add_argument("--rdzv-backend", metavar="NAME", help="elastic's rendezvous backend: c10d, static, etcd-v2")
    several.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet, instead of the master")
    several.add_argument("--rdzv-id", metavar="ID", default="lightlite", help="name of the run, the same on each")
    several.add_argument(
        "--join-timeout", metavar="SECONDS", type=float, default=600, help="wait so long for the other machines (600)"
    )
    several.add_argument(
        "--node-timeout", metavar="SECONDS", type=float, default=30, help="a machine silent for so long is lost (30)"
    )

    failing = parser.add_argument_group("output and failure")
    failing.add_argument("--max-restarts", metavar="N", type=int, default=0, help="start a failed run anew, N times")
    failing.add_argument(
        "--grace",
        metavar="SECONDS",
        type=float,
        default=3.0,
        help="from SIGTERM to SIGKILL (3; ranks that save get more)",
    )
    failing.add_argument("--log-dir", metavar="DIR", help="keep the ranks' output there; the next run overwrites it")
    shown = failing.add_mutually_exclusive_group()
    shown.add_argument("--tee", action="store_true", help="show every rank's output, with its rank before each line")
    shown.add_argument("--quiet", action="store_true", help="show no output, only failures (default: rank 0's output)")
    return parser


def _node_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        fewest, most = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor MIN:MAX") from None
    if not 1 <= fewest <= most:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more, and MIN not above MAX")
    return fewest, most


def choose_accelerator(name: str) -> str:
    """The accelerator meant by a name, or by one that stands for several, as "auto" does.

    Raises:
        MisconfigurationException: For an unknown name, or a device that is not here.
    """
    from lightlite.registry import AcceleratorRegistry

    members = AcceleratorRegistry.groups.get(name, (name,))
    reasons = {member: AcceleratorRegistry.unavailable_reason(member) for member in members}
    found = next((member for member, reason in reasons.items() if reason is None), None)
    if found is None:
        raise MisconfigurationException(
            f"--accelerator {name} cannot be used here: {'; '.join(map(str, reasons.values()))}; available here: "
            f"{', '.join(AcceleratorRegistry.available())}"
        )
    return found


def choose_devices(options: argparse.Namespace) -> tuple[str, list[int]]:
    """The accelerator's name and the indices of this machine's devices to run on.

    Raises:
        MisconfigurationException: Where they are not here; the message says what to type instead.
    """
    from lightlite.registry import AcceleratorRegistry

    if options.gpus is not None:
        return _choose_gpus(options.gpus, options.accelerator)
    name = choose_accelerator(options.accelerator)
    return name, AcceleratorRegistry.get(name).parse_devices(options.devices or "auto")


def _choose_gpus(asked: str, accelerator: str) -> tuple[str, list[int]]:
    from lightlite.registry import AcceleratorRegistry

    kinds = AcceleratorRegistry.groups["gpu"]
    if accelerator not in ("auto", "gpu", *kinds):
        raise MisconfigurationException(
            f"--gpus {asked} and --accelerator {accelerator} contradict each other; "
            f"use --devices {asked} --accelerator {accelerator}, or --gpus {asked} alone"
        )
    names = (accelerator,) if accelerator in kinds else kinds
    name = next((name for name in names if AcceleratorRegistry.unavailable_reason(name) is None), None)
    visible = AcceleratorRegistry.get(name).auto_device_count() if name else 0
    wanted = int(asked) if asked.isdigit() else len(asked.split(","))
    if name is None or (asked.isdigit() and wanted > visible):
        instead = f"--gpus {visible}, or --devices {wanted}" if visible else f"--devices {wanted}"
        plural = "s" if wanted != 1 else ""
        raise MisconfigurationException(
            f"--gpus {asked} asked for {wanted} GPU{plural}, {visible} {'is' if visible == 1 else 'are'} visible here; "
            f"use {instead} --accelerator cpu"
        )
    return name, AcceleratorRegistry.get(name).parse_devices(asked)


def check_script(options: argparse.Namespace) -> None:
    """Find the script, module or program before anything starts.

    Raises:
        MisconfigurationException: Saying what was looked for, and where.
    """
    script = options.script
    if options.no_python:
        if shutil.which(script) is None:
            raise MisconfigurationException(f"--no-python {script}: there is no such program in PATH")
    elif options.module:
        if PathFinder.find_spec(script.partition(".")[0], [os.getcwd(), *sys.path]) is None:
            raise MisconfigurationException(f"-m {script}: there is no such module in {os.getcwd()} or installed")
    elif not Path(script).exists():
        hint = f"; for a module, use -m {script}" if "/" not in script and not script.endswith(".py") else ""
        raise MisconfigurationException(f"there is no file {script!r} in {os.getcwd()}{hint}")


def rank_command(options: argparse.Namespace) -> tuple[str, ...]:
    """Program and arguments that each rank is started with."""
    if options.no_python:
        return (options.script, *options.args)
    return (sys.executable, "-u", str(ENTRY), *(["-m"] if options.module else []), options.script, *options.args)


def rank_environment(
    accelerator: str, devices: Sequence[int], single_machine: bool, route: str | None
) -> dict[str, str]:
    """Environment variables for the ranks, besides those that elastic sets for each.

    Args:
        accelerator: Registered name; the script takes it where it names none itself.
        devices: Index of each local rank's device.
        single_machine: Whether the ranks talk over the loopback interface.
        route: On several machines, the network interface that leads to the others; None if unknown.

    Returns:
        What is to be set; variables that the user set are left alone.
    """
    variables = {"LIGHTLITE_ACCELERATOR": accelerator, "LIGHTLITE_DEVICES": ",".join(map(str, devices))}
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        variables["OMP_NUM_THREADS"] = str(max(1, cores // len(devices)))
        variables["MKL_NUM_THREADS"] = os.environ.get("MKL_NUM_THREADS", variables["OMP_NUM_THREADS"])
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    interface = loopback if single_machine else route
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None and variable not in os.environ:
            variables[variable] = interface
    return variables


def plan(options: argparse.Namespace, local_world_size: int) -> Launch:
    """What the elastic agent of this machine is to run.

    Raises:
        MisconfigurationException: For several machines without a place to meet.
    """
    from lightlite.launch.agent import Launch
    from lightlite.launch.rendezvous import LOOPBACK_BACKEND

    fewest, most = options.nnodes
    output = "tee" if options.tee else "quiet" if options.quiet else "first"
    if most == 1:
        backend, endpoint, more = LOOPBACK_BACKEND, "", {"port": options.master_port or 0}
    else:
        backend, endpoint, more = meeting_place(options)
    return Launch(
        command=rank_command(options),
        local_world_size=local_world_size,
        min_nodes=fewest,
        max_nodes=most,
        backend=backend,
        endpoint=endpoint,
        run_id=options.rdzv_id,
        options=more,
        node_rank=options.node_rank if backend == "static" else None,
        join_timeout=options.join_timeout,
        node_timeout=options.node_timeout,
        max_restarts=options.max_restarts,
        log_dir=options.log_dir,
        output=output,
        grace=options.grace,
    )


def meeting_place(options: argparse.Namespace) -> tuple[str, str, dict[str, object]]:
    """Elastic's rendezvous backend, endpoint and further options for several machines.

    With a node rank and a fixed number of machines the ranks are numbered by it ("static"); else elastic numbers
    them, and machines may come and go ("c10d").

    Raises:
        MisconfigurationException: Where something is missing, or the node rank does not exist.
    """
    fewest, most = options.nnodes
    node_rank = options.node_rank
    if options.rdzv_endpoint is None and options.master_addr is None:
        raise MisconfigurationException(
            f"--nnodes {most} needs a place to meet: add --master-addr HOST --node-rank N, or --rdzv-endpoint HOST:PORT"
        )
    if node_rank is not None and not 0 <= node_rank < most:
        raise MisconfigurationException(f"--node-rank {node_rank} is not among 0 to {most - 1} (--nnodes {most})")
    endpoint = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port or DEFAULT_PORT}"
    if ":" not in endpoint:
        endpoint += f":{DEFAULT_PORT}"
    numbered = node_rank is not None and fewest == most and options.max_restarts == 0
    backend = options.rdzv_backend or ("static" if numbered else "c10d")
    more: dict[str, object] = {}
    if backend == "static":
        if not numbered:
            raise MisconfigurationException(
                "--rdzv-backend static needs --node-rank, a fixed --nnodes and --max-restarts 0; or use c10d"
            )
    elif backend == "c10d" and node_rank is not None and options.rdzv_endpoint is None:
        more["is_host"] = node_rank == 0
    return backend, endpoint, more


def describe(launch: Launch, variables: dict[str, str]) -> str:
    """The text of `--dry-run`."""
    accelerator, devices = variables["LIGHTLITE_ACCELERATOR"], variables["LIGHTLITE_DEVICES"].split(",")
    machines = (
        str(launch.max_nodes) if launch.min_nodes == launch.max_nodes else f"{launch.min_nodes} to {launch.max_nodes}"
    )
    lines = [f"machines: {machines}; ranks on this one: {len(devices)}"]
    for local_rank, device in enumerate(devices):
        shown = "output shown" if launch.output == "tee" else "output to a file"
        if launch.output == "first" and local_rank == 0:
            shown = "output to the terminal" if launch.max_nodes == 1 else "output to the terminal on the first machine"
        lines.append(f"  local rank {local_rank}: {accelerator} device {device}, {shown}")
    lines.append(f"command: {shlex.join(launch.command)}")
    lines.append("environment: " + " ".join(f"{name}={value}" for name, value in variables.items()))
    meeting = (
        f"{launch.endpoint} ({launch.backend})" if launch.endpoint else "a port of 127.0.0.1 that the kernel picks"
    )
    lines.append(f"the ranks meet at: {meeting}")
    if launch.max_nodes > 1:
        lines.append(
            f"other machines are waited for: {launch.join_timeout:g} s; taken for lost when silent for: "
            f"{launch.node_timeout:g} s"
        )
    lines.append(f"restarts: {launch.max_restarts}; output kept in: {launch.log_dir or 'nothing is kept'}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None for those of this process.
        program: What the help calls this program.

    Returns:
        0, or the exit code of the rank that failed first; 128 + N where signal N ended the run; 2 for a
        command line that cannot be run, in which case nothing was started.
    """
    parser = build_parser(program)
    options = parser.parse_args(argv)
    try:
        if options.max_restarts < 0 or options.grace < 0:
            raise MisconfigurationException(
                f"--max-restarts {options.max_restarts} and --grace {options.grace:g} must not be negative"
            )
        if options.join_timeout < 1 or options.node_timeout < LEAST_NODE_TIMEOUT:
            raise MisconfigurationException(
                f"--join-timeout {options.join_timeout:g} must be 1 or more, and "
                f"--node-timeout {options.node_timeout:g} must be {LEAST_NODE_TIMEOUT:g} or more"
            )
        check_script(options)
        if starts_no_ranks(parser, options):
            return run_script(options)
        accelerator, devices = choose_devices(options)
        launch = plan(options, len(devices))
    except MisconfigurationException as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    more = lightning_names() if options.as_lightning else {}
    return _launch(launch, accelerator, devices, more, options.dry_run)


def starts_no_ranks(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether `--as-lightning` is all that was asked for: then the script itself decides on its devices."""
    what = ("script", "args", "module", "no_python", "as_lightning", "dry_run")
    return options.as_lightning and all(
        value == parser.get_default(name) for name, value in vars(options).items() if name not in what
    )


def run_script(options: argparse.Namespace) -> int:
    """Become the script, as `python script.py` or `python -m script`, with Lightning's names meaning lightlite.

    Returns:
        0 for `--dry-run`; else there is nothing to return to.
    """
    python = () if options.no_python else (sys.executable, *(["-m"] if options.module else []))
    command = (*python, options.script, *options.args)
    variables = lightning_names()
    if options.dry_run:
        shown = " ".join(f"{name}={value}" for name, value in variables.items())
        sys.stdout.write(f"no ranks are started, the script does what it says\ncommand: {shlex.join(command)}\n")
        sys.stdout.write(f"environment: {shown}\n")
        return 0
    os.environ.update(variables)
    os.execvp(command[0], command)


def lightning_names() -> dict[str, str]:
    """What makes Python find lightlite under Lightning's names, in the ranks and whatever processes they start."""
    package = find_spec("lightlite.compat")
    assert package is not None
    assert package.origin is not None
    folder = str(Path(package.origin).with_name("as_lightning"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}


def _launch(
    launch: Launch, accelerator: str, devices: Sequence[int], more_variables: dict[str, str], dry_run: bool
) -> int:
    from dataclasses import replace

    from lightlite.launch import agent
    from lightlite.launch.meeting import MEETING_BACKENDS
    from lightlite.launch.network import route_to
    from lightlite.launch.node_agent import NodeAgent

    single_machine = launch.max_nodes == 1
    route = None if single_machine else route_to(launch.endpoint)
    variables = rank_environment(accelerator, devices, single_machine, route[1] if route else None)
    variables.update(more_variables)
    launch = replace(launch, local_addr=route[0] if route else None)
    if dry_run:
        sys.stdout.write(describe(launch, variables))
        return 0
    os.environ.update(variables)
    try:
        return agent.run(launch, NodeAgent if launch.backend in MEETING_BACKENDS else agent.RankAgent)
    except KeyboardInterrupt:
        return 130
