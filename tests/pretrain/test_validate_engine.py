"""What an engine cannot do is refused while the recipe is read, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rondo.errors import UserError
from rondo.parallel.config import DeepSpeedOptions
from rondo.parallel.engines.deepspeed_config import deepspeed_config
from rondo.pretrain import load_recipe
from rondo.pretrain.plan import make_job
from rondo.pretrain.typed import RecipeError
from rondo.pretrain.validate_engine import check_vocabulary

pytestmark = pytest.mark.quick
ZERO = "--parallel.engine=deepspeed"


def problems(ranks: int | None, *options: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", options, world_size=ranks)
    return str(caught.value)


def own(**keys: object) -> str:
    return f"--parallel.deepspeed.config={json.dumps(keys)}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parallel.pp=2"], ["parallel.pp", "2 ranks", "native"]),
        (["--parallel.tp=2"], ["parallel.tp", "DTensors"]),
        (["--parallel.cp=2"], ["parallel.cp", "one sequence"]),
        (["--parallel.ep=2"], ["parallel.ep", "experts"]),
        (["--parallel.dp_replicate=2"], ["parallel.dp_replicate", "all ranks"]),
        (["--optimizer.name=muon"], ["optimizer.name", "muon", "adamw"]),
        (["--parallel.deepspeed.zero_stage=3", "--compile=true"], ["compile", "ZeRO 3"]),
        (["--parallel.deepspeed.zero_stage=4"], ["zero_stage", "4"]),
        (["--parallel.deepspeed.offload_optimizer=nvme"], ["offload_optimizer", "zero_stage 3"]),
        (["--parallel.deepspeed.offload_parameters=cpu"], ["offload_parameters", "zero_stage 3"]),
        (["--parallel.deepspeed.nvme_folder=/x"], ["nvme_folder", "nothing is kept"]),
        ([own(gradient_clipping=0.5)], ["config.gradient_clipping", "0.5", "optimizer.clip_norm"]),
        ([own(train_batch_size=7)], ["train_batch_size", "7", "data.global_batch_size"]),
        (
            [own(zero_optimization={"stage": 1})],
            ["zero_optimization.stage", "1", "parallel.deepspeed.zero_stage", "2"],
        ),
        ([own(zero_optimization=3)], ["zero_optimization", "section", "3"]),
        ([own(optimizer={"type": "Lamb"})], ["config.optimizer", "optimizer.* decides"]),
        ([own(bf16={"enabled": True})], ["config.bf16", "precision"]),
        ([own(zero_optimisation={})], ["zero_optimisation", "did you mean zero_optimization"]),
        (["--parallel.deepspeed.config_file=/nowhere.json"], ["config_file", "/nowhere.json"]),
    ],
)
def test_what_deepspeed_cannot_do(options: list[str], words: list[str]) -> None:
    found = problems(2, ZERO, *options)
    assert all(word in found for word in words), found


@pytest.mark.parametrize("key", ["pp", "cp", "ep"])
def test_megatron_divides_over_tp_and_data_alone(key: str) -> None:
    found = problems(2, "--parallel.engine=megatron", f"--parallel.{key}=2")
    assert f"parallel.{key}: 2 ranks, but Megatron" in found


def test_megatron_knows_no_routers() -> None:
    found = problems(2, "--parallel.engine=megatron", "--model.pattern=[attention+moe]")
    assert "model.pattern: moe" in found


def test_megatron_needs_a_vocabulary_that_its_ranks_divide() -> None:
    """Of bytes, of the recipe, or what the tokenizer turns out to have."""
    over_two = (
        "--parallel.engine=megatron",
        "--parallel.tp=2",
        "--model.pattern=[gated_deltanet]",
        "--model.mixers={gated_deltanet: {num_heads: 2}}",
    )
    assert "parallel.tp: 2 ranks do not divide the 257 token ids" in problems(2, *over_two)
    own = problems(2, *over_two, "--model.vocab_size=263")
    assert "parallel.tp: 2 ranks do not divide the 263 token ids" in own
    recipe = load_recipe("tiny", [*over_two, "--data.tokenizer=sentencepiece:300"], world_size=2)
    check_vocabulary(recipe, 300)
    with pytest.raises(UserError, match=r"parallel.tp: 2 ranks do not divide the 301 token ids"):
        check_vocabulary(recipe, 301)


def test_megatron_has_no_layer_for_sums_without_a_matrix() -> None:
    found = problems(
        2,
        "--parallel.engine=megatron",
        "--parallel.tp=2",
        "--model.vocab_size=258",
        "--model.pattern=[retnet, bare]",
        "--model.mixers={bare: {kind: lstm, output_projection: false}, retnet: {num_heads: 2}}",
    )
    assert "model.mixers.bare: LSTM.output adds up over the ranks of parallel.tp" in found
    assert "retnet" not in found


MEGATRON = ("--parallel.engine=megatron", "--parallel.megatron.distributed_optimizer=true")


@pytest.mark.parametrize(
    ("ranks", "options", "words"),
    [
        (2, ["--optimizer.name=muon"], ["optimizer.name", "muon", "adamw"]),
        (1, [], ["parallel.megatron.distributed_optimizer", "1 rank"]),
        (
            2,
            ["--parallel.megatron.overlap_param_gather=true", "--compile=true"],
            ["compile", "overlap_param_gather"],
        ),
        (2, ["--parallel.megatron.bucket_size=9"], ["bucket_size", "9", "overlap_grad_reduce"]),
        (
            2,
            ["--parallel.megatron.overlap_grad_reduce=true", "--parallel.megatron.bucket_size=0"],
            ["bucket_size", "at least 1", "got 0"],
        ),
        (
            2,
            [
                "--parallel.megatron.distributed_optimizer=false",
                "--parallel.megatron.overlap_grad_reduce=true",
            ],
            ["parallel.megatron", "distributed_optimizer true"],
        ),
    ],
)
def test_what_megatrons_optimizer_cannot_do(
    ranks: int, options: list[str], words: list[str]
) -> None:
    found = problems(ranks, *MEGATRON, *options)
    assert all(word in found for word in words), found


@pytest.mark.parametrize("option", ["deepspeed.zero_stage=3", "megatron.overlap_grad_reduce=true"])
def test_options_of_another_engine(option: str) -> None:
    found = problems(1, f"--parallel.{option}")
    assert f"parallel.{option.split('.')[0]}" in found and "got native" in found


def test_own_keys_of_file_and_recipe_stand_beside_what_the_recipe_decides(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    buckets = {"reduce_bucket_size": 1000, "stage": 2}
    file.write_text(json.dumps({"zero_optimization": buckets, "train_batch_size": "auto"}))
    options = [own(zero_optimization={"reduce_bucket_size": 2000}), "--optimizer.clip_norm=0.5"]
    recipe = load_recipe(
        "tiny", [ZERO, f"--parallel.deepspeed.config_file={file}", *options], world_size=2
    )
    found = deepspeed_config(
        recipe.parallel.deepspeed, micro_batch=2, accumulation=3, ranks=2, clip_norm=0.5
    )
    zero = found["zero_optimization"]
    assert zero["reduce_bucket_size"] == 2000 and zero["stage"] == 2
    assert found["train_batch_size"] == 12 and found["gradient_clipping"] == 0.5


def test_disk_and_memory_are_named_to_deepspeed() -> None:
    options = DeepSpeedOptions(3, "nvme", "cpu", "/fast")
    found = deepspeed_config(options, micro_batch=1, accumulation=1, ranks=1, clip_norm=0)
    zero = found["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast"}
    assert zero["offload_param"] == {"device": "cpu"}


def test_a_plan_is_of_the_native_engine() -> None:
    recipe = load_recipe("tiny", [ZERO])
    with pytest.raises(UserError, match="a plan knows"):
        make_job(recipe, 2)
