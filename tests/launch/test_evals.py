"""`rondo evals watch` and the job that scores a checkpoint, with a stand-in for `rondo eval`."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.launch import eval_job, eval_start
from rondo.launch.container import facts, inherit
from rondo.launch.eval_records import EvalRecord, records, scored
from rondo.launch.evals import Watcher, main
from rondo.launch.folder import RunFolder
from rondo.launch.lock import Lock
from rondo.launch.options import parse_launch, parse_watch

pytestmark = pytest.mark.quick
FAKE = Path(__file__).with_name("fake_eval.py")


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steers the stand-in."""
    path = tmp_path / "control"
    path.mkdir()
    monkeypatch.setenv(eval_job.COMMAND, f"{sys.executable} -S {FAKE}")
    monkeypatch.setenv("RONDO_FAKE_EVAL", str(path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / ".typing"))
    monkeypatch.setattr("rondo.launch.evals._end_with_parent", lambda: None)
    monkeypatch.setattr("rondo.launch.evals._POLL_SECONDS", {"process": 0.02, "slurm": 0.02})
    return path


@pytest.fixture
def run(tmp_path: Path, control: Path) -> Path:
    """A run of 30 steps with checkpoints after 10 and 30, and one that is being written."""
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text("name: mine\nsteps: 30\n")
    (path / "metrics.jsonl").write_text("")
    for step in (10, 30):
        checkpoint(path, step)
    (path / "checkpoints" / ".step-000000020.partial").mkdir()
    return path


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:09d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("1")
    (folder / "manifest.json").write_text(json.dumps({"files": {"weights": {}}}))


def starts(control: Path) -> list[int]:
    path = control / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def watch(run: Path, *words: str) -> int:
    return main(["watch", str(run), "--tasks=a,b", *words])


def state(run: Path, step: int) -> dict:
    return EvalRecord(run, step).job


def test_every_checkpoint_is_scored_once(run: Path, control: Path) -> None:
    assert watch(run) == 0
    assert starts(control) == [10, 30]
    assert [state(run, step)["state"] for step in (10, 30)] == ["done", "done"]
    assert scored(run) == (2, 2)
    assert not [*(run / "checkpoints").glob(".*.hold")]
    assert watch(run) == 0
    assert starts(control) == [10, 30]


def test_local_files_are_handed_on(run: Path, control: Path, monkeypatch) -> None:
    (run.parent / "data").mkdir()
    monkeypatch.chdir(run.parent)
    words = ["--data-dir=data", "--text=stdlib-code", "--samples=7", "--seed=3", "--limit=5"]
    assert watch(run, "--every=0", *words) == 0
    given = json.loads((control / "words").read_text())
    assert given[given.index("--limit") :] == [
        *("--limit", "5", "--data_dir", str(run.parent / "data")),
        *("--text", "stdlib-code", "--samples", "7", "--seed", "3"),
    ]


def test_only_steps_that_are_due(run: Path, control: Path) -> None:
    assert watch(run, "--every=0") == 0
    assert starts(control) == [30]


def test_a_failure_is_tried_again_and_then_recorded(run: Path, control: Path, capfd) -> None:
    (control / "fail").write_text("1")
    assert watch(run, "--every=0", "--retries=1") == 0
    assert state(run, 30)["attempts"] == 2
    (control / "fail").write_text("9")
    assert watch(run, "--retries=1") == 1
    assert starts(control) == [30, 30, 10, 10]
    assert "exit code 3" in state(run, 10)["problem"]
    assert scored(run) == (1, 2)
    assert "step 10 has no result" in capfd.readouterr().err
    (control / "fail").unlink()
    assert watch(run) == 0  # typed again: tried again
    assert scored(run) == (2, 2)


def test_a_job_that_vanishes_is_started_again_a_few_times(run: Path) -> None:
    started = []

    class Vanishing:
        def free(self) -> bool:
            return True

        def start(self, record: EvalRecord, number: int) -> None:
            record.write("submitted", number=number, tasks=["a"], where="process")
            started.append((record.step, number))

        def alive(self, record: EvalRecord) -> bool:
            return False

        def end(self) -> None:
            pass

    options = parse_watch([str(run), "--tasks=a", "--every=0", "--retries=2"])
    Watcher(RunFolder(run), options, Vanishing()).run()
    assert started == [(30, 1), (30, 2), (30, 3)]
    assert state(run, 30)["state"] == "failed"
    assert "3 jobs in a row" in state(run, 30)["problem"]


def test_a_deleted_checkpoint_is_recorded(run: Path, control: Path) -> None:
    EvalRecord(run, 10).write("submitted", number=1, tasks=["a", "b"], where="process")
    shutil.rmtree(run / "checkpoints" / "step-000000010")
    assert watch(run) == 1
    assert "was deleted" in state(run, 10)["problem"]
    assert starts(control) == [30]


def test_a_job_holds_its_checkpoint(run: Path, control: Path) -> None:
    (control / "wait").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "rondo.launch.cli", "evals", "watch", str(run), "--tasks=a,b"],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: starts(control) == [10])
    held = sorted(path.name for path in (run / "checkpoints").glob(".*.hold"))
    assert held == [".step-000000010.hold", ".step-000000030.hold"]
    with pytest.raises(UserError, match="is held by"):
        watch(run)  # a second one would start everything twice
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert state(run, 10)["state"] == "running"
    (control / "wait").unlink()
    assert watch(run) == 0  # what was cut short goes on
    assert scored(run) == (2, 2)


