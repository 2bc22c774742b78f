"""Containers of SLURM jobs: what goes in front of a command to run it in one.

Two runtimes: pyxis, srun's plugin for enroot, takes options of srun; apptainer is a command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

RUNTIMES = ("pyxis", "apptainer")
NONE = "none"
"""The image that stands for no container."""


def add_options(add: Callable[..., object], what: str, *, inherited: bool = False) -> None:
    """Adds the options of a container, in which `what` runs, to a parser; `inherited`: what is not
    given is that of training."""
    same, default = ("that of training, none: none", None) if inherited else ("none", RUNTIMES[0])
    add(
        "--container",
        metavar="IMAGE",
        help=f"run {what} in a container of this image (default: {same})",
    )
    add(
        "--runtime",
        choices=RUNTIMES,
        default=default,
        help=f"what runs the container (default: {RUNTIMES[0]}, which is srun's plugin for enroot)",
    )
    add(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE[:TARGET]",
        help="folder that the container sees besides the working directory; can be given several "
        "times",
    )
    add(
        "--python",
        metavar="PATH",
        help=f"interpreter of {what} (default: this one; in a container python3)",
    )


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be known of a launch, for `inherit`."""
    if not options.container:
        return {}
    names = ("container", "runtime", "mount", "python")
    return {"container": {name: getattr(options, name) for name in names}}


def inherit(options: argparse.Namespace, launched: Mapping[str, Any]) -> None:
    """Completes the options of scoring by those of the launch of the run."""
    if options.container is None and launched:
        options.container = launched["container"]
        options.runtime = options.runtime or launched["runtime"]
        options.mount = [*launched["mount"], *options.mount]
        options.python = options.python or launched["python"]
    options.container = None if options.container == NONE else options.container
    options.runtime = options.runtime or RUNTIMES[0]


def srun_options(options: argparse.Namespace) -> list[str]:
    """What pyxis wants of srun; nothing without it."""
    if not options.container or options.runtime != "pyxis":
        return []
    mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(options))
    words = [f"--container-image={options.container}", f"--container-mounts={mounts}"]
    return [*words, f"--container-workdir={os.getcwd()}"]


def interpreter(options: argparse.Namespace) -> list[str]:
    """The interpreter, and apptainer in front of it."""
    python = options.python or ("python3" if options.container else sys.executable)
    if not options.container or options.runtime != "apptainer":
        return [python]
    words = ["apptainer", "exec", f"--pwd={os.getcwd()}"]
    words += [f"--bind={mount}" for mount in _mounts(options)]
    return [*words, *(["--nv"] if options.gpus else []), options.container, python]


def _mounts(options: argparse.Namespace) -> list[str]:
    return [os.getcwd(), *options.mount]
