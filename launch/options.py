"""The command lines of `rondo launch`, `status` and `stop`: what they take, and what is wrong."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from rondo.errors import UserError
from rondo.launch import container

_TIME = r"\d+(:\d+(:\d+)?)?|\d+-\d+(:\d+(:\d+)?)?"
_USAGE = """\
usage: rondo launch local|torchrun|slurm RECIPE [--option value]... [-- recipe overrides]

Starts what a recipe describes and keeps it going.
"""
_ABOUT = {
    "local": "Starts ranks on this machine and stays with them.",
    "torchrun": "Starts ranks with torchrun, on this machine or, with the same command on each, on "
    "several.",
    "slurm": "Submits jobs that start a rank a GPU with srun and go on by themselves after a time "
    "limit, a preemption, a bad node or a crash. Needs nothing but Python where it is typed.",
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are a `UserError` with the nearest option."""

    def error(self, message: str) -> NoReturn:
        word = re.sub(r"=.*", "", message.split()[-1])
        if message.startswith("unrecognized arguments: "):
            word = re.sub(r"=.*", "", message.split()[2])
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(word, known, n=1) if word not in known else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{self.prog}: {message}{hint}")


def parse_launch(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of `rondo launch`, and the overrides of the recipe behind `--`.

    Raises UserError naming what is wrong; prints help and raises SystemExit where asked to.
    """
    own, overrides = list(words), []
    if "--" in own:
        at = own.index("--")
        own, overrides = own[:at], own[at + 1 :]
    kind = own[0] if own else "--help"
    if kind in ("-h", "--help"):
        print(_USAGE, *(f"  {name:10}{about}" for name, about in _ABOUT.items()), sep="\n")
        print("\n`rondo launch slurm --help` lists the options of one.")
        raise SystemExit(0)
    if kind not in _ABOUT:
        near = difflib.get_close_matches(kind, _ABOUT, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"rondo launch: expected {', '.join(_ABOUT)}, got {kind!r}{hint}")
    options = _parser(kind).parse_args(own[1:])
    options.kind = kind
    return options, overrides


def _parser(kind: str) -> Parser:
    parser = Parser(
        prog=f"rondo launch {kind}",
        description=_ABOUT[kind],
        usage=f"rondo launch {kind} RECIPE [--option value]... [-- recipe overrides]",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a bundled recipe's name")
    parser.add_argument("--dry-run", action="store_true", help="print what would run; do nothing")
    parser.add_argument(
        "--retries",
        type=_count(0),
        default=3,
        metavar="N",
        help="failures in a row, without a new checkpoint, after which ranks start again "
        "(default: 3)",
    )
    parser.add_argument(
        "--env",
        action="append",
        type=_variable,
        default=[],
        metavar="KEY=VALUE",
        help="variable for every rank, such as NCCL_DEBUG=INFO; can be given several times",
    )
    {"local": _add_local, "torchrun": _add_torchrun, "slurm": _add_slurm}[kind](parser)
    return parser


def _add_local(parser: Parser) -> None:
    parser.add_argument(
        "--processes", type=_count(1), default=1, metavar="N", help="ranks (default: 1)"
    )


def _add_torchrun(parser: Parser) -> None:
    parser.add_argument(
        "--processes", type=_count(1), default=1, metavar="N", help="ranks a machine (default: 1)"
    )
    parser.add_argument(
        "--nodes", type=_count(1), default=1, metavar="N", help="machines (default: 1)"
    )
    parser.add_argument(
        "--node-rank",
        type=_count(0),
        default=0,
        metavar="K",
        help="which of the machines this is; 0 holds the lock of the run folder (default: 0)",
    )
    parser.add_argument(
        "--master", metavar="HOST:PORT", type=_endpoint, help="where machine 0 can be reached"
    )


def _add_slurm(parser: Parser) -> None:
    add = parser.add_argument
    add("--nodes", type=_count(1), default=1, metavar="N", help="nodes (default: 1)")
    add("--gpus", type=_count(0), default=0, metavar="N", help="GPUs a node (default: 0)")
    add("--processes", type=_count(1), metavar="N", help="ranks a node (default: one a GPU, or 1)")
    add("--cpus", type=_count(1), metavar="N", help="CPU cores a rank, and its OpenMP threads")
    add("--partition", metavar="NAME", help="partition")
    add("--account", metavar="NAME", help="account")
    add("--qos", metavar="NAME", help="quality of service")
    add("--time", type=_time, metavar="D-HH:MM:SS", help="time limit of a job")
    add(
        "--grace",
        type=_count(1),
        default=180,
        metavar="SECONDS",
        help="how long before the time limit the ranks are told to save (default: 180)",
    )
    add("--exclude", default="", metavar="NODES", help="nodes to avoid, such as n[3,7]")
    add(
        "--chain",
        type=_count(1),
        default=1,
        metavar="N",
        help="submit N jobs, each to go on after the one before, instead of one that requeues "
        "itself: for sites where jobs may not be requeued (default: 1)",
    )
    add("--interface", metavar="NAME", help="network interface for NCCL and gloo, such as ib0")
    add(
        "--min-memory",
        type=float,
        default=4.0,
        metavar="GIB",
        help="memory that must be free on a node (default: 4)",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as in --sbatch=--constraint=h100; can be given several "
        "times",
    )
    container.add_options(add, "the ranks")


def parse_watch(words: Sequence[str]) -> argparse.Namespace:
    """Options of `rondo evals watch`."""
    parser = Parser(
        prog="rondo evals watch",
        description="Scores the checkpoints of a run as they appear, in processes of this machine "
        "or SLURM jobs, until the last one has its results.",
        usage="rondo evals watch RUN --tasks A,B [--option value]...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, or the name of one under runs/")
    add("--tasks", type=_tasks, required=True, metavar="A,B", help="tasks of `rondo eval`")
    add(
        "--where",
        choices=("process", "slurm"),
        default="process",
        help="one process after the other on this machine, or a SLURM job each (default: process)",
    )
    add(
        "--every",
        type=_count(0),
        default=1,
        metavar="N",
        help="score checkpoints of steps that are multiples of N, and the last; 0: only the last "
        "(default: 1)",
    )
    add("--limit", type=_count(1), metavar="N", help="samples a task (default: all)")
    add("--batch-size", type=_count(1), metavar="N", help="of `rondo eval` (default: its own)")
    add(
        "--data-dir",
        type=_folder,
        metavar="DIR",
        help="folder with `<task>.jsonl` for lm-eval's tasks (default: the Hugging Face hub)",
    )
    add("--text", metavar="PATH", help="text for bits_per_byte, positions and needles")
    add("--samples", type=_count(1), metavar="N", help="texts of a task from a seed")
    add("--seed", type=_count(0), metavar="N", help="seeds those texts (default: 0)")
    add(
        "--retries",
        type=_count(0),
        default=2,
        metavar="N",
        help="failures of a job to bear, and as many jobs that vanish (default: 2)",
    )
    for name in ("partition", "account", "qos"):
        add(f"--{name}", metavar="NAME", help=f"SLURM: {name} of the jobs")
    add("--time", type=_time, metavar="D-HH:MM:SS", help="SLURM: time limit of a job")
    add("--gpus", type=_count(0), default=0, metavar="N", help="SLURM: GPUs a job (default: 0)")
    add("--cpus", type=_count(1), metavar="N", help="SLURM: CPU cores a job")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any option of sbatch")
    container.add_options(add, "SLURM's jobs", inherited=True)
    add("--child", action="store_true", help=argparse.SUPPRESS)  # training started it
    options = parser.parse_args(words)
    if options.container and options.where != "slurm":
        raise UserError(
            f"--container {options.container}: processes run where this command does; "
            "it is for --where slurm"
        )
    return options


def _tasks(text: str) -> list[str]:
    tasks = text.split(",")
    if "" in tasks or len({*tasks}) < len(tasks):
        raise argparse.ArgumentTypeError(f"expected different names as in A,B, got {text!r}")
    return tasks


def _folder(text: str) -> str:
    path = os.path.abspath(os.path.expanduser(text))
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is no folder")
    return path


def parse_folder(
    words: Sequence[str], command: str, about: str, text: str, default: str | None = None
) -> str:
    """The one argument of `rondo status` and `rondo stop`; `text` is its help."""
    parser = Parser(prog=f"rondo {command}", description=about, allow_abbrev=False)
    count = None if default is None else "?"
    metavar = "RUN" if default is None else "DIR"
    parser.add_argument("folder", nargs=count, default=default, metavar=metavar, help=text)
    return parser.parse_args(words).folder


def _count(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text!r}")
        return int(text)

    return number


def _variable(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def _time(text: str) -> str:
    if not re.fullmatch(_TIME, text):
        raise argparse.ArgumentTypeError(
            f"expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, got {text!r}"
        )
    return text


def _endpoint(text: str) -> tuple[str, str]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host, port
