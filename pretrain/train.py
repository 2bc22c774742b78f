"""The training loop: from a recipe to a trained model, exactly resumable at any step."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rondo.errors import UserError
from rondo.kernels.backend import show_choices
from rondo.kernels.segments import document_positions
from rondo.models import FFNS, Decoder, ModelConfig
from rondo.models.mixer import Cost
from rondo.parallel.bounds import keep_bounds
from rondo.parallel.build import PRECISIONS, ParallelModel
from rondo.parallel.checkpoint import (
    Checkpointer,
    model_tensors,
    optimizer_tensors,
    state_digest,
)
from rondo.parallel.counts import take_counts, take_gauges
from rondo.parallel.data_parallel import scale_gradients
from rondo.parallel.hardware import peak_flops, peak_memory, reuse_memory
from rondo.parallel.load import load_shares, load_summary, move_biases, take_loads
from rondo.parallel.mesh import Ranks, process_group, world_size
from rondo.parallel.pipeline import MicroBatch
from rondo.parallel.signals import StopFlag
from rondo.pretrain.data import (
    Batch,
    Curriculum,
    TokenDataset,
    bits_per_byte,
    count_bytes,
    prefetch,
    rank_indices,
    unigram_bits_per_byte,
)
from rondo.pretrain.data.repeats import describe, warnings
from rondo.pretrain.data.seen import NAME as SAMPLES
from rondo.pretrain.domain_loads import DomainLoads
from rondo.pretrain.domains import Domains
from rondo.pretrain.eval_jobs import EvalJobs
from rondo.pretrain.metrics import Metrics
from rondo.pretrain.optim import build_optimizers, set_learning_rate
from rondo.pretrain.probe import layer_norms
from rondo.pretrain.recipe import Recipe
from rondo.pretrain.reweight import Reweighting, SampleWeights
from rondo.pretrain.routing import expert_similarity, router_gradients, routing
from rondo.pretrain.run_data import describe_run, open_data
from rondo.pretrain.stage_costs import stage_costs
from rondo.pretrain.stages import Stage, rate, stage_at, stages_of
from rondo.pretrain.start import Origin, begin, enter, find_origin
from rondo.pretrain.validate import validate

DONE, STOPPED = 0, 75
"""Exit codes: the run is complete; a signal stopped it after a checkpoint (start it again)."""
Tables = dict[str, list[list[float]]]


def train(recipe: Recipe) -> int:
    """Trains `recipe` in its run folder, going on from the newest checkpoint there.

    Every rank of a run calls it; a single process needs no launcher.

    Returns:
        `DONE`, or `STOPPED` after a signal led to a checkpoint.

    Raises:
        UserError: the recipe, its data or its checkpoint cannot be used; raised before the
            process group starts where that can be known then.
    """
    validate(recipe, world_size())
    reuse_memory()
    folder = Path(recipe.output_dir) / recipe.name
    if recipe.checkpoint.resume == "never" and any((folder / "checkpoints").glob("step-*")):
        raise UserError(f"checkpoint.resume: 'never', but {folder} has checkpoints of a run")
    origin = find_origin(recipe)
    training, held_out = open_data(recipe, folder)
    with process_group(recipe.parallel) as ranks, StopFlag([recipe.checkpoint.signal]) as stop:
        trainer = Trainer(recipe, folder, ranks, stop, training, held_out)
        try:
            return trainer.run(origin)
        finally:
            trainer.checkpointer.close()
            trainer.eval_jobs.close(done=False)


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
    ) -> None:
        self.recipe, self.folder, self.ranks, self.stop = recipe, folder, ranks, stop
        self.training, self.held_out = training, held_out
        self.stages, self.domains = stages_of(recipe), Domains(recipe)
        self.steps = self.stages[-1].end
        self.tokenizer = training.tokenizer
        self.byte_lengths = self.tokenizer.byte_lengths()
        self.config = dataclasses.replace(recipe.model, vocab_size=training.vocab_size)
        length = recipe.data.sequence_length
        self.model = ParallelModel(
            self.config,
            ranks,
            recipe.parallel,
            precision=recipe.precision,
            seed=recipe.seed,
            length=length,
            costs=stage_costs(recipe, self.config, folder, ranks),
            compile=recipe.compile,
        )
        self.optimizers = build_optimizers(self.model.parts, recipe.optimizer)
        self.checkpointer = Checkpointer(
            folder / "checkpoints",
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
        )
        self.eval_jobs = EvalJobs(recipe, folder, ranks, stop)
        ffns = {spec.ffn for spec in self.config.layers()} - {"none"}
        losses = [(ffn, loss) for ffn in ffns for loss in FFNS[ffn].losses(self.config)]
        self.loss_names = {loss: f"{ffn}/{loss}" for ffn, loss in losses}
        self.tokens_per_step = recipe.data.global_batch_size * length
        self.reweighting = Reweighting(recipe, ranks)
        self.repeats = training.repeats(self.reweighting.domains)
        self.cost = model_cost(self.config, length)
        self.flops_per_token = 3 * self.cost.flops  # backward costs twice forward
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
            self.model.parts,
            self.optimizers,
            recipe,
            self.tokenizer,
            self.state,
            origin,
            self.training.fingerprint,
        )
        start = self.state["step"]
        if self.ranks.rank == 0:
            describe_run(recipe, self.folder, self.training)
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
            self._greet(beginning)
            before = self._validate_first(start)
            extra: dict[str, float] = {}
            for step, batches in prefetch(self._batches(start)):
                stage = self._enter(step)
                row, stopping = self.step(step, batches)
                last = step + 1 == self.steps
                extra, tables = self._observe(step, batches, step + 1 == stage.end)
                row |= self.eval_jobs.metrics()
                self.metrics.log(row, extra | before, tables, stage=stage.name or None)
                before = {}
                self.state["step"] = step + 1
                scored = self.eval_jobs.due(step + 1)
                saving = scored or step + 1 == stage.end or _due(step, recipe.checkpoint.every)
                if stopping or saving:
                    self.save()
                if stopping and not last:
                    self.checkpointer.close()
                    self.metrics.say(f"stopped by a signal after step {step + 1}; start again")
                    return STOPPED
                if scored:
                    if recipe.evals.where == "loop":
                        self.checkpointer.wait()
                    self.eval_jobs.wait(step + 1)
            self.checkpointer.close()
            if self._end_evals():
                return STOPPED
            self._part(extra or self._observe(start, [], True)[0])
        return DONE

    def step(self, step: int, batches: list[MicroBatch]) -> tuple[dict[str, float], bool]:
        """One optimizer step over this rank's micro-batches; returns the metrics of the step and
        whether a signal asks to stop. All ranks decide alike."""
        began = time.perf_counter()
        recipe, ranks, model = self.recipe, self.ranks, self.model
        # Whatever draws random numbers draws the same after a resume.
        torch.manual_seed((recipe.seed << 32) + step * ranks.size + ranks.rank)
        scale = rate(self.stages, step, self.tokens_per_step)
        set_learning_rate(self.optimizers, scale)
        weights = self._sample_weights(step, batches)
        nats = model.forward_backward(batches, weights)
        loss_sum, valid, text, stopping, failed, *more = ranks.sum(
            *self._count(nats, batches),
            float(self.stop.raised),
            float(self.checkpointer.failed),
            *(float(value) for value in model.auxiliary.values()),
            *(weights.shares() if weights else ()),
        )
        self.loads = take_loads(model.parts, ranks)
        if failed:
            self.checkpointer.check()
        norm = model.gradient_norm() / max(1, valid)
        self._update(step, norm, valid)
        seconds = time.perf_counter() - began
        speed = self.tokens_per_step / seconds
        row = {
            "step": step,
            "loss": loss_sum / max(1, valid),
            "bits_per_byte": bits_per_byte(loss_sum, int(text)),
            "grad_norm": norm,
            "lr": scale * recipe.optimizer.lr,
            "tokens": (step + 1) * self.tokens_per_step,
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
                f"step {step + 1}: Newton's method did not converge {fallbacks:.0f} times; these "
                "rows were done one position at a time (newton_fallback/<layer>)"
            )
        return row, stopping > 0

    def _epochs(self, steps: int) -> dict[str, float]:
        """How often each source was read in the first `steps` steps."""
        read = self.training.epochs(steps * self.recipe.data.global_batch_size)
        names = self.reweighting.domains
        return {f"epochs/{names[number]}": epochs for number, epochs in read.items()}

    def _count(
        self, nats: torch.Tensor, batches: Iterable[MicroBatch]
    ) -> tuple[float, float, float]:
        """This rank's share of the global sums of nats, valid tokens and bytes of text."""
        if not self.ranks.counts:
            return 0.0, 0.0, 0.0
        targets = [batch.targets.cpu() for batch in batches]
        valid = sum(int((each >= 0).sum()) for each in targets)
        return nats.item(), valid, sum(count_bytes(each, self.byte_lengths) for each in targets)

    def _update(self, step: int, norm: float, valid: float) -> None:
        """Divides summed gradients by the global count of valid tokens, clips, and steps; a step
        whose gradients are not finite changes nothing, on any rank."""
        if math.isfinite(norm):
            clip = self.recipe.optimizer.clip_norm
            shrink = clip / norm if clip and norm > clip else 1.0
            scale_gradients(self.model.parts, shrink / max(1, valid))
            for optimizer in self.optimizers:
                optimizer.step()
            keep_bounds(self.model.parts)
            move_biases(self.model.parts, self.loads)
            self.state["skipped_in_a_row"] = 0
        else:
            self.state["skipped_steps"] += 1
            self.state["skipped_in_a_row"] += 1
            self.metrics.say(f"step {step + 1}: gradients are not finite, step skipped")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        limit = self.recipe.optimizer.max_skipped_steps
        if self.state["skipped_in_a_row"] > limit:
            raise UserError(
                f"gradients were not finite in {self.state['skipped_in_a_row']} steps in a row up "
                f"to step {step + 1} (optimizer.max_skipped_steps: {limit}); lower optimizer.lr "
                f"({self.recipe.optimizer.lr}) or look at the data of these steps"
            )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and bits per byte of the held-out text, of each domain and of all together; the
        same batches every time."""
        self.model.eval()
        found: dict[str, float] = {}
        everything = torch.zeros(3, dtype=torch.float64)
        for name, held_out in self.held_out.items():
            totals = torch.zeros(3, dtype=torch.float64)
            for number in range(self.recipe.evals.batches):
                batches = list(self._global_batch(held_out, number))
                totals += torch.tensor(self._count(self.model.evaluate(batches), batches))
            sums = self.ranks.sum(*totals.tolist())
            everything += torch.tensor(sums)
            if name:
                found |= _validation(f"validation/{name}", *sums)
        self.model.train()
        return _validation("validation", *everything.tolist()) | found

    def _validate_first(self, start: int) -> dict[str, float]:
        """Validation before the first step of a run, or of stages that go on from a run without;
        what the row of that step tells of it."""
        staged = bool(self.recipe.stages)
        if not self.held_out or ("learnt" in self.state if staged else start > 0):
            return {}
        first = self.validate()
        if start == 0:
            self.state["first_bits_per_byte"] = first["validation/bits_per_byte"]
        self.metrics.say(f"validation before training: {_describe(first)}")
        if not staged:
            return {}
        self.state["learnt"] = self.domains.begin(start, self._losses(first))
        return {name.replace("validation", "validation_before", 1): first[name] for name in first}

    def _losses(self, validation: dict[str, float]) -> dict[str, float]:
        """Loss by domain."""
        return {name: validation[f"validation/{name}/loss"] for name in self.held_out}

    def _enter(self, step: int) -> Stage:
        """The stage of `step`; what begins with it begins."""
        stage = stage_at(self.stages, step)
        if stage.number and step == stage.start:
            parts = self.model.parts
            lines = enter(stage, self.checkpointer, parts, self.optimizers, self.tokenizer)
            for line in lines:
                self.metrics.say(line)
        return stage

    def save(self) -> None:
        """Saves a checkpoint of the state after the last step."""
        step = self.state["step"]
        self.state["data"] = self.training.fingerprint(step)
        self.eval_jobs.hold(step)
        config = json.dumps(dataclasses.asdict(self.config), indent=1)
        tokenizer = {f"tokenizer/{self.tokenizer.file_name}": self.tokenizer.content}
        self.checkpointer.save(
            step,
            {
                "model": model_tensors(self.model.parts),
                "optimizer": optimizer_tensors(self.model.parts, self.optimizers),
            },
            self.state,
            {
                "model/config.json": config,
                SAMPLES: json.dumps(self.training.consumed(step), indent=1),
                **tokenizer,
            },
        )

    def _batches(self, start: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Steps from `start` on with this rank's micro-batches."""
        for step in range(start, self.steps):
            yield step, list(self._global_batch(self.training, step))

    def _global_batch(
        self, dataset: TokenDataset | Curriculum, number: int
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of global batch `number`."""
        for chunk in self._indices(number):
            yield micro_batch(dataset.batch(chunk), self.ranks)

    def _indices(self, number: int) -> list[list[int]]:
        """The samples of this rank's micro-batches of global batch `number`."""
        data, ranks = self.recipe.data, self.ranks
        return rank_indices(
            number,
            data.global_batch_size,
            ranks.data_index,
            ranks.layout.data_size,
            data.micro_batch_size,
        )

    def _sources(self, step: int) -> list[list[int]]:
        """The source of each sequence of this rank's micro-batches."""
        return [[self.training.source(i) for i in chunk] for chunk in self._indices(step)]

    def _sample_weights(self, step: int, batches: list[MicroBatch]) -> SampleWeights | None:
        """How much samples count in `step`; None where all count alike."""
        temperature = self.reweighting.temperature(step)
        if temperature is None:
            return None
        weights = SampleWeights(self.reweighting, temperature, batches, self._sources(step))
        if self.recipe.reweight.scope == "global_batch":
            weights.fix(self.model.token_losses(batches))
        return weights

    def _observe(
        self, step: int, batches: list[MicroBatch], last: bool
    ) -> tuple[dict[str, float], Tables]:
        """Validation, norms and tables, when they are due after `step`; the first also after the
        `last` step of a stage."""
        extra: dict[str, float] = {}
        tables: Tables = {}
        if self.held_out and (last or _due(step, self.recipe.evals.every)):
            extra |= self.validate()
            if batches and self.recipe.stages:
                extra |= self.domains.observe(step, self._losses(extra), self.state["learnt"])
        if batches and _due(step, self.recipe.logging.norms_every):
            extra |= layer_norms(self.model, batches)
            if self.loads:
                tables["expert_load"] = load_shares(self.loads)
                found, by_domain = self._routing(batches, self._sources(step))
                extra |= found
                tables |= by_domain
            # What these passes counted belongs to no step.
            take_loads(self.model.parts, self.ranks)
            take_counts(self.model.parts, self.ranks)
            take_gauges(self.model.parts, self.ranks)
        return extra, tables

    def _routing(
        self, batches: list[MicroBatch], sources: list[list[int]]
    ) -> tuple[dict[str, float], Tables]:
        """What routers do, in a model with mixtures of experts; and the load of experts by domain,
        where the data has several."""
        information, names = self.recipe.logging.router_information, self.reweighting.domains
        tables: Tables = {}
        if len(names) > 1:
            with DomainLoads(self.model, sources, names) as loads:
                found = routing(self.model, batches, information=information)
            tables = {f"expert_load/{name}": table for name, table in loads.tables().items()}
        else:
            found = routing(self.model, batches, information=information)
        if information:
            found |= expert_similarity(self.model)
        valid = sum(int((batch.targets >= 0).sum()) for batch in batches) * self.ranks.counts
        found |= router_gradients(self.model, batches, self.ranks.sum(valid)[0])
        return found, tables

    def _greet(self, beginning: list[str]) -> None:
        show_choices(self.metrics.say)
        cost, layout = self.cost, self.ranks.layout
        used = active_parameters(self.config)
        active = f" ({used:,} active)" if used < cost.parameters else ""
        shape = " x ".join(f"{name} {n}" for name, n in layout._asdict().items() if n > 1)
        self.metrics.say(
            f"{self.recipe.name}: {cost.parameters:,} parameters{active}, "
            f"{cost.flops / 1e6:,.1f} MFLOP a token forward, "
            f"{cost.state_bytes / 2**20:,.2f} MiB of state a sequence, "
            f"{self.tokens_per_step:,} tokens a step on {self.ranks.size} rank(s)"
            f"{f' ({shape})' if shape else ''}, {self.peak_flops / 1e9:,.0f} GFLOP/s of matrix "
            "products"
        )
        if note := self.reweighting.note():
            self.metrics.say(note)
        for line in [*describe(self.repeats), *warnings(self.repeats, cost.parameters), *beginning]:
            self.metrics.say(line)

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

    def _part(self, extra: dict[str, float]) -> None:
        """The closing words of a finished run."""
        digest = state_digest({"model": model_tensors(self.model.parts)})
        self.metrics.say(f"model digest after step {self.state['step']}: {digest}")
        if self.recipe.stages:
            for name in self.held_out:
                self.metrics.say(f"validation of {name}: {_describe(extra, f'validation/{name}')}")
            return
        if not self.held_out:
            return
        before = self.state["first_bits_per_byte"]
        if self.ranks.rank == 0:
            size = self.recipe.data.global_batch_size * self.recipe.evals.batches
            targets = (self.held_out[""].batch([i]).targets for i in range(size))
            counts = self.training.parts[0].own.token_counts()
            unigram = unigram_bits_per_byte(counts, targets, self.byte_lengths)
            known = "" if before is None else f"{before:.3f} before, "
            self.metrics.say(
                f"validation bits per byte: {known}{extra['validation/bits_per_byte']:.3f} after "
                f"training (a token-unigram model of the training data: {unigram:.3f})"
            )


def micro_batch(batch: Batch, ranks: Ranks) -> MicroBatch:
    """This rank's stretch of the sequences of `batch`, on its device."""
    whole = (batch.tokens, batch.targets, batch.segment_ids, document_positions(batch.segment_ids))
    size, rank = ranks.layout.cp, ranks.index("cp")
    parts = (tensor.unflatten(1, (size, -1))[:, rank] for tensor in whole)
    return MicroBatch(*(part.to(ranks.device, non_blocking=True) for part in parts))


def model_cost(config: ModelConfig, length: int) -> Cost:
    """What the whole model costs, in sequences of `length` tokens."""
    with torch.device("meta"):
        return Decoder(config).cost(length)


def active_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model that take part in one token's forward pass."""
    with torch.device("meta"):
        return Decoder(config).active_parameters()


def _due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after `step`."""
    return every > 0 and (step + 1) % every == 0


def _validation(name: str, nats: float, valid: float, text: float) -> dict[str, float]:
    return {
        f"{name}/loss": nats / max(1, valid),
        f"{name}/bits_per_byte": bits_per_byte(nats, int(text)),
    }


def _describe(values: dict[str, float], name: str = "validation") -> str:
    return f"{values[f'{name}/bits_per_byte']:.3f} bits per byte, loss {values[f'{name}/loss']:.3f}"
