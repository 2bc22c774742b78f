"""Whole runs under an engine, on the ranks that are there."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rondo.parallel.mesh import Ranks, layout, make_mesh
from rondo.parallel.signals import StopFlag
from rondo.pretrain.parse import load_recipe
from rondo.pretrain.run_data import open_data
from rondo.pretrain.start import find_origin
from rondo.pretrain.train import Trainer

SMALL = [
    "--model.dim=16",
    "--model.num_layers=2",
    "--model.pattern=[gated_deltanet+moe, para_gru]",
    "--model.ffns.moe={num_experts: 4, top_k: 2}",
    "--data.sequence_length=16",
    "--data.global_batch_size=8",
    "--data.micro_batch_size=2",
    "--checkpoint.every=10",
    "--evals.batches=1",
    "--logging.norms_every=10",
    "--logging.tensorboard=false",
]
"""A mixture of experts, matrices, float32 vectors, and parameters that are kept within bounds; two
micro-batches a rank and step."""
OFFLOAD = {
    1: [],
    2: ["--parallel.deepspeed.offload_optimizer=cpu"],
    3: [
        "--parallel.deepspeed.offload_optimizer=cpu",
        "--parallel.deepspeed.offload_parameters=cpu",
    ],
}
"""What is kept in host memory, by the stage of ZeRO."""
SMALL_STEPS = ["--steps=6", "--optimizer.eps=0.01", "--optimizer.lr=0.03"]
"""AdamW's steps are then as long as gradients are, and say whether these were clipped; with its
usual eps they have one length."""
Rows = list[dict[str, Any]]


class Killed(Exception):
    """Ends a run without a word."""


class KilledTrainer(Trainer):
    """Does not live to see the end of step `LAST`."""

    LAST = 13

    def step(self, step: int, batches: list) -> Any:
        if step == self.LAST:
            raise Killed
        return super().step(step, batches)


class ShortTrainer(KilledTrainer):
    """Does not live to see its first checkpoint."""

    LAST = 9


class AdaptersTrainer(KilledTrainer):
    """Holds moments of its share of the adapters, filled up to one size, and of nothing else."""

    def step(self, step: int, batches: list) -> Any:
        states = [s for each in self.model.optimizers for s in each.state.values()]
        held = sum(state["exp_avg"].numel() for state in states)
        params = [p for p in self.model.parts[0].parameters() if p.requires_grad]
        share = sum(getattr(p, "ds_numel", p.numel()) for p in params) / self.ranks.size
        assert share <= held <= share + len(params)
        return super().step(step, batches)


class SpoiledTrainer(Trainer):
    """Its gradients of step 1 are not finite; a signal reaches rank 0 in step 4."""

    def step(self, step: int, batches: list) -> Any:
        backward = self.model._backward
        if step == 1:
            self.model._backward = lambda loss: backward(loss * float("nan"))
        if step == 4 and self.ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            return super().step(step, batches)
        finally:
            self.model._backward = backward


def run(folder: str, name: str, *options: str, kind: type[Trainer] = Trainer) -> Rows:
    """Trains the run `name` in `folder`, or goes on with it; the rows of its metrics so far."""
    own = [f"--name={name}", f"--output_dir={folder}/runs"]
    data = [f"--data.folder={folder}/data", f"--data.sources.0.path={folder}/text.txt"]
    return train_run([*SMALL, *own, *data, *options], kind)


def train_run(options: list[str], kind: type[Trainer] = Trainer) -> Rows:
    """Trains `tiny` with `options`, or goes on with it; the rows of its metrics so far."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    size = dist.get_world_size()
    recipe = load_recipe("tiny", options, world_size=size)
    mesh = make_mesh("cpu", layout(recipe.parallel, size))
    ranks = Ranks(dist.get_rank(), size, torch.device("cpu"), mesh)
    where = Path(recipe.output_dir) / recipe.name
    origin = find_origin(recipe)
    training, held_out = open_data(recipe, where)
    with StopFlag([recipe.checkpoint.signal]) as stop:
        trainer = kind(recipe, where, ranks, stop, training, held_out)
        try:
            trainer.run(origin)
        except Killed:
            pass
        finally:
            trainer.checkpointer.close()
            trainer.eval_jobs.close(done=False)
    dist.barrier()
    return [json.loads(line) for line in (where / "metrics.jsonl").open()]


def zero(stage: int) -> list[str]:
    """DeepSpeed with ZeRO of this stage."""
    return ["--parallel.engine=deepspeed", f"--parallel.deepspeed.zero_stage={stage}"]


