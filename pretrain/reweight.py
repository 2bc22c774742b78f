"""Samples that count by their own loss: Sow et al., "Dynamic Loss-Based Sample Reweighting for
Improved LLM Pretraining" (arXiv 2502.06733).

Shapes: B sequences of T tokens in a micro-batch of a rank, D samples (documents, or 1) in a
sequence, M samples in the scope that weights are shared out in, over all ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rondo.kernels.cross_entropy.chunked import KEPT_BYTES
from rondo.parallel.build import PRECISIONS
from rondo.parallel.collectives import gather
from rondo.parallel.mesh import DATA, Ranks
from rondo.parallel.pipeline import MicroBatch
from rondo.pretrain.lengths import in_steps
from rondo.pretrain.recipe import Recipe, ReweightConfig, SourceConfig
from rondo.pretrain.stages import all_sources, replayed_runs, stages_of, total_steps

FEW = 32
"""Samples below which weights are noisy."""
STRATEGIES = {
    "linear": lambda h: (1 + h) / 2,
    "linupper": lambda h: (1 + h).clamp(max=1),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": torch.abs,
}
"""From a loss h, scaled to [-1, 1], to a score in [0, 1]."""


def sample_weights(
    losses: Tensor, tokens: Tensor, strategy: str, temperature: float, clip_quantile: float = 0.0
) -> Tensor:
    """Weights of the samples of one scope, which sum to 1.

    With h the losses scaled to [-1, 1] by their least and greatest, f = `STRATEGIES`(h), and n
    tokens in a sample: `w_i = n_i exp(f_i / r) / sum_j n_j exp(f_j / r)`, r the temperature. Among
    samples of one length this is softmax(f / r). It is the w that makes `sum_i w_i f_i - r KL(w ||
    n / sum n)` greatest, so as r grows the weighted loss becomes the plain mean over tokens.

    Args:
        losses: `(M,)`, mean loss of each sample's tokens, in nats.
        tokens: `(M,)`, how many these are; samples without any are left out (weight 0).
        strategy: a key of `STRATEGIES`.
        temperature: r, above 0.
        clip_quantile: losses beyond this quantile and its opposite count as these.

    Returns:
        `(M,)` float64; not finite if a loss is not.
    """
    counted, values = tokens > 0, losses.double()
    if clip_quantile:
        bounds = values.new_tensor([clip_quantile, 1 - clip_quantile])
        low, high = torch.nanquantile(values.where(counted, math.nan), bounds)
        values = values.clamp(low, high)
    low = values.where(counted, math.inf).amin()
    high = values.where(counted, -math.inf).amax()
    h = 2 * (values - (low + high) / 2) / (high - low).clamp(min=1e-6)
    scores = STRATEGIES[strategy](h).where(counted, 0)
    parts = tokens * ((scores - scores.amax()) / temperature).exp()
    return parts / parts.sum().clamp(min=1e-300)


class Reweighting:
    """A recipe's way to weight samples, on this rank. It has no state: everything follows from the
    step and the losses of its samples."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self.config, self.ranks, self.steps = recipe.reweight, ranks, total_steps(recipe)
        runs = dict.fromkeys(replayed_runs(stages_of(recipe)).values())
        self.domains = [*domain_names(all_sources(recipe)), *runs]
        data = recipe.data
        step_tokens = data.global_batch_size * data.sequence_length
        self._warmup = in_steps(self.config.warmup_steps, self.steps, step_tokens, up=True)
        sequences = data.micro_batch_size * ranks.layout.data_size
        self._sequences = min(sequences, data.global_batch_size)
        self._rows = data.micro_batch_size
        length = data.sequence_length // ranks.layout.cp
        self._sequence_bytes = length * PRECISIONS[recipe.precision].itemsize
        if self.config.scope == "global_batch":
            self._sequences = data.global_batch_size

    def temperature(self, step: int) -> float | None:
        """The temperature of a step; None where the loss is unweighted."""
        config = self.config
        if config.strategy == "uniform":
            return None
        return temperature(step, self._warmup, config)

    def notes(self, vocab_size: int) -> Iterator[str]:
        """Warnings: where few sequences share weights, and, on a CPU, where the logits of a
        micro-batch of `vocab_size` words are too large to be kept until these are known."""
        if self.config.strategy == "uniform":
            return
        if self._sequences < FEW:
            yield (
                f"reweight.scope: {self._sequences} sequences share each {self.config.scope}'s "
                f"weights, which are noisy below {FEW}"
            )
        kept = KEPT_BYTES // (self._sequence_bytes * vocab_size)
        # The loss over tensor-parallel ranks makes them twice in any case.
        whole = self.ranks.layout.tp == 1 and self.ranks.device.type == "cpu"
        if whole and self._rows > kept:
            size = self._rows * self._sequence_bytes * vocab_size / 2**20
            fits = f"data.micro_batch_size {kept}" if kept else "a shorter sequence"
            yield (
                f"reweight: a micro-batch's logits take {size:,.0f} MiB and are made twice, above "
                f"{KEPT_BYTES >> 20} MiB; a small model's steps took a fifth longer so; {fits} "
                "spares it"
            )


