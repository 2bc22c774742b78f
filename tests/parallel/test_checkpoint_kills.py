"""Killed at any instant, a run leaves a checkpoint that loads."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import time
import traceback
from pathlib import Path

import torch

from rondo.models import manifest
from rondo.parallel.checkpoint import Checkpointer, files

KILLS = 40


def _save_for_ever(folder: Path, step: int) -> None:
    """Saves every step twice, and keeps one: a kill must not find the only one half replaced."""
    weight = torch.zeros(1 << 17)
    checkpointer = Checkpointer(folder, keep=1)
    while True:
        step += 1
        for _ in range(2):
            checkpointer.save(step, {"model": {"w": weight.fill_(step)}}, {"step": step})


def _check(folder: Path) -> int:
    """Every checkpoint in sight is whole, and the newest loads; its step."""
    for step in files.steps(folder):
        problem = manifest.damage(files.step_folder(folder, step))
        if problem is not None:
            raise RuntimeError(f"step {step}: {problem}")
    checkpointer = Checkpointer(folder, keep=0, asynchronous=False)
    newest = checkpointer.newest()
    if newest is None:
        raise RuntimeError("no checkpoint is left")
    weight = torch.zeros(1 << 17)
    state = checkpointer.load(newest, {"model": {"w": weight}})
    if weight.unique().tolist() != [state["step"]] or newest.name != f"step-{state['step']:09d}":
        raise RuntimeError(f"{newest} holds {weight.unique()} and {state}")
    if hidden := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
        raise RuntimeError(f"leftovers stay: {hidden}")
    return state["step"]


def _kill_often(folder: Path, results: mp.Queue) -> None:
    """Forks writers and kills them; in a process of its own, which has started no threads."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    try:
        first = Checkpointer(folder, keep=1, asynchronous=False)
        for _ in range(2):
            began = time.monotonic()
            first.save(0, {"model": {"w": torch.zeros(1 << 17)}}, {"step": 0})
        within = max(0.08, 6 * (time.monotonic() - began))  # some saves, on a busy machine too
        newest, interrupted = 0, 0
        for _ in range(KILLS):
            child = os.fork()
            if child == 0:
                _save_for_ever(folder, newest)
            time.sleep(rng.uniform(0.0, within))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            interrupted += any(path.name.startswith(".") for path in folder.iterdir())
            newest = _check(folder)
        results.put((newest, interrupted))
    except BaseException:
        results.put(traceback.format_exc())


def test_killed_at_any_instant_the_newest_checkpoint_loads(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_kill_often, args=(tmp_path, results))
    process.start()
    try:
        outcome = results.get(timeout=50)
    finally:
        process.kill()
        process.join()
    assert not isinstance(outcome, str), outcome
    newest, interrupted = outcome
    assert newest > KILLS / 4, "writers got nowhere: the kills tested nothing"
    assert interrupted > KILLS / 4, "hardly a kill came during a save"
