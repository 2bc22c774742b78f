"""Stands in for `rondo eval RUN --step N --tasks A,B`, without a model.

A folder in RONDO_FAKE_EVAL takes a line a start in `starts` and the last one's words in `words`,
and says how it goes: a file `fail` with the number of starts that fail first, a file `wait` that
holds it up while it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int)
    options, _ = parser.parse_known_args()
    control = Path(os.environ["RONDO_FAKE_EVAL"])
    with (control / "starts").open("a") as file:
        file.write(f"{options.step}\n")
    (control / "words").write_text(json.dumps(sys.argv[1:]))
    name = f"step-{options.step:09d}"
    while (control / "wait").exists():
        time.sleep(0.05)
    manifest = json.loads((options.run / "checkpoints" / name / "manifest.json").read_text())
    for path in manifest["files"]:
        assert (options.run / "checkpoints" / name / path).is_file(), f"half a checkpoint: {path}"
    fail = control / "fail"
    if fail.exists() and (left := int(fail.read_text())) > 0:
        fail.write_text(str(left - 1))
        return 3
    for task in options.tasks.split(","):
        folder = options.run / "evals" / name
        folder.mkdir(parents=True, exist_ok=True)
        values = {"acc,none": 0.5, "acc_stderr,none": 0.1}
        (folder / f"{task}.json").write_text(json.dumps({"results": {task: values}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
