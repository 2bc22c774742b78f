"""`rondo launch`: one way to start a recipe on this machine, with torchrun, or with SLURM."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from rondo.errors import UserError
from rondo.launch import slurm
from rondo.launch.container import facts
from rondo.launch.folder import RunFolder
from rondo.launch.lock import Lock, describe, is_alive, read_owner
from rondo.launch.options import parse_launch
from rondo.launch.ranks import (
    LocalRanks,
    TorchrunRanks,
    rank_environment,
    shell,
    torchrun,
    worker,
)
from rondo.launch.slurm_script import render
from rondo.launch.supervise import Ranks, Supervisor, say

TRAIN = "rondo.pretrain"


def main(words: Sequence[str]) -> int:
    """Runs `rondo launch` with `words`; returns its exit code: that of the run, or for SLURM 0."""
    try:
        options, overrides = parse_launch(words)
    except SystemExit:  # after --help
        return 0
    folder = RunFolder(_check(options, overrides) or run_folder(options.recipe, overrides))
    return {"local": _local, "torchrun": _torchrun, "slurm": _slurm}[options.kind](
        options, overrides, folder
    )


def _local(options: argparse.Namespace, overrides: list[str], folder: RunFolder) -> int:
    command, size = [TRAIN, options.recipe, *overrides], options.processes
    environment = _threads(size) | dict(options.env)
    if options.dry_run:
        for rank in range(size):
            variables = environment | rank_environment(rank, size, 29500)
            print(shell(worker(folder.launch / "logs" / "local.0", command), variables))
        return 0

    def begin() -> Ranks:
        return LocalRanks(command, size, folder.new_logs("local"), environment)

    return _supervise(options, folder, begin)


def _torchrun(options: argparse.Namespace, overrides: list[str], folder: RunFolder) -> int:
    if options.nodes > 1 and options.master is None:
        raise UserError(f"--nodes {options.nodes} needs --master HOST:PORT, the same on each")
    if options.node_rank >= options.nodes:
        raise UserError(f"--node-rank {options.node_rank}: there are {options.nodes} machine(s)")
    words = [f"--nnodes={options.nodes}", f"--nproc-per-node={options.processes}"]
    if options.master is None:
        words.append("--standalone")
    else:
        host, port = options.master
        words += [f"--node-rank={options.node_rank}", f"--master-addr={host}"]
        words += [f"--master-port={port}"]
    command = [TRAIN, options.recipe, *overrides]
    environment = _threads(options.processes) | dict(options.env)
    name = f"torchrun-{options.node_rank}"
    if options.dry_run:
        logs = folder.launch / "logs" / f"{name}.0"
        print(shell(torchrun(words, worker(logs, command, "--codes=FOLDER")), environment))
        return 0

    def begin() -> Ranks:
        return TorchrunRanks(words, command, folder.new_logs(name), environment)

    return _supervise(options, folder, begin)


def _supervise(options: argparse.Namespace, folder: RunFolder, begin: Callable[[], Ranks]) -> int:
    launch = _new_id()
    supervisor = Supervisor(folder, launch, begin, retries=options.retries, kind=options.kind)
    if getattr(options, "node_rank", 0) > 0:
        return supervisor.run().code
    with Lock(folder.launch / "lock"):
        folder.stop_file.unlink(missing_ok=True)
        return supervisor.run().code


def _slurm(options: argparse.Namespace, overrides: list[str], folder: RunFolder) -> int:
    launch = _new_id()
    recipe = Path(options.recipe)
    bundled = options.recipe in _bundled()
    copy = folder.launch / f"{launch}.yaml"
    words = [options.recipe if bundled else str(copy), *overrides]
    script = str(render(options, words, folder, launch))
    path = folder.launch / f"{launch}.sh"
    if options.dry_run:
        print(script, end="")
        for command in slurm.submissions(str(path), options.chain):
            print(f"# {shell(command, {})}")
        return 0
    _refuse_a_second(folder)
    folder.launch.mkdir(parents=True, exist_ok=True)
    folder.stop_file.unlink(missing_ok=True)
    if not bundled:
        shutil.copyfile(recipe, copy)  # what was submitted runs, whatever becomes of the file
    path.write_text(script)
    jobs = slurm.submit(str(path), options.chain)
    folder.record("submit", launch=launch, jobs=jobs, script=str(path), **facts(options))
    say(f"submitted {', '.join(jobs)}; logs in {folder.launch / 'logs'}")
    print(*jobs, sep="\n")
    return 0


def _refuse_a_second(folder: RunFolder) -> None:
    """Jobs would only find the run folder locked, after a night in the queue."""
    lock = folder.launch / "lock"
    owner, queue = read_owner(lock), slurm.queue()
    busy = [f"job {job} ({queue[job]})" for job in folder.jobs() if job in queue]
    if not busy and owner is not None and is_alive(owner, lock):
        busy = [describe(owner)]
    if busy:
        raise UserError(
            f"{folder.path} is taken by {', '.join(busy)}; end it first with "
            f"`rondo stop {folder.path}`"
        )


def run_folder(recipe: str, overrides: Sequence[str]) -> Path:
    """The folder that a recipe's run writes, found without reading the whole recipe.

    Raises UserError where there is no such recipe or it has no name.
    """
    text = _text(recipe)
    values = {"output_dir": "runs"}
    for key in ("name", "output_dir"):
        found = re.search(rf"^{key}[ \t]*:[ \t]+(.+?)[ \t]*(?:[ \t]#.*)?$", text, re.M)
        if found:
            values[key] = re.sub(r"^(['\"])(.*)\1$", r"\2", found[1])
        for at, word in enumerate(overrides):
            if word == f"--{key}" and at + 1 < len(overrides):
                values[key] = overrides[at + 1]
            elif word.startswith(f"--{key}="):
                values[key] = word.partition("=")[2]
    if "name" not in values:
        raise UserError(f"{recipe}: name: required key is missing, as in -- --name my-run")
    return Path(values["output_dir"]) / values["name"]


def _text(recipe: str) -> str:
    bundled = _bundled()
    if recipe in bundled:
        return bundled[recipe]
    if not os.path.isfile(recipe):
        names = ", ".join(sorted(bundled))
        raise UserError(f"{recipe}: no such recipe file (bundled recipes: {names})")
    return Path(recipe).read_text()


def _bundled() -> dict[str, str]:
    folder = resources.files("rondo") / "launch" / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in files}


def _check(options: argparse.Namespace, overrides: list[str]) -> Path | None:
    """Reads the recipe as the ranks will, where what that takes is installed; its run folder."""
    missing = [name for name in ("torch", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        say(f"the recipe is not checked: no {' and no '.join(missing)} here")
        return None
    from rondo.pretrain.parse import load_recipe

    nodes = getattr(options, "nodes", 1)
    processes = options.processes or getattr(options, "gpus", 0) or 1
    recipe = load_recipe(options.recipe, overrides, world_size=nodes * processes)
    return Path(recipe.output_dir) / recipe.name


def _threads(processes: int) -> dict[str, str]:
    """An equal share of the cores for each rank, if the caller has not said otherwise."""
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


def _new_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
