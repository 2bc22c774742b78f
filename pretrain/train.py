"""The training loop: from a recipe to a trained model, exactly resumable at any step."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from rondo.errors import UserError
from rondo.goodput import LOOKING, SAVING
from rondo.kernels.backend import show_choices
from rondo.models import FFNS
from rondo.parallel.build import PRECISIONS
from rondo.parallel.checkpoint import Checkpointer
from rondo.parallel.counts import take_counts, take_gauges
from rondo.parallel.engines import make_engine
from rondo.parallel.hardware import peak_flops, peak_memory, reuse_memory
from rondo.parallel.load import load_summary, move_biases, take_loads
from rondo.parallel.mesh import Ranks, process_group, world_size
from rondo.parallel.pipeline import MicroBatch
from rondo.parallel.signals import StopFlag
from rondo.pretrain.attempts import Attempt
from rondo.pretrain.batches import RankBatches
from rondo.pretrain.data import (
    Curriculum,
    TokenDataset,
    bits_per_byte,
    prefetch,
)
from rondo.pretrain.data.folders import no_empty_folders
from rondo.pretrain.data.seen import NAME as SAMPLES
from rondo.pretrain.domains import learnt_metrics
from rondo.pretrain.eval_jobs import EvalJobs, require_files
from rondo.pretrain.metrics import Metrics
from rondo.pretrain.observe import Observer, Tables, due
from rondo.pretrain.optim import set_learning_rate, updates_of
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import Reweighting, SampleWeights
from rondo.pretrain.run_data import describe_run, open_data, require_same_seen
from rondo.pretrain.stage_costs import stage_costs
from rondo.pretrain.stages import Stage, rate, stage_at, stages_of
from rondo.pretrain.start import Origin, begin, enter, find_origin, saved_streams
from rondo.pretrain.validate import validate
from rondo.pretrain.validate_engine import check_vocabulary
from rondo.pretrain.words import farewell, greeting, model_cost, scores

DONE, STOPPED = 0, 75
"""Exit codes: the run is complete; a signal stopped it after a checkpoint (start it again)."""


def train(recipe: Recipe, began: float | None = None) -> int:
    """Trains `recipe` in its run folder, going on from the newest checkpoint there.

    Every rank of a run calls it; a single process needs no launcher.

    Args:
        recipe: what to train.
        began: when this start of it began, in seconds since the epoch; now if None.

    Returns:
        `DONE`, or `STOPPED` after a signal led to a checkpoint.

    Raises:
        UserError: the recipe, its data or its checkpoint cannot be used; raised before the
            process group starts where that can be known then.
    """
    began = time.time() if began is None else began
    validate(recipe, world_size())
    require_files(recipe)
    reuse_memory()
    folder = Path(recipe.output_dir) / recipe.name
    if recipe.checkpoint.resume == "never" and any((folder / "checkpoints").glob("step-*")):
        raise UserError(f"checkpoint.resume: 'never', but {folder} has checkpoints of a run")
    origin = find_origin(recipe)
    training, held_out = open_data(recipe, folder, saved_streams(folder, origin))
    check_vocabulary(recipe, training.vocab_size)
    with (
        no_empty_folders(folder / "checkpoints"),
        process_group(recipe.parallel) as ranks,
        StopFlag([recipe.checkpoint.signal]) as stop,
    ):
        require_same_seen(training.seen)
        trainer = Trainer(recipe, folder, ranks, stop, training, held_out, began)
        try:
            return trainer.run(origin)
        finally:
            trainer.checkpointer.close()
            trainer.eval_jobs.close(done=False)
            trainer.attempt.end(trainer.eval_jobs.metrics())


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        ranks: Ranks,
        stop: StopFlag,
        training: Curriculum,
        held_out: dict[str, TokenDataset],
        began: float | None = None,
    ) -> None:
        self.recipe, self.folder, self.ranks, self.stop = recipe, folder, ranks, stop
        self.training = training
        self.stages = stages_of(recipe)
        self.steps = self.stages[-1].end
        self.tokenizer = training.tokenizer
        self.config = dataclasses.replace(recipe.model, vocab_size=training.vocab_size)
        length = recipe.data.sequence_length
        self.model = make_engine(
            self.config,
            ranks,
            recipe.parallel,
            updates_of(recipe, ranks.layout.data_size),
            precision=recipe.precision,
            seed=recipe.seed,
            length=length,
            costs=stage_costs(recipe, self.config, folder, ranks),
            compile=recipe.compile,
        )
        self.checkpointer = Checkpointer(
            folder / "checkpoints",
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
        )
        self.eval_jobs = EvalJobs(recipe, folder, ranks, stop)
        self.attempt = Attempt(folder, began, active=ranks.rank == 0)
        ffns = {spec.ffn for spec in self.config.layers()} - {"none"}
        losses = [(ffn, loss) for ffn in ffns for loss in FFNS[ffn].losses(self.config)]
        self.loss_names = {loss: f"{ffn}/{loss}" for ffn, loss in losses}
        self.tokens_per_step = recipe.data.global_batch_size * length
        self.reweighting = Reweighting(recipe, ranks)
        self.batches = RankBatches(recipe.data, ranks, self.tokenizer.byte_lengths())
        self.observer = Observer(
            recipe, self.model, self.batches, held_out, self.reweighting.domains
        )
        self.cost = model_cost(self.config, length)
        # Backward costs twice forward, once where matrices are frozen.
        self.flops_per_token = (2 if self.config.lora_rank else 3) * self.cost.flops
        self.limits_said = False
        self.peak_flops = ranks.sum(peak_flops(ranks.device, PRECISIONS[recipe.precision]))[0]
        # What a checkpoint carries besides tensors.
        self.state: dict[str, Any] = {
            "step": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "first_bits_per_byte": None,
            "data": training.fingerprint(),
        }

    def run(self, origin: Origin | None = None) -> int:
        """Trains from where the run stands (`origin`, if it has no checkpoint yet) to its end,
        or to a signal."""
        recipe = self.recipe
        self.state, beginning = begin(
            self.checkpointer,
            self.model,
            recipe,
            self.tokenizer,
            self.state,
            origin,
            self.training.fingerprint,
        )
        start = self.state["step"]
        self.training.resume_streams(self.state.get("streams", {}))
        if self.ranks.rank == 0:
            describe_run(recipe, self.folder, self.training)
        self.attempt.begin(start)
        self.metrics = Metrics(
            self.folder,
            start=start,
            steps=self.steps,
            every=recipe.logging.every,
            tensorboard=recipe.logging.tensorboard,
            active=self.ranks.rank == 0,
        )
        self.eval_jobs.start()
        with self.metrics:
            show_choices(self.metrics.say)
            self._say(*greeting(self), *beginning)
            before = self._look_first(start)
            extra: dict[str, float] = {}
            for step, batches in prefetch(self.batches.steps(self.training, start, self.steps)):
                stage = self._enter(step)
                row, stopping = self.step(step, batches)
                last = step + 1 == self.steps
                extra, tables = self._look(step, batches, last=step + 1 == stage.end)
                row |= self.eval_jobs.metrics() | self.attempt.metrics()
                self.metrics.log(row, extra | before, tables, stage=stage.name or None)
                before = {}
                self.state["step"] = step + 1
                scored = self.eval_jobs.due(step + 1)
                saving = step + 1 == stage.end or due(step, recipe.checkpoint.every)
                if stopping or saving:
                    with self.attempt.charge(SAVING):
                        self.save()
                elif scored:
                    self.eval_jobs.charge(self.save)
                if stopping and not last:
                    with self.attempt.charge(SAVING):
                        self.checkpointer.close()
                    self.metrics.say(f"stopped by a signal after step {step + 1}; start again")
                    return STOPPED
                if scored:
                    if recipe.evals.where == "loop":
                        self.eval_jobs.charge(self.checkpointer.wait)
                    self.eval_jobs.wait(step + 1)
            with self.attempt.charge(SAVING):
                self.checkpointer.close()
            if self._end_evals():
                return STOPPED
            self._say(*farewell(self, extra or self._look(start, [], last=True)[0]))
        return DONE

    def step(self, step: int, batches: list[MicroBatch]) -> tuple[dict[str, float], bool]:
        """One optimizer step over this rank's micro-batches; returns the metrics of the step and
        whether a signal asks to stop. All ranks decide alike."""
        began = time.perf_counter()
        recipe, ranks, model = self.recipe, self.ranks, self.model
        # Whatever draws random numbers draws the same after a resume.
        torch.manual_seed((recipe.seed << 32) + step * ranks.size + ranks.rank)
        scale = rate(self.stages, step, self.tokens_per_step)
        set_learning_rate(model.optimizers, scale)
        weights = self._sample_weights(step, batches)
        nats = model.forward_backward(batches, weights)
        loss_sum, valid, text, stopping, failed, *more = ranks.sum(
            *self.batches.count(nats, batches),
            float(self.stop.raised),
            float(self.checkpointer.failed),
            *(float(value) for value in model.auxiliary.values()),
            *(weights.shares() if weights else ()),
        )
        self.loads = take_loads(model.parts, ranks)
        if failed:
            self.checkpointer.check()
        norm = model.update(max(1, valid))
        self._note_update(step, norm)
        seconds = time.perf_counter() - began
        speed = self.tokens_per_step / seconds
        row = {
            "step": step,
            "loss": loss_sum / max(1, valid),
            "bits_per_byte": bits_per_byte(loss_sum, int(text)),
            "grad_norm": norm,
            "lr": scale * recipe.optimizer.lr,
            "tokens": (step + 1) * self.tokens_per_step,
            "targets": valid,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops,
            "memory_bytes": peak_memory(ranks.device),
            "skipped_steps": self.state["skipped_steps"],
            **self._epochs(step + 1),
            "seconds": seconds,
            **{
                self.loss_names[name]: value / self.tokens_per_step
                for name, value in zip(model.auxiliary, more, strict=False)
            },
            **(weights.metrics(more[len(model.auxiliary) :], valid) if weights else {}),
            **load_summary(self.loads),
            **take_counts(model.parts, ranks),
            **take_gauges(model.parts, ranks),
        }
        if fallbacks := row.get("newton/fallbacks"):
            self.metrics.say(
                f"step {step + 1}: Newton's method did not converge in {fallbacks:.0f} layer(s); "
                "rows were done one position at a time there (newton_fallback/<layer>)"
            )
        if (limited := row.get("titans_memory/limited")) and not self.limits_said:
            self.limits_said = True  # some models need them at every step
            self.metrics.say(
                f"step {step + 1}: {limited:.0f} times a limit kept a neural memory in bounds; "
                "titans_memory/limited counts them from here on"
            )
        return row, stopping > 0

    def _epochs(self, steps: int) -> dict[str, float]:
        """How often each source was read in the first `steps` steps."""
        read = self.training.epochs(steps * self.recipe.data.global_batch_size)
        names = self.reweighting.domains
        return {f"epochs/{names[number]}": epochs for number, epochs in read.items()}

    def _note_update(self, step: int, norm: float) -> None:
        """What follows an update; one whose gradients are not finite changed nothing, on any
        rank."""
        if math.isfinite(norm):
            move_biases(self.model.parts, self.loads)
            self.state["skipped_in_a_row"] = 0
        else:
            self.state["skipped_steps"] += 1
            self.state["skipped_in_a_row"] += 1
            self.metrics.say(f"step {step + 1}: gradients are not finite, step skipped")
        limit = self.recipe.optimizer.max_skipped_steps
        if self.state["skipped_in_a_row"] > limit:
            raise UserError(
                f"gradients were not finite in {self.state['skipped_in_a_row']} steps in a row up "
                f"to step {step + 1} (optimizer.max_skipped_steps: {limit}); lower optimizer.lr "
                f"({self.recipe.optimizer.lr}) or look at the data of these steps"
            )

    def _look_first(self, start: int) -> dict[str, float]:
        """Validation before the first step; what the row of that step tells of it, or else of what
        the run that is gone on with had learnt."""
        with self.attempt.charge(LOOKING):
            first = self.observer.first(start, self.state)
        if first:
            self.metrics.say(f"validation before training: {scores(first)}")
        if not self.recipe.stages:
            return {}
        if not first and self.metrics.fresh:
            return learnt_metrics(self.state.get("learnt", {}))
        return {name.replace("validation", "validation_before", 1): first[name] for name in first}

    def _look(
        self, step: int, batches: list[MicroBatch], *, last: bool
    ) -> tuple[dict[str, float], Tables]:
        """What is due after `step`, the `last` of a stage or not."""
        with self.attempt.charge(LOOKING):
            return self.observer.after(
                step,
                batches,
                self.state,
                sources=functools.partial(self._sources, step),
                loads=self.loads if batches else None,
                last=last,
            )

    def _sources(self, step: int) -> list[list[int]]:
        """The source of each sequence of this rank's micro-batches."""
        return [[self.training.source(i) for i in chunk] for chunk in self.batches.indices(step)]

    def _say(self, *lines: str) -> None:
        for line in lines:
            self.metrics.say(line)

    def _enter(self, step: int) -> Stage:
        """The stage of `step`; what begins with it begins."""
        stage = stage_at(self.stages, step)
        if stage.number and step == stage.start:
            self._say(*enter(stage, self.checkpointer, self.model, self.tokenizer))
        return stage

    def save(self) -> None:
        """Saves a checkpoint of the state after the last step."""
        step = self.state["step"]
        self.state["data"] = self.training.fingerprint(step)
        self.state["streams"] = self.training.stream_states(step)
        self.eval_jobs.hold(step)
        config = json.dumps(dataclasses.asdict(self.config), indent=1)
        tokenizer = {f"tokenizer/{self.tokenizer.file_name}": self.tokenizer.content}
        self.checkpointer.save(
            step,
            self.model.tensors(),
            self.state,
            {
                "model/config.json": config,
                SAMPLES: json.dumps(self.training.consumed(step), indent=1),
                **tokenizer,
            },
        )

    def _sample_weights(self, step: int, batches: list[MicroBatch]) -> SampleWeights | None:
        """How much samples count in `step`; None where all count alike."""
        temperature = self.reweighting.temperature(step)
        if temperature is None:
            return None
        weights = SampleWeights(self.reweighting, temperature, batches, self._sources(step))
        if self.recipe.reweight.scope == "global_batch":
            weights.fix(self.model.token_losses(batches))
        return weights

    def _end_evals(self) -> bool:
        """Lets the scoring of checkpoints come to its end; returns whether a signal cut it."""
        training = self.eval_jobs.seconds
        cut = self.eval_jobs.close(done=True)
        if self.eval_jobs.active:
            after = self.eval_jobs.seconds - training
            self.metrics.say(
                f"scoring checkpoints took {training:.2f} s of training, and {after:.1f} s after it"
            )
        if cut:
            self.metrics.say("a signal ended the scoring of checkpoints; start again to go on")
        return cut
