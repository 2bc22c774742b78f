"""Pipeline parallel: runs of layers on different ranks, with the schedules of torch.

Two letters: S stages, M micro-batches. A stage hands on the activations and whatever crosses
layers beside them (`ChannelMixer.carried`), gradients included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.distributed.tensor import DTensor

from rondo.models import Decoder, ModelConfig
from rondo.models.block import Block
from rondo.parallel.mesh import Ranks


class Schedule(NamedTuple):
    """One order of forward and backward passes."""

    kind: type[Any]
    stages_per_rank: int


SCHEDULES = {
    "gpipe": Schedule(schedules.ScheduleGPipe, 1),
    "1f1b": Schedule(schedules.Schedule1F1B, 1),  # arXiv 2006.09503
    "interleaved": Schedule(schedules.ScheduleInterleaved1F1B, 2),  # arXiv 2104.04473
    "zero_bubble": Schedule(schedules.ScheduleInterleavedZeroBubble, 2),  # arXiv 2401.10241
}


class MicroBatch(NamedTuple):
    """What one forward pass reads; all tensors `(B, T)`, this rank's stretch of the sequences."""

    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor
    positions: Tensor


Weigh = Callable[[int, Tensor], Tensor]
"""From the number of a micro-batch in its step, and the losses `(B, T)` of its tokens, detached, to
the weights of these, of the same shape. Called on ranks that hold the end of a model, in order."""


