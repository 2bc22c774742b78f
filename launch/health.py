"""Is this node fit for a rank? `python -m rondo.launch.health`, which srun starts on every node.

Prints one line, the node's name and what is wrong with it, and ends with 0 if nothing is.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

_ANSWER_SECONDS = 60.0


def problems(folder: Path, gpus: int, memory: float, master: str) -> list[str]:
    """What is wrong with this node.

    Args:
        folder: the run folder, which must be writable.
        gpus: GPUs it must have.
        memory: GiB that must be free.
        master: host of rank 0, whose name must resolve; so must this node's own.
    """
    found = [_resolution(name) for name in (master, socket.gethostname())]
    found += [_memory(memory), _writing(folder), _gpus(gpus)]
    return [text for text in dict.fromkeys(found) if text]


def _resolution(name: str) -> str:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return f"host name {name} does not resolve ({error})"
    return ""


def _memory(least: float) -> str:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    free = int(match[1]) / 2**20 if match else float("inf")
    return f"{free:.1f} GiB of memory free, {least:g} wanted" if free < least else ""


def _writing(folder: Path) -> str:
    probe = folder / f".health-{uuid.uuid4().hex}"
    try:
        with probe.open("wb") as file:
            file.write(b"rondo")
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return f"the run folder is not writable: {error}"
    return ""


def _gpus(wanted: int) -> str:
    if wanted == 0:
        return ""
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode != 0:
        return f"nvidia-smi: {' '.join(done.stdout.split() + done.stderr.split())}"
    found = len(done.stdout.split())
    return f"{found} GPU(s), {wanted} wanted" if found < wanted else ""


def main(argv: Sequence[str]) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m rondo.launch.health", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="run folder")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs it must have")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB that must be free")
    parser.add_argument("--master", default="localhost", help="host of rank 0")
    options = parser.parse_args(argv)
    found = problems(options.folder, options.gpus, options.memory, options.master)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    print(f"{node}\t{'; '.join(found) or 'healthy'}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
