"""The job script of a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rondo.launch.container import interpreter, srun_options
from rondo.launch.folder import RunFolder
from rondo.launch.slurm import Script, file_pattern

WAIT_SECONDS = 60
"""How long srun lets the others go on when the first rank has ended: one may still write the
checkpoint, and after a crash the others wait for it in vain."""

# Each task becomes the rank of its number: nothing else has to be started on the nodes.
_AS_RANK = 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'


def render(
    options: argparse.Namespace, recipe: Sequence[str], folder: RunFolder, launch: str
) -> Script:
    """The script that runs `recipe` (its words) as `options` of `rondo launch slurm` say."""
    return Script(
        directives=_directives(options, folder),
        environment=_environment(options),
        command=[
            [sys.executable, "-m", "rondo.launch.job", f"--folder={folder.path}"],
            [f"--launch={launch}", f"--retries={options.retries}", *_for_job(options), "--"],
            _srun(options),
            ["sh", "-c", _AS_RANK, "rank"],
            [*interpreter(options), "-m", "rondo.pretrain", *recipe],
        ],
    )


def _processes(options: argparse.Namespace) -> int:
    return options.processes or options.gpus or 1


def _directives(options: argparse.Namespace, folder: RunFolder) -> list[str]:
    given = {
        "job-name": folder.path.name,
        "nodes": options.nodes,
        "ntasks-per-node": _processes(options),
        "gpus-per-node": options.gpus or None,
        "cpus-per-task": options.cpus,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "exclude": options.exclude or None,
        "signal": f"B:USR1@{options.grace}",
        "output": f"{file_pattern(folder.launch)}/job-%j.log",
        "open-mode": "append",
    }
    words = [f"--{key}={value}" for key, value in given.items() if value is not None]
    return [*words, "--no-requeue" if options.chain > 1 else "--requeue", *options.sbatch]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    found = {}
    if options.cpus:
        found |= {"OMP_NUM_THREADS": str(options.cpus), "SRUN_CPUS_PER_TASK": str(options.cpus)}
    if options.interface:
        found |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), options.interface)
    return found | dict(options.env)


def _for_job(options: argparse.Namespace) -> list[str]:
    words = [f"--gpus={options.gpus}", f"--memory={options.min_memory:g}"]
    if options.exclude:
        words.append(f"--exclude={options.exclude}")
    return words if options.chain > 1 else [*words, "--requeue"]


def _srun(options: argparse.Namespace) -> list[str]:
    nodes, processes = options.nodes, _processes(options)
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * processes}"]
    words += [f"--ntasks-per-node={processes}", f"--wait={WAIT_SECONDS}"]
    return [*words, *srun_options(options)]