def own_keys_file(folder: str) -> str:
    """The option that names a file with keys of DeepSpeed: buckets much smaller than the model."""
    file = Path(folder) / f"deepspeed-{dist.get_rank()}.json"
    sizes = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000}
    file.write_text(json.dumps({"zero_optimization": sizes, "train_batch_size": "auto"}))
    return f"--parallel.deepspeed.config_file={file}"


def scenarios(folder: str, stages: Sequence[int]) -> dict[str, Rows]:
    """The same run under several engines, ZeRO with each of `stages`, cut and not; rows by what
    was done."""

    def after_10(name: str) -> str:
        return f"--checkpoint.resume={folder}/runs/{name}/checkpoints/step-000000010"

    found = {"native": run(folder, "native")}
    for stage in stages:
        found[f"before {stage}"] = run(folder, f"zero{stage}", *zero(stage), kind=KilledTrainer)
        found[f"zero {stage}"] = run(folder, f"zero{stage}", *zero(stage))
    weighed = ["--steps=6", "--reweight.strategy=linear", "--reweight.scope=global_batch"]
    found["spoiled native"] = run(folder, "spoilednative", *weighed, kind=SpoiledTrainer)
    for stage in stages:
        words = (f"spoiled{stage}", *weighed, *zero(stage), *OFFLOAD[stage])
        found[f"spoiled {stage}"] = run(folder, *words, kind=SpoiledTrainer)
    for name in ("native", *stages):
        assert (Path(folder) / f"runs/spoiled{name}/checkpoints/step-000000005").is_dir()
    clipped = [*SMALL_STEPS, "--optimizer.clip_norm=0.05"]
    found["native unclipped"] = run(folder, "native-unclipped", *SMALL_STEPS)
    found["native clipped"] = run(folder, "native-clipped", *clipped)
    for stage in stages:
        found[f"clipped {stage}"] = run(folder, f"clipped{stage}", *clipped, *zero(stage))
    half = "--precision=bfloat16"
    found["native bf16"] = run(folder, "native-bf16", half, kind=ShortTrainer)
    for stage in stages:
        words = (f"zero{stage}-bf16", half, *zero(stage), own_keys_file(folder))
        found[f"zero {stage} bf16"] = run(folder, *words, kind=ShortTrainer)
    for stage in stages:
        found[f"{stage} to native"] = run(folder, f"native{stage}", after_10(f"zero{stage}"))
        words = (f"from-native{stage}", *zero(stage), after_10("native"))
        found[f"native to {stage}"] = run(folder, *words)
    return found


def adapters(folder: str) -> dict[str, Rows]:
    """Adapters trained under several engines; the checkpoint of step 10 goes on under another."""
    words = [
        "--model.lora_rank=2",
        "--model.lora_targets=[q_proj, v_proj, o_proj]",
        "--optimizer.lr=0.01",
    ]
    found = {"native": run(folder, "native", *words)}
    for stage in (1, 2, 3):
        run(folder, f"zero{stage}", *words, *zero(stage), kind=AdaptersTrainer)
        found[f"zero {stage} to native"] = run(folder, f"zero{stage}", *words)
        after = f"--checkpoint.resume={folder}/runs/native/checkpoints/step-000000010"
        found[f"native to {stage}"] = run(folder, f"to{stage}", *words, *zero(stage), after)
    return found


def on_disk(folder: str) -> dict[str, Rows]:
    """Parameters and optimizer state on a disk, and each other's checkpoint of step 3."""
    # Another ninja than this environment's would compile DeepSpeed's reader again, for minutes.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [
        "--steps=6",
        "--checkpoint.every=3",
        "--model.dim=256",
        "--model.ffn_dim=2048",  # ZeRO keeps shares of less than 1 MiB in memory
        "--model.pattern=[attention]",
        "--model.ffns={}",
    ]
    disk = [
        *zero(3),
        "--parallel.deepspeed.offload_optimizer=nvme",
        "--parallel.deepspeed.offload_parameters=nvme",
        f"--parallel.deepspeed.nvme_folder={folder}/disk",
    ]

    def after_3(name: str) -> str:
        return f"--checkpoint.resume={folder}/runs/{name}/checkpoints/step-000000003"

    found = {"native": run(folder, "native", *words), "disk": run(folder, "disk", *words, *disk)}
    found["to disk"] = run(folder, "to-disk", *words, *disk, after_3("native"))
    found["from disk"] = run(folder, "from-disk", *words, after_3("disk"))
    return found
