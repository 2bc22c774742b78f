"""The table of small models: what is trained on, cells that are made once, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rondo.errors import UserError
from rondo.evals.labelling import WINDOW, Fit, Lengths, Rows, fit, rows, score, vocabulary
from rondo.evals.short_tasks import TASKS, ShortTasksConfig, markdown
from rondo.evals.short_tasks import _plan as plan_of
from rondo.evals.short_tasks import main as short_tasks
from rondo.models import Decoder, ModelConfig

pytestmark = pytest.mark.quick
QUICK = ["--tasks", "parity", "--mixers", "attention", "--steps", "2", "--samples", "20"]


def config(mixer: str = "slstm", **options: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=2, dim=16, num_layers=1, pattern=[mixer], mixers={mixer: options}, ffn_dim=32
    )


def test_rows_hold_answers_beside_words() -> None:
    bits = vocabulary("parity")
    words, answers = rows("parity", 8, "train", 5, 0)
    assert words.shape == answers.shape == (5, 8)
    ones = (words == bits["1"]).cumsum(1) % 2
    assert torch.equal(answers, torch.where(ones == 1, bits["1"], bits["0"]))
    words, answers = rows("mqar_all", 3, "train", 5, 0)
    assert (answers[:, :6] == -100).all() and words.shape == (5, 9)
    for row, asked in zip(words.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[:6:2], row[1:6:2], strict=True))
        assert [pairs[key] for key in row[6:]] == asked[6:]
    for name, task in TASKS.items():  # every text ends with an answer, and every word is known
        texts = rows(task.kind or name, task.sizes[0], "test", 3, 0)
        assert not task.last or (texts.answers[:, -1] >= 0).all()


def test_training_is_repeatable_and_learns() -> None:
    plan, losses = Fit(60, batch_size=32, lr=1e-2, init_std=0.25, first=2), []
    pools = [rows("parity", 6, "train", 40, 0)]
    tell = (lambda _, x: losses.append(x), lambda _, x: None)
    models = [fit(config(num_heads=1), pools, plan, 3, say) for say in tell]
    one, two = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, two)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_weights_stay_within_their_bounds() -> None:
    plan = Fit(3, batch_size=2, lr=5.0)
    pools = [rows("parity", 6, "train", 40, 0)]
    model = fit(config("para_gru", max_recurrent=0.25), pools, plan, 0, lambda *_: None)
    recurrent = model.blocks["0"].mixer.get_parameter("recurrent")  # type: ignore[union-attr]
    assert recurrent.abs().max() == 0.25


def test_lengths_grow_with_the_steps_or_when_what_is_short_is_learnt() -> None:
    assert [Lengths(Fit(8)).at(step, 16) for step in (0, 7)] == [16, 16]
    assert [Lengths(Fit(8, first=4)).at(step, 16) for step in (0, 2, 4, 7)] == [4, 10, 16, 16]
    lengths, shown = Lengths(Fit(1000, first=4, grow_below=0.2)), []
    for step, loss in enumerate([1.0] * 40 + [0.19] * (WINDOW + 2) + [0.1] * 200):
        shown.append(lengths.at(step, 16))
        lengths.note(loss)
    assert shown[: 40 + WINDOW] == [4] * (40 + WINDOW)  # not before all of them are small
    assert shown[40 + WINDOW :][: 2 * WINDOW + 1] == [5] * WINDOW + [6] * WINDOW + [7]
    assert shown[-1] == 16


def test_short_texts_fill_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def loss(self: Decoder, words: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        seen.append(tuple(words.shape))
        return self.embedding.weight.sum()  # type: ignore[union-attr, operator]

    monkeypatch.setattr(Decoder, "loss", loss)
    pools = [rows("parity", 16, "train", 40, 0)]
    fit(config(num_heads=1), pools, Fit(3, batch_size=2, words=24, first=4), 0, lambda *_: None)
    assert seen == [(6, 4), (2, 12), (2, 16)]


def test_scores_count_answers_only() -> None:
    model = Decoder(config(), seed=0)
    words = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1]])
    likeliest = model.logits(model(words).hidden).argmax(-1)
    answers = likeliest.clone()
    answers[:, 0], answers[0, 2] = -100, 1 - likeliest[0, 2]
    assert score(model, Rows(words, answers), batch_size=2) == (5 / 6, 2 / 3)


def test_cells_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*QUICK, "--seeds", "1", "--output", str(tmp_path)]
    assert short_tasks(words) == 0
    path = tmp_path / "parity-attention-0.json"
    result = json.loads(path.read_text())
    assert list(result["accuracy"]) == ["16", "64"]
    shown = capsys.readouterr()
    assert f"| attention | {result['accuracy']['16']:.2f} | " in shown.out
    last, mean = result.pop("last"), result.pop("all")
    assert last == result["accuracy"] and mean.keys() == last.keys() and mean != last
    assert f"16: last {last['16']:.3f}, all {mean['16']:.3f}" in " ".join(shown.err.split())
    # As before last and all were kept.
    path.write_text(json.dumps({**result, "accuracy": {"16": 0.25, "64": 0.125}}))
    assert short_tasks(words) == 0  # kept, not made again
    assert "| attention | 0.25 | 0.12 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match=r"parity-attention-0\.json: made with another plan"):
        short_tasks([*words, "--steps", "3"])
    with pytest.raises(UserError, match="tasks: unknown 'party'"):
        short_tasks(["--tasks", "party", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("task", "mixer", "lr", "steps"),
    [
        ("parity", "reflecting", 3e-3, 500),
        ("parity", "reflecting+none", 3e-3, 500),
        ("parity", "mamba2/deltanet+none", 3e-3, 500),
        ("parity", "deltanet/mamba2", 1e-2, 500),
        ("mqar_all", "mamba2", 1e-2, 2000),
        ("mqar_all", "mamba2+none", 1e-2, 2000),
        ("mqar_all", "gated_deltanet/mamba2", 1e-2, 2000),
        ("mqar_all", "mamba2/gated_deltanet", 3e-3, 800),
    ],
)
def test_a_row_has_the_plan_of_its_last_mixer(task: str, mixer: str, lr: float, steps: int) -> None:
    found = plan_of(ShortTasksConfig(), TASKS[task], mixer)
    assert (found.lr, found.steps) == (lr, steps)


def test_a_task_may_be_another_length_of_a_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rondo.evals.short_tasks.TEXTS", 50)
    words = ["--mixers", "attention", "--seeds", "1", "--steps", "1", "--samples", "5"]
    tasks = ["--tasks", "parity_40,cycle_navigation_100", "--output", str(tmp_path)]
    assert short_tasks([*words, *tasks]) == 0
    head, _, guess, _ = (tmp_path / "table.md").read_text().splitlines()
    sizes = ("parity_40 40", "parity_40 128", "parity_40 256", "cycle_navigation_100 100")
    assert head == f"| mixer | {' | '.join(sizes)} |"
    assert guess == "| guess | 0.50 | 0.50 | 0.50 | 0.20 |"


def test_the_table_shows_mean_and_spread() -> None:
    found = {
        "slstm": {"parity": [{16: 1.0, 64: 0.5}, {16: 0.998, 64: 0.75}]},
        "lstm": {"parity": [{16: 0.5, 64: 0.5}]},
        "gru": {},
    }
    assert markdown(found, ["parity"], 2).splitlines()[2:] == [
        "| guess | 0.50 | 0.50 |",
        "| slstm | 1.00 | 0.62 (0.50 to 0.75) |",
        "| lstm | 0.50 [1 of 2] | 0.50 [1 of 2] |",
        "| gru |  |  |",
    ]