def wait_for(ready, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_runs_twice_computes_once(run: Path, control: Path) -> None:
    words = [str(run), "--step=10", "--tasks=a,b", "--", "--limit", "5"]
    record = EvalRecord(run, 10)
    with Lock(record.folder / "lock"), pytest.raises(UserError, match="is held by"):
        eval_job.main(words)
    assert eval_job.main(words) == eval_job.main(words) == 0
    assert starts(control) == [10]


def test_results_must_be_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(eval_job.COMMAND, "true")
    assert eval_job.main([str(run), "--step=10", "--tasks=a", "--retries=0"]) == 1
    assert state(run, 10)["problem"].startswith("no result of a in ")


def test_slurm_jobs_are_submitted_once(run: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Also by a watcher whose predecessor died between sbatch and its record."""
    tool = "#!/bin/sh\nenv | grep -c ^SLURM_JOB >> {0}/seen\necho 7\n"
    for name, text in (("sbatch", tool.format(tmp_path)), ("squeue", "#!/bin/sh\necho 7\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert watch(run, "--where=slurm", "--child", "--partition=eval", "--gpus=1") == 0
    assert [record.submitted["job"] for record in records(run)] == ["7", "7"]
    assert (tmp_path / "seen").read_text().split() == ["0", "0"]
    script = (EvalRecord(run, 10).folder / "job.sh").read_text()
    assert "#SBATCH --partition=eval" in script and "#SBATCH --gpus=1" in script
    assert "--processes" not in script
    record = EvalRecord(run, 10)
    record.write("submitted", **{**record.submitted, "job": ""})
    assert watch(run, "--where=slurm", "--child") == 0
    assert record.submitted["job"] == "7"
    assert len((tmp_path / "seen").read_text().split()) == 2


def test_a_job_with_several_gpus_has_a_rank_for_each(run: Path) -> None:
    words = [str(run), "--tasks=a", "--where=slurm", "--gpus=4", "--cpus=32"]
    script = str(eval_start.eval_script(EvalRecord(run, 10), parse_watch(words)))
    assert "#SBATCH --nodes=1\n" in script and "#SBATCH --gpus=4\n" in script
    assert "--processes=4 --" in script and "OMP_NUM_THREADS=8" in script


def contained(run: Path, *words: str) -> list[str]:
    """The command of the script of a job."""
    given = [str(run), "--tasks=a", "--where=slurm", "--cpus=4", *words]
    options = parse_watch(given)
    inherit(options, RunFolder(run).container())
    script = str(eval_start.eval_script(EvalRecord(run, 10), options))
    return shlex.split(script.partition("exec ")[2].replace("\\\n", ""))


def test_jobs_run_in_a_container(run: Path) -> None:
    here, job = Path.cwd(), ["-m", "rondo.launch.eval_job", str(run.resolve()), "--step=10"]
    options = ("--container=img#x:y", "--mount=/data", "--mount=/a:/b")
    pyxis = contained(run, *options)
    assert pyxis[: pyxis.index("--tasks=a")] == [
        *("srun", "--nodes=1", "--ntasks=1", "--container-image=img#x:y"),
        f"--container-mounts={here}:{here},/data:/data,/a:/b",
        *(f"--container-workdir={here}", "python3", *job),
    ]
    options += ("--runtime=apptainer", "--gpus=1", "--python=/opt/python")
    apptainer = contained(run, *options)
    assert apptainer[: apptainer.index("--tasks=a")] == [
        *("apptainer", "exec", f"--pwd={here}", f"--bind={here}", "--bind=/data", "--bind=/a:/b"),
        *("--nv", "img#x:y", "/opt/python", *job),
    ]
    assert contained(run)[:2] == [sys.executable, "-m"]


def test_jobs_take_the_container_of_training(run: Path) -> None:
    launch = ["slurm", "tiny", "--container=img", "--runtime=apptainer", "--mount=/data"]
    folder = RunFolder(run)
    folder.record("submit", launch="a", jobs=["7"], **facts(parse_launch(launch)[0]))
    assert contained(run)[4:8] == ["--bind=/data", "img", "python3", "-m"]
    assert contained(run, "--mount=/more", "--python=/p")[4:8] == [
        *("--bind=/data", "--bind=/more", "img", "/p")
    ]
    here = Path.cwd()
    other = ["--container-image=other", f"--container-mounts={here}:{here}"]
    assert contained(run, "--container=other")[3:5] == other
    assert contained(run, "--container=none")[:2] == [sys.executable, "-m"]
    folder.record("submit", launch="b", jobs=["8"], **facts(parse_launch(launch[:2])[0]))
    assert contained(run)[:2] == [sys.executable, "-m"]


def test_names_of_jobs_are_those_of_one_run(run: Path) -> None:
    one, other = EvalRecord(run, 10), EvalRecord(run.parent / "other", 10)
    assert eval_start.job_name(one) != eval_start.job_name(other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["watch", "RUN"], "--tasks"),
        (["watch", "RUN", "--tasks=a,a"], "different names"),
        (["watch", "RUN", "--tasks=a", "--were=slurm"], "did you mean --where"),
        (["watch", "RUN", "--tasks=a", "--data-dir=nowhere"], "nowhere is no folder"),
        (["watch", "RUN", "--tasks=a", "--container=img"], "img: .* --where slurm"),
        (["watch", "RUN", "--tasks=a", "--runtime=docker"], "apptainer"),
        (["score"], "expected watch, got 'score'"),
    ],
)
def test_what_is_wrong_is_said(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(run) if word == "RUN" else word for word in words])