def weighted_loss(number: int, losses: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
    """The sum of `losses` `(B, T)` (float64, detached), and that of the weighted ones."""
    constant = losses.detach()
    return constant.double().sum(), (losses * weigh(number, constant)).sum()


def stage_count(pp: int, schedule: str) -> int:
    """Stages of a pipeline of `pp` ranks."""
    return 1 if pp == 1 else pp * SCHEDULES[schedule].stages_per_rank


def rank_stages(rank: int, pp: int, schedule: str) -> list[int]:
    """The stages that pipeline rank `rank` holds."""
    if pp == 1:
        return [0]
    return [rank + pp * i for i in range(SCHEDULES[schedule].stages_per_rank)]


def layer_flops(config: ModelConfig, length: int) -> list[float]:
    """What each layer costs by what its modules say (FLOPs at `length` tokens); the output matrix
    counts for the last."""
    with torch.device("meta"):
        blocks = [Block(config, spec, i) for i, spec in enumerate(config.layers())]
    costs = [block.cost(length).flops for block in blocks]
    costs[-1] += 2.0 * config.vocab_size * config.dim
    return costs


def split_evenly(costs: Sequence[float], parts: int) -> list[range]:
    """Cuts `costs` into `parts` runs, none empty, whose largest sum is the least possible."""
    if not 1 <= parts <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot make {parts} stages")
    sums = [0.0, *itertools.accumulate(costs)]
    # best[n]: least possible largest sum when the first n costs make the parts so far; the cut
    # before the last of these parts is remembered in `cuts`.
    best, cuts = [0.0] + [math.inf] * len(costs), []
    for _ in range(parts):
        options = [
            min(((max(best[m], sums[n] - sums[m]), m) for m in range(n)), default=(math.inf, 0))
            for n in range(len(sums))
        ]
        best, came_from = map(list, zip(*options, strict=True))
        cuts.append(came_from)
    bounds = [len(costs)]
    for came_from in reversed(cuts):
        bounds.append(came_from[bounds[-1]])
    return [range(a, b) for a, b in itertools.pairwise(reversed(bounds))]


class Pipeline:
    """Runs the parts of one rank, its stages, in turns with the other ranks.

    Args:
        parts: this rank's parts of the model, as `rank_stages` lists them.
        ranks: where this process stands.
        schedule: a key of `SCHEDULES`.
        micro_batches: forward passes a step, of the shapes of `example`.
        example: one of them.
    """

    def __init__(
        self,
        parts: list[Decoder],
        ranks: Ranks,
        schedule: str,
        micro_batches: int,
        example: MicroBatch,
    ) -> None:
        pp, kind = ranks.layout.pp, SCHEDULES[schedule]
        numbers = rank_stages(ranks.index("pp"), pp, schedule)
        total = stage_count(pp, schedule)
        stages = [
            _Stage(part, number, total, ranks, example)
            for part, number in zip(parts, numbers, strict=True)
        ]
        self._parts, self._nats = parts, list[Tensor]()
        self._weigh: Weigh | None = None
        self._starts, self._ends = 0 in numbers, total - 1 in numbers
        self.aux: list[dict[str, Tensor]] = []
        """Auxiliary losses of the micro-batches of the last run, on ranks that hold its end."""
        self._schedule = kind.kind(
            stages[0] if kind.stages_per_rank == 1 else stages,
            micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def run(
        self, batches: Sequence[MicroBatch], *, backward: bool = True, weigh: Weigh | None = None
    ) -> Tensor:
        """Forward passes over `batches`, with or without their backward passes, which are those of
        losses weighted by `weigh`; the unweighted sum of the losses, float64, on ranks that hold
        the last stage, and zero on others."""
        self._weigh = weigh
        whole = MicroBatch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
        inputs = (whole.tokens,) if self._starts else ()
        self._nats.clear()
        self.aux.clear()
        run = self._schedule.step if backward else self._schedule.eval
        options: dict[str, Any] = {"return_outputs": False} if backward else {}
        run(
            *inputs,
            target=whole.targets if self._ends else None,
            segment_ids=whole.segment_ids,
            positions=whole.positions,
            **options,
        )
        nats = [torch.zeros((), dtype=torch.float64, device=whole.tokens.device), *self._nats]
        return torch.stack(nats).sum()

    def _loss(self, output: Any, targets: Tensor) -> Tensor:
        """The loss of a micro-batch from what the last stage gives; keeps its parts."""
        last = next(part for part in self._parts if part.last)
        hidden, *added = (output,) if isinstance(output, Tensor) else output
        if self._weigh is None:
            nats = loss = last.hidden_loss(hidden, targets)
        else:
            losses = last.hidden_loss(hidden, targets, reduction="none")
            nats, loss = weighted_loss(len(self._nats), losses, self._weigh)
        # Not `sum()`, whose gradient is one number seen many times, and cannot be sent.
        aux: dict[str, Tensor] = {
            name: each.flatten() @ torch.ones_like(each.detach()).flatten()
            for name, each in zip(last.loss_weights, added, strict=True)
        }
        self._nats.append(nats.detach().double())
        self.aux.append({name: value.detach() for name, value in aux.items()})
        return last.total_loss(loss, aux)


class _Stage(PipelineStage):
    """A part of the model between tensors that are received and tensors that are sent."""

    def __init__(
        self, part: Decoder, number: int, total: int, ranks: Ranks, example: MicroBatch
    ) -> None:
        tokens = example.tokens.to("meta")
        batch, time = tokens.shape
        kind = part.activation_dtype or next(part.parameters()).dtype
        between = [(part.config.dim, kind)]
        wide = torch.promote_types(kind, torch.float32)
        between += [(width, wide) for width in part.carried.values()]
        crossing = tuple(
            tokens.new_empty(batch, time // ranks.layout.tp, width, dtype=dtype).requires_grad_()
            for width, dtype in between
        )
        names = list(part.carried)
        ends = crossing[:1] + tuple(crossing[1 + names.index(name)] for name in part.loss_weights)
        super().__init__(
            part,
            number,
            total,
            ranks.device,
            input_args=(tokens,) if part.first else crossing,
            output_args=ends if part.last else crossing,
            group=ranks.group("pp"),
        )

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """One backward pass, or its half for inputs or weights."""
        if backward_type != "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        # Weights that meet in one operator would free each other's graph. It goes with the last
        # reference to it anyway.
        groups = _joined(bwd_kwargs["param_groups"])
        done = stage_backward_weight(self.submod.parameters(), groups, retain_graph=True)
        for param in self.submod.parameters():
            _lay_out(param)
        return done, None

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass; `args` are tokens, or hidden states and what crosses beside them."""
        part: Any = self.submod
        carry = dict(zip(part.carried, args[1:], strict=False))
        output = part(args[0], carry=carry, return_state=False, **kwargs)
        if part.last and not part.loss_weights:
            return output.hidden
        # A schedule detaches what a stage gives, in place, which views (inputs that are only
        # handed on) do not allow.
        names = part.loss_weights if part.last else part.carried
        outputs = (output.hidden, *(output.carry[name] for name in names))
        return tuple(x.clone() if x._is_view() else x for x in outputs)


def _lay_out(param: torch.nn.Parameter) -> None:
    """Makes a gradient contiguous, as autograd would: halves of a backward pass leave it as the
    last operator made it (transposed, say), and fused optimizers take it for laid out like its
    weight, without a word."""
    grad = param.grad
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    if grad is not None and local is not None and not local.is_contiguous():
        param.grad = grad.contiguous()


def _joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Weights that meet anywhere in one group. torch 2.13 leaves a weight that meets others at some
    of its uses in two groups, and would add its gradient twice."""
    joined: list[tuple[set[Any], dict[Any, Any]]] = []
    for group in groups:
        params = set(group["params"])
        gradients = dict(zip(group["intermediates"], group.get("grads") or [], strict=False))
        meeting = [each for each in joined if each[0] & params or each[1].keys() & gradients.keys()]
        for each in meeting:
            joined.remove(each)
            params |= each[0]
            gradients |= each[1]
        joined.append((params, gradients))
    return [
        {"params": params, "intermediates": list(nodes), "grads": list(nodes.values())}
        for params, nodes in joined
        if nodes
    ]
