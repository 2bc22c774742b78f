"""The job script: every option is in it, and nothing in it means more than it says."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from rondo.launch.folder import RunFolder
from rondo.launch.options import parse_launch
from rondo.launch.slurm import submissions
from rondo.launch.slurm_script import render

pytestmark = pytest.mark.quick
NASTY = "a 'b' \"c\" $HOME `id` \\ #d; e&"


def script(*words: str, name: str = "tiny", overrides: tuple[str, ...] = ()) -> str:
    options, _ = parse_launch(["slurm", "tiny", *words])
    return str(render(options, ["tiny", *overrides], RunFolder(Path("runs") / name), "id"))


def directives(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert text.index("#SBATCH") < text.index("exec"), "sbatch reads no directives after commands"
    return [word for line in lines for word in shlex.split(line)[1:]]


def words(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the script starts, when bash has run it."""
    seen = tmp_path / "seen.json"
    recorder = tmp_path / "it's a python"
    recorder.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {shlex.quote(str(seen))}\n")
    recorder.chmod(0o755)
    head, _, rest = text.partition("exec ")
    first = shlex.split(rest)[0]
    text = head + "exec " + rest.replace(shlex.quote(first), shlex.quote(str(recorder)), 1)
    subprocess.run(["bash", "-euc", text], check=True, env={"HOME": "/h", "PATH": os.defpath})
    return seen.read_bytes().decode().split("\0")[:-1]


def test_directives_of_every_option() -> None:
    text = script(
        *("--nodes", "16", "--gpus", "8", "--cpus", "12", "--partition", "gpu", "--qos", "high"),
        *("--account", "lab", "--time", "1-00:00:00", "--grace", "300", "--exclude", "n[3,7]"),
        "--sbatch=--constraint=h100&ib",
    )
    assert directives(text) == [
        *("--job-name=tiny", "--nodes=16", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("--cpus-per-task=12", "--partition=gpu", "--account=lab", "--qos=high"),
        *("--time=1-00:00:00", "--exclude=n[3,7]", "--signal=B:USR1@300"),
        *("--output=runs/tiny/launch/job-%j.log", "--open-mode=append", "--requeue"),
        "--constraint=h100&ib",
    ]
    assert "--ntasks=128 --ntasks-per-node=8 --wait=60" in text
    assert "--gpus=8 --memory=4 '--exclude=n[3,7]' --requeue -- " in text
    assert "export OMP_NUM_THREADS=12" in text


def test_what_was_not_asked_for_is_left_to_the_site() -> None:
    found = directives(script())
    for option in ("partition", "account", "qos", "time", "gpus-per-node", "cpus-per-task"):
        assert not any(word.startswith(f"--{option}") for word in found)


def test_a_chain_does_not_requeue() -> None:
    text = script("--chain", "3")
    assert "--no-requeue" in directives(text)
    assert "--requeue" not in shlex.split(text.partition("exec ")[2])
    assert submissions("job.sh", 3) == [
        ["sbatch", "--parsable", "job.sh"],
        ["sbatch", "--parsable", "--dependency=afterany:JOB", "job.sh"],
        ["sbatch", "--parsable", "--dependency=afterany:JOB", "job.sh"],
    ]


def test_everything_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = script(
        *("--env", f"A={NASTY}", "--container", NASTY, "--python", NASTY, "--partition", NASTY),
        name=NASTY + "%j",
        overrides=("--model.pattern", NASTY),
    )
    assert f"--partition={NASTY}" in directives(text)
    assert f"--job-name={NASTY}%j" in directives(text)
    assert f"--output=runs/{NASTY}%%j/launch/job-%j.log" in directives(text)
    found = words(text, tmp_path, monkeypatch)
    assert f"--folder=runs/{NASTY}%j" in found
    assert f"--container-image={NASTY}" in found
    assert found[-6:] == [NASTY, "-m", "rondo.pretrain", "tiny", "--model.pattern", NASTY]
    exported = next(line for line in text.splitlines() if line.startswith("export A="))
    shown = subprocess.run(
        ["bash", "-c", f"{exported}; printenv A"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == NASTY + "\n"


def test_a_task_becomes_the_rank_of_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = words(script(), tmp_path, monkeypatch)
    shell = found[found.index("sh") : found.index("rank") + 1]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    done = subprocess.run(
        [*shell, "sh", "-c", " ".join(["echo", *(f"${name}" for name in names)])],
        env={"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["5", "1", "8"]


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getcwd()
    options = ("--gpus", "2", "--container", "nvcr.io#x:y", "--mount", "/data", "--mount", "/a:/b")
    pyxis = words(script(*options), tmp_path, monkeypatch)
    assert "--container-image=nvcr.io#x:y" in pyxis
    assert f"--container-mounts={here}:{here},/data:/data,/a:/b" in pyxis
    assert f"--container-workdir={here}" in pyxis
    assert pyxis[pyxis.index("rank") + 1 :] == ["python3", "-m", "rondo.pretrain", "tiny"]
    apptainer = words(script(*options, "--runtime", "apptainer"), tmp_path, monkeypatch)
    assert not any(word.startswith("--container") for word in apptainer)
    assert apptainer[apptainer.index("rank") + 1 :] == [
        *("apptainer", "exec", f"--pwd={here}", f"--bind={here}", "--bind=/data", "--bind=/a:/b"),
        *("--nv", "nvcr.io#x:y", "python3", "-m", "rondo.pretrain", "tiny"),
    ]


def test_settings_of_the_network() -> None:
    text = script("--interface", "ib0", "--env", "NCCL_DEBUG=INFO")
    for line in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "NCCL_DEBUG=INFO"):
        assert f"\nexport {line}\n" in text
