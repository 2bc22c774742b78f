"""Recipes: what is read, and what is said about those that cannot be."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rondo.models.config import ModelConfig, preset_names, preset_values
from rondo.pretrain.options import parse_dataclass
from rondo.pretrain.parse import RecipeError, bundled_recipes, dump_recipe, load_recipe
from rondo.pretrain.plain import read_yaml, write_yaml
from rondo.pretrain.recipe import Recipe, SourceConfig
from rondo.pretrain.validate import problems, validate


def problems_of(text: str, tmp_path: Path, *overrides: str) -> list[str]:
    """What is wrong with a recipe file of `text` (and a name, where it has none)."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text if text.startswith("name:") else f"name: x\n{text}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert str(caught.value).startswith(f"{path}: ")
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def load(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


# One mistake, and what its one message must hold: key, value, what would be right.
MISTAKES = [
    ("data: {sequence_lenght: 99}", "data.sequence_lenght", "99", "data.sequence_length?"),
    ("optimiser: {lr: 1}", "optimiser", "unknown key", "did you mean optimizer?"),
    ("lr: 0.1", "lr", "0.1", "did you mean optimizer.lr?"),
    ("sequence_lenght: 9", "sequence_lenght", "got 9", "did you mean data.sequence_length?"),
    ("zzz: 1", "zzz", "keys here:", "name, model, steps"),
    ("data: {sources: [{pth: a, path: b}]}", "data.sources.0.pth", '"a"', "data.sources.0.path?"),
    ("data: {sources: [{weight: 1}]}", "data.sources.0.path", "required key, expected text"),
    ("steps: true", "steps", "true", "a whole number"),
    ('steps: "3"', "steps", '"3"', "a whole number", "did you mean 3?"),
    ("steps: 1e3", "steps", "1000.0", "did you mean 1000?"),
    ("steps: 3.5", "steps", "3.5", "a whole number"),
    ("steps: null", "steps", "null", "a whole number"),
    ("steps: 1" + 30 * "0", "steps", "a whole number", "the largest is"),
    ("steps: " + 5000 * "9", "steps", "a whole number", "5002 characters"),
    ("optimizer: {lr: true}", "optimizer.lr", "true", "a finite number"),
    ("optimizer: {lr: 'fast'}", "optimizer.lr", '"fast"', "a finite number"),
    ("optimizer: {lr: nan}", "optimizer.lr", "nan", "a finite number"),
    ("optimizer: {lr: .nan}", "optimizer.lr", ".nan", "a finite number"),
    ("optimizer: {clip_norm: .inf}", "optimizer.clip_norm", ".inf", "a finite number"),
    ("optimizer: {lr: 1e999}", "optimizer.lr", "1e999", "a finite number"),
    ("compile: yes", "compile", '"yes"', "true or false", "did you mean true?"),
    ("compile: 1", "compile", "got 1", "did you mean true?"),
    ("output_dir: 3", "output_dir", "got 3", "text", 'did you mean "3"?'),
    ("precision: bf16", "precision", '"bf16"', "float32, bfloat16", "did you mean bfloat16?"),
    ("schedule: {decay_shape: 1-sqr}", "schedule.decay_shape", "did you mean 1-sqrt?"),
    ("optimizer: {betas: [0.9]}", "optimizer.betas", "[0.9]", "a list of 2"),
    ("model: {pattern: attention}", "model.pattern", "a list", "did you mean [attention]?"),
    ("model: {pattern: [attention, 3]}", "model.pattern.1", "got 3", "text"),
    ("model: {mixers: {attention: 3}}", "model.mixers.attention", "names with values", "got 3"),
    ("model: {mixers: {3: {}}}", "model.mixers", "names must be text", "got 3"),
    ("data: 7", "data", "keys with values", "sequence_length", "got 7"),
    ("data: [a]", "data", "keys with values", '["a"]'),
    ("evals:", "evals", "keys with values", "null"),
    # Numbers that cannot be.
    ("steps: 0", "steps", "at least 1", "got 0"),
    ("seed: -1", "seed", "at least 0", "got -1"),
    ("data: {sequence_length: 0}", "data.sequence_length", "at least 1", "got 0"),
    ("data: {sequence_length: 1000000000000}", "data.sequence_length", "at most 2147483647"),
    ("optimizer: {lr: 0}", "optimizer.lr", "above 0", "got 0"),
    ("optimizer: {lr: -1}", "optimizer.lr", "above 0", "got -1"),
    ("optimizer: {weight_decay: -1}", "optimizer.weight_decay", "0 or more", "got -1"),
    ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1", "below 1", "got 1"),
    ("schedule: {final_ratio: 1.5}", "schedule.final_ratio", "from 0 to 1", "got 1.5"),
    ("data: {validation_fraction: 1}", "data.validation_fraction", "below 1", "got 1"),
    ("steps: 9\nschedule: {warmup_steps: 10}", "schedule.warmup_steps", "10 steps", "run of 9"),
    (
        "steps: 9\nschedule: {name: wsd, warmup_steps: 5, decay_steps: 5}",
        "schedule.warmup_steps",
        "5 steps of warm-up and 5 of decay",
        "9 steps",
    ),
    (
        "steps: 100\nschedule: {name: wsd, warmup_steps: 101}",
        "schedule.warmup_steps",
        "101 steps of warm-up",
        "do not fit into a run of 100 steps",
    ),
    ("schedule: {name: wsds}", "schedule.name", "infinite_cosine", "did you mean wsd"),
    ("schedule: {warmup_steps: -1}", "schedule.warmup_steps", "at least 0", "got -1"),
    ("schedule: {warmup_steps: 1.5}", "schedule.warmup_steps", "a whole number or text", "1.5"),
    ("schedule: {warmup_steps: 5 tokns}", "schedule.warmup_steps", "5 tokns", '"5 tokens"?'),
    ("schedule: {warmup_steps: 2Btokens!}", "schedule.warmup_steps", "or a share", '"2B tokens"?'),
    ("schedule: {warmup_steps: '500'}", "schedule.warmup_steps", '"500"', "500 without quotes?"),
    ("schedule: {warmup_steps: soon}", "schedule.warmup_steps", "steps (500), tokens", '"soon"'),
    ("schedule: {warmup_steps: 101%}", "schedule.warmup_steps", "1010 steps of warm-up"),
    ("schedule: {warmup_steps: 9T steps}", "schedule.warmup_steps", "9T steps", "at most"),
    ("schedule: {peak_ratio: 0}", "schedule.peak_ratio", "above 0", "got 0"),
    ("schedule: {peak_ratio: .05}", "schedule.final_ratio", "0.05 (schedule.peak_ratio)", "0.1"),
    ("schedule: {start_ratio: 2}", "schedule.start_ratio", "from 0 to 1.0", "got 2.0"),
    ("schedule: {timescale: 0}", "schedule.timescale", "above 0", "got 0.0"),
    ("schedule: {name: infinite_cosine}", "schedule.cooldown_steps", "at least 1 step", "got 0"),
    (
        "schedule: {name: infinite_cosine, constant_ratio: 0, final_ratio: 0, cooldown_steps: 9}",
        "schedule.constant_ratio",
        "above 0",
    ),
    (
        "schedule: {name: infinite_cosine, cooldown_steps: 60%, decay_steps: 41%}",
        "schedule.warmup_steps",
        "0 steps of warm-up and 600 of cool-down and 410 of decay",
        "1000 steps",
    ),
    (
        "schedule: {name: wsd_s, decay_steps: 10, decay_ends: [100, 105]}",
        "schedule.decay_ends",
        "10 steps of decay do not fit between steps 100 and 105",
    ),
    ("schedule: {name: wsd_s, decay_ends: [0]}", "schedule.decay_ends.0", "at least 1", "got 0"),
    ("reweight: {strategy: LinUpper}", "reweight.strategy", "did you mean linupper?"),
    ("reweight: {temperature: 0}", "reweight.temperature", "above 0", "got 0.0"),
    ("reweight: {start_temperature: -1}", "reweight.start_temperature", "above 0", "got -1.0"),
    ("reweight: {clip_quantile: .5}", "reweight.clip_quantile", "below 0.5", "got 0.5"),
    (
        "reweight: {warmup_steps: 5 percent}",
        "reweight.warmup_steps",
        "5 percent",
        "a share of the run",
    ),
    ("reweight: {scope: batch}", "reweight.scope", "micro_batch, global_batch"),
    ("data: {sources: []}", "data.sources", "at least one source"),
    ("data: {sources: [{path: ''}]}", "data.sources.0.path", "empty"),
    ("data: {sources: [{path: a, weight: 0}]}", "data.sources.0.weight", "above 0", "got 0"),
    ("checkpoint: {signal: SIGUSR3}", "checkpoint.signal", "SIGUSR3", "did you mean SIGUSR"),
    ("checkpoint: {signal: SIGKILL}", "checkpoint.signal", "can be caught", "SIGKILL"),
    ("data: {tokenizer: 'sentencepiece:abc'}", "data.tokenizer", "abc", "from 300"),
    ("data: {tokenizer: 'sentencepiece:9'}", "data.tokenizer", "sentencepiece:9", "from 300"),
    ("output_dir: /proc/self/status", "output_dir", "/proc/self/status", "is a file"),
    ("data: {folder: /proc/self/status/x}", "data.folder", "/proc/self/status", "is a file"),
    ("checkpoint: {resume: atuo}", "checkpoint.resume", "atuo", "did you mean auto?"),
    ("output_dir: ''", "output_dir", "empty"),
    ("output_dir: ${HOME}/runs", "output_dir", "${HOME}/runs", "not expanded"),
    ("output_dir: 'a\0b'", "special characters"),
    ('output_dir: "a\\0b"', "output_dir", "control characters", "a\\u0000b"),
    # Models.
    ("model: {num_layers: 0}", "model.num_layers", "at least 1", "got 0"),
    ("model: {pattern: [atention]}", "model.pattern", "atention", "did you mean 'attention'?"),
    ("model: {mixers: {attention: {num_head: 2}}}", "model.mixers.attention.num_head", "num_heads"),
    ("model: {preset: gated-delta-340m}", "model.preset", "gated-deltanet-340m"),
    # YAML that is none, or more than plain data.
    ("a: [1\nb", "line", "column"),
    ("steps: 3\nsteps: 4", "line 3", "'steps' is given twice"),
    ("data: {folder: a, folder: b}", "'folder' is given twice"),
    ("seed: !!python/object/apply:os.system [ls]", "line 2", "tags are not supported"),
    ("seed: !!int '3'", "tags are not supported"),
    ("steps: &a 3\nseed: *a", "aliases (*name) are not supported"),
    ("steps: " + 50_000 * "[", "nested too deeply"),
    ("#" * 1_000_001, "limit of 1000000"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_message_with_key_value_and_what_is_right(mistake, tmp_path):
    text, *parts = mistake
    found = problems_of(text, tmp_path)
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found
    if "." in parts[0] and " " not in parts[0]:
        assert found[0].startswith(f"{parts[0]}: ")
    assert "\n" not in found[0] and len(found[0]) < 400


NAMES = ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "x" * 129, "a\nb", "a\u202eb", "\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_run_cannot_lead_out_of_its_folder(name, tmp_path):
    found = problems_of(f"name: {json.dumps(name)}", tmp_path)
    assert found and all(problem.startswith("name: ") for problem in found)
    assert all(problem.isprintable() and len(problem) < 200 for problem in found)


def test_all_mistakes_are_told_at_once(tmp_path):
    text = """
model: {dmi: 64, num_layers: 0}
stps: 3
seed: "0"
data: {sequence_length: 0, sources: [{path: a, weight: heavy}], micro_batch_size: -4}
optimizer: {name: adam, lr: -1}
precision: fp32
"""
    found = problems_of(text, tmp_path, "--optimizer.eps", "0", "--evals.every", "often", "--seeed")
    keys = {problem.partition(":")[0] for problem in found}
    assert keys == {
        *("model.dmi", "model.num_layers", "stps", "seed", "data.sequence_length"),
        *("data.sources.0.weight", "data.micro_batch_size", "optimizer.name", "optimizer.lr"),
        *("precision", "optimizer.eps", "evals.every", "seeed"),
    }
    assert len(found) == len(keys)


def test_a_mistyped_value_is_not_judged_by_its_default(tmp_path):
    found = problems_of("data: {global_batch_size: '32', micro_batch_size: 32}", tmp_path)
    assert [problem.partition(":")[0] for problem in found] == ["data.global_batch_size"]


def test_a_recipe_needs_a_name(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text in ("", "# nothing", "steps: 3"):
        path.write_text(text)
        with pytest.raises(RecipeError, match="name: required key, expected text"):
            load_recipe(path)
    path.write_text("- a\n- b")
    with pytest.raises(RecipeError, match="expected keys with values, got "):
        load_recipe(path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: "):
        load_recipe(path)


def test_overrides_of_every_kind(tmp_path):
    text = "name: x\nmodel: {mixers: {attention: {window: 64}}}\ndata: {sources: [{path: a}]}"
    recipe = load(
        text,
        tmp_path,
        *("--steps", "7", "--seed=8", "--optimizer.lr", "3e-4", "--optimizer.weight_decay=0"),
        *("--compile", "true", "--precision", "float32", "--parallel.dp_shard", "-1"),
        *("--optimizer.betas", "[0.8, 0.9]", "--model.pattern", "[mamba2, attention*2]"),
        *("--model.mixers.attention.num_heads", "8", "--model.mixers.mamba2={expand: 2}"),
        "--model.mixers.attention.rope_scaling.factor=4.0",
        *("--data.sources.0.weight", "2", "--evals", "{every: 5, batches: 2}"),
        *("--schedule.name=wsd", "--schedule.name=cosine", "--output_dir", "a=b"),
    )
    assert (recipe.steps, recipe.seed, recipe.compile) == (7, 8, True)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (3e-4, 0.0)
    assert type(recipe.optimizer.weight_decay) is float
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.parallel.dp_shard == -1
    assert recipe.model.pattern == ["mamba2", "attention*2"]
    assert recipe.model.mixers == {
        "attention": {"window": 64, "num_heads": 8, "rope_scaling": {"factor": 4.0}},
        "mamba2": {"expand": 2},
    }
    assert recipe.data.sources == [SourceConfig("a", 2.0)]
    assert (recipe.evals.every, recipe.evals.batches) == (5, 2)
    assert (recipe.schedule.name, recipe.output_dir) == ("cosine", "a=b")


def test_lengths_are_numbers_or_text(tmp_path):
    text = "name: x\nschedule: {name: wsd_s, warmup_steps: 1%, decay_ends: [90, 40%]}"
    schedule = load(text, tmp_path, "--schedule.decay_steps", "20k tokens").schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == ("1%", "20k tokens")
    assert schedule.decay_ends == [90, "40%"]
    assert load("name: x", tmp_path, "--schedule.warmup_steps", "7").schedule.warmup_steps == 7
    load("name: x\nsteps: 100\nschedule: {name: wsd, warmup_steps: 80%}", tmp_path)


def test_overrides_reach_into_defaults_and_earlier_overrides(tmp_path):
    recipe = load("name: x", tmp_path, "--data.sources.0.weight", "2", "--optimizer.betas.0", ".5")
    assert recipe.data.sources == [SourceConfig("stdlib-english", 2.0)]
    assert recipe.optimizer.betas == (0.5, 0.95)
    overrides = ["--data.sources", "[{path: a}, {path: b}]", "--data.sources.1.weight=3"]
    sources = load("name: x", tmp_path, *overrides).data.sources
    assert sources == [SourceConfig("a"), SourceConfig("b", 3.0)]


def test_text_needs_no_quotes_on_the_command_line(tmp_path):
    for text in ("2024", "true", "null", "1e3", "[a", "a: b", "- x", "a #b"):
        recipe = load("name: x", tmp_path, "--data.folder", text)
        assert recipe.data.folder == text


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--steps"], ["steps", "needs a value"]),
        (["--steps", "--seed", "3"], ["steps", "needs a value"]),
        (["steps", "3"], ['"steps": unexpected', '"3": unexpected']),
        (["--steps", "three"], ["steps", "a whole number", '"three"']),
        (["--steps", "[3"], ["steps", "a whole number", '"[3"']),
        (["--stps", "3"], ["stps", "unknown key", '"3"', "did you mean steps?"]),
        (["--model.dmi", "3"], ["model.dmi", "did you mean model.dim?"]),
        (["--data.sources.4.weight", "3"], ["data.sources.4.weight", "1 items"]),
        (["--data.sources.x.weight", "3"], ["data.sources.x.weight", "'x'"]),
        (["--steps.x", "3"], ["steps.x", "no keys"]),
        (["--evals", "[a"], ["evals", "every, batches", "line 1"]),
        (["--model.preset", "huge"], ["model.preset", "huge", "gated-deltanet-7b"]),
    ],
)
def test_wrong_overrides(overrides, parts, tmp_path):
    found = "\n".join(problems_of("", tmp_path, *overrides))
    assert all(part in found for part in parts), found


def test_yaml_has_no_surprises():
    text = "{a: off, b: 1:30, c: 2024-01-01, d: 3e-4, e: 1_000, f: 010, g: ~, h: -.5, i: 1.}"
    expected = ["off", "1:30", "2024-01-01", 3e-4, 1000, "010", None, -0.5, 1.0]
    assert list(read_yaml(text).values()) == expected


TEXTS = ["", "3e-4", "true", "null", "~", "off", "1:30", " x", "a: b", "#", "nan", "é\u2028☃"]
OTHERS = [0.1, 1e-8, 1e20, 1 / 3, 5e-324, 2**62, -1, True, None, [], {}, [[1, "1"]]]


@pytest.mark.parametrize("value", [*TEXTS, *OTHERS])
def test_yaml_reads_back_what_it_writes(value):
    assert read_yaml(write_yaml({"key": value})) == {"key": value}
    assert type(read_yaml(write_yaml({"key": value}))["key"]) is type(value)


def test_a_dumped_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("tiny", ["--optimizer.lr", "0.1234567890123456", "--name", "3e-4"])
    recipe.model.mixers = {"attention": {"num_heads": 2, "window": None}}
    assert load(dump_recipe(recipe), tmp_path) == recipe
    assert dump_recipe(load(dump_recipe(recipe), tmp_path)) == dump_recipe(recipe)


def test_presets_give_way_to_keys_beside_them(tmp_path):
    name = preset_names()[0]
    values = preset_values(name)
    text = f"name: x\nmodel: {{preset: {name}, norm_eps: 1e-3}}"
    recipe = load(text, tmp_path, "--model.init_std", "0.5")
    expected = ModelConfig(**{**values, "preset": name, "norm_eps": 1e-3, "init_std": 0.5})
    assert recipe.model == expected
    assert recipe.model.dim != ModelConfig().dim
    assert load("name: x", tmp_path, "--model.preset", name).model == ModelConfig(
        **{**values, "preset": name}
    )
    assert load(dump_recipe(recipe), tmp_path) == recipe


def test_bundled_recipes_are_valid():
    assert "tiny" in bundled_recipes()
    for name in bundled_recipes():
        assert isinstance(load_recipe(name), Recipe)
    tiny = load_recipe("tiny")
    assert sorted(tiny.model.pattern) == sorted({*tiny.model.pattern})
    assert len(tiny.model.pattern) == tiny.model.num_layers == 7


@pytest.mark.parametrize("missing", ["tinny", "recipes/tiny.yml", ".", "x" * 10_000, "a\0b"])
def test_a_missing_recipe_is_named_with_those_there_are(missing):
    with pytest.raises(RecipeError, match="no such recipe file") as caught:
        load_recipe(missing)
    assert "bundled recipes: " in str(caught.value) and "tiny" in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "world_size", "parts"),
    [
        ({"dp_replicate": 3}, 4, ["parallel.dp_replicate", "3 groups", "4 ranks"]),
        (
            {"dp_replicate": 2, "dp_shard": 3},
            4,
            ["parallel.dp_shard", "dp_replicate 2 x dp_shard 3 = 6", "has 4"],
        ),
        ({"dp_replicate": 0}, 4, ["parallel.dp_replicate", "at least 1", "got 0"]),
        ({"dp_shard": 0}, 4, ["parallel.dp_shard", "at least 1, or -1", "got 0"]),
        ({"dp_shard": -2}, None, ["parallel.dp_shard", "at least 1, or -1", "got -2"]),
        ({}, 3, ["data.global_batch_size", "8 sequences", "3 data-parallel ranks", "9 would"]),
        ({"dp_shard": 3}, None, ["data.global_batch_size", "3 data-parallel ranks", "9 would"]),
        ({}, 4, ["data.micro_batch_size", "4 does not divide", "share of 2", "example 2 would"]),
    ],
)
def test_layouts_that_cannot_be(layout, world_size, parts):
    recipe = load_recipe("tiny")
    recipe.parallel = dataclasses.replace(recipe.parallel, **layout)
    found = problems(recipe, world_size)
    assert len(found) == 1 and all(part in found[0] for part in parts), found
    with pytest.raises(RecipeError, match=parts[0]):
        validate(recipe, world_size)


def test_layouts_that_can_be():
    recipe = load_recipe("tiny", world_size=2)
    for replicate, shard in ((1, -1), (2, -1), (2, 1), (1, 2)):
        recipe.parallel.dp_replicate, recipe.parallel.dp_shard = replicate, shard
        assert problems(recipe, 2) == []


def test_values_set_in_python_are_checked_too():
    recipe = load_recipe("tiny")
    recipe.optimizer.lr = float("nan")
    recipe.data.sources[0].weight = float("inf")
    assert [p.partition(":")[0] for p in problems(recipe)] == [
        "optimizer.lr",
        "data.sources.0.weight",
    ]


@dataclass
class Inner:
    size: int = 3


@dataclass
class Options:
    path: str
    inner: Inner = field(default_factory=Inner)
    kind: Literal["a", "b"] = "a"
    top_k: int | None = None
    label: str | None = None
    items: list[Inner] = field(default_factory=list)
    pairs: dict[str, float] = field(default_factory=dict)
    anything: Any = None


def test_any_dataclass_can_be_options():
    argv = ["file", "--inner.size=4", "--kind", "b", "--top_k", "5", "--label", "7"]
    argv += ["--items", "[{size: 1}, {}]", "--pairs.x", "1", "--anything", "[1, {a: b}]"]
    expected = Options(
        *("file", Inner(4), "b", 5, "7", [Inner(1), Inner()], {"x": 1.0}, [1, {"a": "b"}])
    )
    assert parse_dataclass(Options, argv, "do", ("path",)) == expected
    argv = ["--path", "--=x", "--top_k", "null", "--label=null"]
    with pytest.raises(RecipeError, match="path: needs a value"):
        parse_dataclass(Options, argv, "do")
    assert parse_dataclass(Options, ["--path=--x", *argv[2:]], "do") == Options("--x")
    with pytest.raises(RecipeError, match=r"^do: 4 problems\n") as caught:
        parse_dataclass(Options, ["a", "b", "--pth", "c", "--kind=c", "--top_k=x"], "do", ("path",))
    assert "top_k: expected a whole number" in str(caught.value)
    with pytest.raises(RecipeError, match="path: required key, expected text"):
        parse_dataclass(Options, [], "do")
