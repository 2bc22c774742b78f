"""Stages that cannot be are refused while the recipe is read, with the nearest that can."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.launch.cli import main
from rondo.pretrain import load_recipe
from rondo.pretrain.stages import replayed_runs, stages_of

pytestmark = pytest.mark.quick
TWO = ["--stages", "[{name: one, steps: 10}, {name: two, steps: 30, replay: {share: 0.25}}]"]


def problems(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", [*TWO, *words])
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.1.name=one"], r"stages\.1\.name: \"one\" is the name of stages\.0 already"),
        (["--stages.0.name=a/b"], r"stages\.0\.name: must be a name"),
        (["--stages.0.name=earlier"], "stands for all stages before"),
        (["--stages.1.steps=0"], r"stages\.1\.steps: must be at least 1"),
        (["--stages.1.steps=2 tokns"], r"stages\.1\.steps: expected .*; did you mean \"2 tokens"),
        (["--stages.1.replay.share=1.5"], r"replay\.share: must be from 0 to 1, got 1\.5"),
        (
            ["--stages.1.replay.share=0.5"],
            r"0\.5 of 240 samples are 120, but earlier sees 80 new ones .* at most 0\.3333",
        ),
        (["--stages.1.replay.offset=80"], r"replay\.offset: must be below the 80 samples"),
        (["--stages.1.replay.seed=-1"], r"stages\.1\.replay\.seed: must be at least 0"),
        (["--stages.1.replay.source=ome"], r"replay\.source: .*; did you mean one\?"),
        (["--stages.1.replay.source=two"], r"\"two\" does not come before this one .*: one\)"),
        (
            ["--stages.1.replay.source=[one, one]"],
            r"replay\.source: names one twice, \[\"one\", \"on",
        ),
        (
            ["--stages.1.replay.source=[., ./checkpoints/step-000000048]"],
            r"source: names one twice, .* \(a run and its checkpoints have seen the same\)",
        ),
        (["--stages.1.replay.source=[one, earlier]"], r"\"earlier\" stands alone; in a list .*one"),
        (["--stages.1.replay.source=[one, tow]"], r"source: \"tow\" is neither an earlier stage"),
        (["--stages.1.replay.source=[]"], r"replay\.source: must name a stage or a run"),
        (
            ["--stages.1.replay={source: [1]}"],
            r"source: expected text or a list, each item text, got",
        ),
        (
            ["--stages.1.replay.share=[0.1, 0.1]"],
            r"replay\.share: a list has one for each of the 1",
        ),
        (
            ["--stages.1.replay.offset=[1]"],
            r"replay\.offset: .* is of shares and offsets or of sha",
        ),
        (
            ["--stages.1.replay={source: [one, .], share: [0.4, 0.7]}"],
            r"share: must be at most 1 together, got \[0\.4, 0\.7\]",
        ),
        (
            ["--stages.1.replay={source: [one, .], share: [0.4, 0.1], offset: [80, 0]}"],
            r"offset: must be below the 80 samples of one, got 80(.|\n)*0\.4 of 240 samples are 96",
        ),
        (["--stages.0.replay.share=0.1"], r"stages\.0\.replay\.source: there is no stage before"),
        (["--stages.1.replay.order=random"], r"replay\.order: expected one of original, resh"),
        (["--stages.1.replay.shares=1"], r"unknown key, .*; did you mean stages\.1\.replay\.share"),
        (["--stages.1.data.mix=1"], r"stages\.1\.data\.mix: unknown key"),
        (["--stages.1.data.sources=[{path: x, weight: 0}]"], r"sources\.0\.weight: must be"),
        (["--stages.0.reset_step=false"], "there is no stage before the first whose schedule"),
        (
            ["--stages.1.reset_step=false", "--stages.1.schedule={name: cosine}"],
            r"stages\.1\.schedule: with reset_step false the schedule of stage \"one\" goes on",
        ),
        (
            ["--stages.1.schedule={name: cosine, warmup_steps: 31}"],
            r"stages\.1\.schedule\.warmup_steps: 31 steps of warm-up do not fit into .* 30 steps",
        ),
        (["--stages.1.schedule={name: cosin}"], r"stages\.1\.schedule\.name: .*mean cosine"),
        (
            ["--schedule.warmup_steps=11"],
            r"schedule\.warmup_steps: 11 steps of .* 10 steps \(stage \"one\"\)",
        ),
        (
            ["--stages.0.init_from=x", "--checkpoint.init_from=y"],
            r"stages\.0\.init_from: the run begins with checkpoint\.init_from \(\"y\"\) already",
        ),
    ],
)
def test_what_is_wrong_is_named(words: list[str], message: str) -> None:
    assert re.search(message, problems(*words)), problems(*words)


def test_runs_that_are_replayed_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two folders of one name, of a run that is called as a stage is, and of a checkpoint, by
    a relative path."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / name for name in ("a/base/checkpoints/step-1", "a/base", "b/base", "one")]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    checkpoint, runs = paths[0], map(str, paths[1:])
    replays = [
        f"--stages.0.replay={{source: {checkpoint.relative_to(tmp_path)}, share: 0.1}}",
        f"--stages.1.replay={{source: [{', '.join(runs)}], share: 0.1}}",
    ]
    stages = stages_of(load_recipe("tiny", [*TWO, *replays]))
    assert [*replayed_runs(stages).values()] == ["base", "base", "base 2", "run one"]


def test_stages_may_be_longer_than_the_steps_they_are_shares_of() -> None:
    load_recipe("tiny", [*TWO, "--steps=8", "--stages.0.steps=200%"])
    load_recipe("tiny", [*TWO, "--stages.0.steps=40k tokens"])


def test_plan_draws_all_stages_in_one_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "tiny", "--schedule", *TWO, "--schedule.warmup_steps=5"]
    words += ["--stages.1.schedule={name: infinite_cosine, cooldown_steps: 50%}"]
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["steps"] == 40 and [s["start"] for s in data["stages"]] == [0, 10]
    lr = dict(zip(data["step"], data["lr"], strict=True))
    assert lr[9] < 3e-4 and lr[10] == 1e-3 and lr[25] == lr[39] == pytest.approx(0.55e-3)
    assert {0, 5, 10, 25, 39} <= set(data["borders"])
    assert main([*words, "--html", str(tmp_path / "page.html")]) == 0
    assert re.search(r"10 │.*│ two", capsys.readouterr().out)
    page = (tmp_path / "page.html").read_text()
    assert ">one</text>" in page and ">two</text>" in page