def temperature(step: int, warmup: int, config: ReweightConfig) -> float | None:
    """The temperature of `step` (0-based) after a warm-up of `warmup` steps; None where the warm-up
    keeps to the unweighted loss."""
    if step >= warmup:
        return config.temperature
    if config.warmup == "plain":
        return None
    left = {
        "step": 1.0,
        "linear": 1 - step / warmup,
        "cosine": (1 + math.cos(math.pi * step / warmup)) / 2,
    }[config.warmup]
    return config.temperature + (config.start_temperature - config.temperature) * left


def domain_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A short name for each source: the last part of its path, numbered where that is not one."""
    names = [Path(source.path).name or "source" for source in sources]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{i}" for i, name in enumerate(names)]


class SampleWeights:
    """The weights of this rank's samples in one step: a `Weigh` for `forward_backward`.

    Losses are summed over sequence-parallel ranks and gathered over data-parallel ones in one
    collective a scope, by ranks' places in the mesh. Tensor-parallel ranks do so each for itself,
    pipeline ranks where the model ends.

    Args:
        reweighting: what the recipe says.
        temperature: that of the step.
        batches: the rank's micro-batches.
        sources: the source of each of their sequences.
    """

    def __init__(
        self,
        reweighting: Reweighting,
        temperature: float,
        batches: Sequence[MicroBatch],
        sources: Sequence[Sequence[int]],
    ) -> None:
        self._of, self._temperature = reweighting, temperature
        self._config, self._ranks = reweighting.config, reweighting.ranks
        self._batches, self._sources = batches, sources
        self._fixed: list[Tensor] = []
        self._samples = self._count_samples()
        zero = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        self._number = self._weighted = self._squares = self._largest = zero
        self._lowest, self._highest = zero + math.inf, zero - math.inf
        self._mass = zero.expand(len(reweighting.domains))

    def fix(self, losses: Sequence[Tensor]) -> None:
        """Shares weights out among all micro-batches, of `losses` `(B, T)` each; no losses on ranks
        that do not hold the end of a pipeline. Without this each micro-batch shares out its own."""
        if losses:
            self._fixed = self._share_out(losses, self._batches)

    def __call__(self, number: int, losses: Tensor) -> Tensor:
        """How often each token of micro-batch `number` counts, `(B, T)`; 1 on average over a
        scope."""
        batch = self._batches[number]
        [weights] = self._fixed[number : number + 1] or self._share_out([losses], [batch])
        self._account(weights * (batch.targets >= 0), losses, self._sources[number])
        return weights.to(losses.dtype)

    def shares(self) -> list[float]:
        """This rank's shares of the sums over ranks that `metrics` takes."""
        ranks = self._ranks
        sums = torch.cat((torch.stack((self._weighted, self._squares)), self._mass))
        alike = torch.stack((self._number, self._largest, self._lowest, self._highest))
        first = ranks.data_index == ranks.index("cp") == 0
        if not ranks.counts:
            return [0.0] * (len(sums) + len(alike))
        return [*(alike if first else torch.zeros_like(alike)).tolist(), *sums.tolist()]

    def metrics(self, sums: Sequence[float], tokens: float) -> dict[str, float]:
        """What `pretrain/README.md` lists, from the `shares` of all ranks, in a step with so many
        valid `tokens`."""
        number, largest, lowest, highest, weighted, squares, *mass = sums
        tokens = max(1, tokens)
        names = (f"reweight/mass/{name}" for name in self._of.domains)
        return {
            "reweight/loss": weighted / tokens,
            "reweight/effective_samples": number * tokens / max(squares, 1e-300),
            "reweight/largest_weight": largest,
            "reweight/lowest_loss": lowest,
            "reweight/highest_loss": highest,
            "reweight/temperature": self._temperature,
            **{name: value / tokens for name, value in zip(names, mass, strict=True)},
        }

    def _count_samples(self) -> int:
        """D: samples in a sequence at most, over all ranks."""
        if self._config.unit == "sequence":
            return 1
        most = torch.stack([batch.segment_ids.max() for batch in self._batches]).max()
        if self._ranks.mesh is not None:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._ranks.group(DATA))
        return int(most) + 1

    def _share_out(self, losses: Sequence[Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Weights `(B, T)` float64 of the tokens of `batches`, one scope, by micro-batch."""
        targets = torch.cat([batch.targets for batch in batches])
        which = torch.cat([batch.segment_ids for batch in batches]).long()
        if self._config.unit == "sequence":
            which = torch.zeros_like(which)
        nats = sum_samples(torch.cat(list(losses)).double(), which, self._samples)
        tokens = sum_samples((targets >= 0).double(), which, self._samples)
        everyone, own = self._gather(torch.stack((nats, tokens)))
        nats, tokens = everyone
        means = nats / tokens.clamp(min=1)
        config = self._config
        weights = sample_weights(
            means, tokens, config.strategy, self._temperature, config.clip_quantile
        )
        times = weights * tokens.sum() / tokens.clamp(min=1)
        counted = tokens > 0
        self._number = self._number + counted.sum()
        self._largest = torch.maximum(self._largest, times.amax())
        self._lowest = torch.minimum(self._lowest, means.where(counted, math.inf).amin())
        self._highest = torch.maximum(self._highest, means.where(counted, -math.inf).amax())
        by_token = times[own].view(-1, self._samples).gather(1, which)
        return list(by_token.split([len(batch.targets) for batch in batches]))

    def _gather(self, sums: Tensor) -> tuple[Tensor, slice]:
        """Sums `(2, B, D)` of all ranks as `(2, M)`, and where this rank's samples are in them."""
        size = sums[0].numel()
        if self._ranks.mesh is None:
            return sums.flatten(1), slice(size)
        layout, index = self._ranks.layout, self._ranks.data_index
        # By place in the mesh: data-parallel ranks are its slower dimensions, cp the fastest.
        parts = gather(sums.flatten(1), self._ranks.group(DATA))
        whole = parts.unflatten(0, (layout.data_size, layout.cp)).sum(1)
        return whole.movedim(1, 0).flatten(1), slice(index * size, (index + 1) * size)

    def _account(self, weights: Tensor, losses: Tensor, sources: Sequence[int]) -> None:
        """Adds up what is told of a micro-batch's weights `(B, T)`, 0 where there is no target."""
        self._weighted = self._weighted + (weights * losses).sum()
        self._squares = self._squares + weights.square().sum()
        owners = torch.tensor([[s == d for s in sources] for d in range(len(self._mass))])
        self._mass = self._mass + owners.to(weights) @ weights.sum(1)


def sum_samples(values: Tensor, which: Tensor, samples: int) -> Tensor:
    """Sums `(B, samples)` of `values` `(B, T)` by sample; `which` `(B, T)` does not decrease in a
    row. In a fixed order, unlike a scattered sum on a GPU."""
    if samples == 1:
        return values.sum(1, keepdim=True)
    rows = torch.arange(len(which), device=which.device)[:, None] * samples
    lengths = torch.bincount((which + rows).flatten(), minlength=len(which) * samples)
    sums = torch.segment_reduce(values.flatten(), "sum", lengths=lengths, initial=0, unsafe=True)
    return sums.view(-1, samples)
