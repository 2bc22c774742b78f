"""`python -m rondo.tests.slurm.demonstration FOLDER`: a night on a cluster, in five minutes.

Two runs of the quickstart model on two nodes of a cluster that is this machine, each submitted by
one command, with checkpoints scored by jobs of their own. One of them is requeued in mid-run; its
losses have to be those of the other to the last bit. FOLDER then has the runs, and what
`rondo status` said in mid-run and at the end; `rondo report` makes a page of the runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rondo.launch.eval_records import EvalRecord
from rondo.tests.slurm.cluster import Cluster, missing
from rondo.tests.slurm.runs import Run

STEPS, EVERY = 120, 40
TASKS = ["bits_per_byte", "positions_2048", "recall_8"]
RECIPE = [f"--steps={STEPS}", f"--checkpoint.every={EVERY}", f"--evals.every={EVERY}"]
RECIPE += ["--evals.where=slurm", f"--evals.tasks=[{','.join(TASKS)}]", "--logging.norms_every=20"]
RECIPE += ["--evals.limit=20", "--evals.slurm.partition=main", "--evals.slurm.cpus=1"]


class Night(Run):
    """A run of the quickstart recipe."""

    seconds = 600.0

    def submit(self, name: str) -> str:
        """The one command; returns the id of its job."""
        self.name = name
        words = ["launch", "slurm", "quickstart", "--nodes=2", f"--python={sys.executable}"]
        (job,) = self.rondo(
            *words, "--time=30", "--", f"--name={name}", f"--data.folder={self.data}", *RECIPE
        ).split()
        return job

    @property
    def records(self) -> list[EvalRecord]:
        """Of the checkpoints that are to be scored."""
        return [EvalRecord(self.folder.path, step) for step in range(EVERY, STEPS + 1, EVERY)]

    def finish(self) -> None:
        """Until training and every job are done."""
        self.wait_for_outcome("done")
        for record in self.records:
            self.wait(f"{record.folder}", lambda: record.job.get("state") == "done")  # noqa: B023


def main(home: Path) -> int:
    """Runs it; the exit code is 1 if the losses differ or a result is missing."""
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    home.mkdir(parents=True)
    with Cluster() as cluster:
        straight, requeued = (Night(cluster, home, home / "data") for _ in range(2))
        straight.submit("straight")
        straight.finish()
        job = requeued.submit("requeued")
        requeued.wait_for_rows(EVERY + 10)
        cluster.run("scontrol", "requeue", job)
        requeued.wait_for("start", 2)
        requeued.wait("a running job", lambda: "RUNNING" in requeued.rondo("status"))
        (home / "status-in-mid-run.txt").write_text(requeued.rondo("status"))
        requeued.finish()
        (home / "status.txt").write_text(said := requeued.rondo("status"))
    print(said)
    starts = len(requeued.folder.events("start"))
    same = requeued.rows() == straight.rows()
    lost = [run.name for run in (straight, requeued) if any(r.missing(TASKS) for r in run.records)]
    print(
        f"{len(straight.rows())} steps; requeued has {starts} starts; losses and gradient norms ",
        end="",
    )
    print(
        "equal to the last bit" if same else "DIFFER",
        f"; results missing: {lost or 'none'}",
        sep="",
    )
    return int(not same or bool(lost) or starts != 2)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))
