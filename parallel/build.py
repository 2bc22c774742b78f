"""From a configuration to a model that is laid out over ranks and runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from rondo.models import Decoder, ModelConfig
from rondo.models.init import initial_values
from rondo.parallel import data_parallel
from rondo.parallel.checkpoint import model_tensors
from rondo.parallel.checkpointing import checkpoint_block
from rondo.parallel.config import ParallelConfig
from rondo.parallel.expert import expert_mesh, shard_experts
from rondo.parallel.mesh import Ranks, submesh
from rondo.parallel.pipeline import (
    MicroBatch,
    Pipeline,
    Weigh,
    layer_flops,
    rank_stages,
    split_evenly,
    stage_count,
    weighted_loss,
)
from rondo.parallel.sequence import shard_sequence
from rondo.parallel.tensor import shard_tensors

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class ParallelModel:
    """This rank's parts of a model, and how to run them.

    Parts are built on the meta device, then, in this order: sequence-parallel operators, expert
    parallel, tensor parallel, activation checkpointing, torch.compile, FSDP2; then each rank
    materialises and fills its part, so that no rank ever holds more than that and one tensor. The
    initial values depend on `seed` alone, not on the layout.

    Args:
        config: the model.
        ranks: where this process stands.
        parallel: layout and options.
        precision: type of activations and products; parameters are float32, except that
            "float64" makes everything float64 (for tests).
        seed: of the initial values.
        length: tokens in a sequence, for the cost of layers.
        costs: what each layer costs, to cut a pipeline into stages of about one cost; None for
            their FLOPs.
        compile: run each block through torch.compile.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        parallel: ParallelConfig,
        *,
        precision: str,
        seed: int,
        length: int,
        costs: Sequence[float] | None = None,
        compile: bool = False,
    ) -> None:
        self.config, self.ranks, self.parallel = config, ranks, parallel
        layout = ranks.layout
        self.stages = stage_count(layout.pp, parallel.pipeline_schedule)
        cuts = split_evenly(costs or layer_flops(config, length), self.stages)
        numbers = rank_stages(ranks.index("pp"), layout.pp, parallel.pipeline_schedule)
        self._pipeline: Pipeline | None = None
        self._experts: DeviceMesh | None = None
        if parallel.ep > 1:
            self._experts = expert_mesh(ranks.device.type, layout, parallel.ep)
        self._aux: dict[str, Tensor] = {}
        self.auxiliary: dict[str, Tensor] = {}
        """This rank's share of the summed auxiliary losses of the last `forward_backward`,
        unweighted. Unlike nats, tensor-parallel ranks each have a share of them."""
        self.parts = [
            build_part(
                config, cuts[number], ranks, parallel, PRECISIONS[precision], compile, self._experts
            )
            for number in numbers
        ]
        for part in self.parts:
            with torch.device("meta"):
                template = Decoder(config, layers=part.layers)
            self._materialise(part, initial_values(template, seed))

    def _materialise(self, part: Decoder, values: Iterable[tuple[str, Tensor]]) -> None:
        """Brings a part from the meta device to this rank's, with these parameters."""
        part.to_empty(device=self.ranks.device)
        for buffer in part.buffers():
            buffer.zero_()
        data_parallel.fill(part, values)

    def model_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name (`checkpoint.model_tensors`). Collective."""
        return model_tensors(self.parts)

    def train(self) -> None:
        """Puts all parts in training mode."""
        for part in self.parts:
            part.train()

    def eval(self) -> None:
        """Puts all parts in evaluation mode."""
        for part in self.parts:
            part.eval()

    def forward_backward(self, batches: Sequence[MicroBatch], weigh: Weigh | None = None) -> Tensor:
        """Adds the gradients of the summed cross-entropy of `batches` and of the auxiliary losses,
        and completes them; returns this rank's share of the sum of cross-entropies (float64).
        `weigh` weights the cross-entropies in the gradients, and there only.

        Divided by the number of targets of all ranks, these are the gradients of the mean over
        targets and of the auxiliary losses' means over all tokens, targets or not: experts take
        every token."""
        self._weigh_auxiliary(batches)
        if self.ranks.layout.pp > 1:
            pipeline = self._piped(batches)
            nats, aux = pipeline.run(batches, weigh=weigh), pipeline.aux
        else:
            nats, aux = torch.zeros((), dtype=torch.float64, device=self.ranks.device), []
            for i, batch in enumerate(batches):
                self._accumulate(last=i + 1 == len(batches))
                if weigh is None:
                    plain = loss = self._loss(batch)
                else:
                    plain, loss = weighted_loss(i, self._token_losses(batch), weigh)
                self._backward(self.parts[0].total_loss(loss, self._aux))
                nats += plain.detach()
                aux.append({name: value.detach() for name, value in self._aux.items()})
        self._finish_gradients()
        zero = nats.new_zeros(())
        self.auxiliary = {
            name: sum((each[name] for each in aux), zero) for name in self.parts[0].loss_weights
        }
        return nats

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """This rank's share of the summed losses of `batches`, without gradients (float64)."""
        if self.ranks.layout.pp > 1:
            return self._piped(batches).run(batches, backward=False)
        return torch.stack([self._loss(batch).double() for batch in batches]).sum()

    @torch.no_grad()
    def token_losses(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The cross-entropies `(B, T)` of each of `batches`, of a model in evaluation mode; none on
        ranks that do not hold the end of a pipeline."""
        self.eval()
        found: list[Tensor] = []
        if self.ranks.layout.pp > 1:

            def keep(number: int, losses: Tensor) -> Tensor:
                found.append(losses)
                return losses

            self._piped(batches).run(batches, backward=False, weigh=keep)
        else:
            found = [self._token_losses(batch) for batch in batches]
        self.train()
        return found

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients, the same on every rank."""
        return data_parallel.gradient_norm(self.parts, self.ranks, self.stages)

    def gradient_norm_over(
        self, batches: Sequence[MicroBatch], chosen: Callable[[str], bool]
    ) -> float:
        """The 2-norm of the gradients that `forward_backward` of `batches` gives the parameters
        whose names are `chosen`, the same on every rank. Leaves no gradients. Collective."""
        self.forward_backward(batches)
        norm = data_parallel.gradient_norm(self.parts, self.ranks, self.stages, chosen)
        for part in self.parts:
            part.zero_grad()
        return norm

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _finish_gradients(self) -> None:
        data_parallel.finish_gradients(self.parts, self.ranks)

    def _weigh_auxiliary(self, batches: Sequence[MicroBatch]) -> None:
        if not self.parts[0].loss_weights:
            return
        targets = [batch.targets for batch in batches] if self.ranks.counts else []
        valid = float(sum((each >= 0).sum() for each in targets))
        valid, tokens = self.ranks.sum(valid, sum(each.numel() for each in targets))
        for part in self.parts:
            part.auxiliary_weight = valid / tokens

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Cross-entropy of the whole model, summed over tokens; auxiliary losses in `_aux`."""
        return self._losses(batch, "sum")

    def _token_losses(self, batch: MicroBatch) -> Tensor:
        """As `_loss`, `(B, T)`."""
        return self._losses(batch, "none")

    def _losses(self, batch: MicroBatch, reduction: str) -> Tensor:
        losses, self._aux = part_losses(self.parts[0], batch, reduction)
        return losses

    def _piped(self, batches: Sequence[MicroBatch]) -> Pipeline:
        if self._pipeline is None:
            self._pipeline = Pipeline(
                self.parts,
                self.ranks,
                self.parallel.pipeline_schedule,
                len(batches),
                batches[0],
            )
        return self._pipeline

    def _accumulate(self, last: bool) -> None:
        """Only in the last backward pass of a step are gradients reduced over ranks."""
        for part in self.parts:
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(last)
                part.set_is_last_backward(last)


def part_losses(
    model: Decoder, batch: MicroBatch, reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropies of a whole model, reduced as `Decoder.hidden_loss` says, and its summed
    auxiliary losses."""
    output = model(
        batch.tokens,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        return_state=False,
    )
    return model.hidden_loss(output.hidden, batch.targets, reduction=reduction), output.aux


def tensor_parallel(engine: str) -> Callable[[Decoder, DeviceMesh], None]:
    """What divides a model over tensor-parallel ranks under `engine`."""
    if engine != "megatron":
        return shard_tensors
    from rondo.parallel.engines.megatron import shard_with_megatron  # takes seconds

    return shard_with_megatron


def build_part(
    config: ModelConfig,
    layers: range,
    ranks: Ranks,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    compile: bool = False,
    experts: DeviceMesh | None = None,
) -> Decoder:
    """A run of layers, laid out over ranks (its experts over an `expert_mesh`); its parameters
    are on the meta device."""
    with torch.device("meta"):
        part = Decoder(config, layers=layers)
    if dtype == torch.float64:
        part.double()
    part.activation_dtype = dtype
    names = [name for name, _ in part.named_parameters()]
    mesh, layout = ranks.mesh, ranks.layout
    if layout.cp > 1:
        shard_sequence(part, ranks.group("cp"), parallel.cp_exchange)
    if experts is not None:
        shard_experts(part, experts)
    if mesh is not None and layout.tp > 1:
        tensor_parallel(parallel.engine)(part, submesh(mesh, "tp"))
    for block in part.blocks.values():
        checkpoint_block(block, parallel.activation_checkpointing)
        if compile:
            # Dynamic shapes take minutes to reason about where a mixer unrolls its chunks.
            block.compile(dynamic=False)
    if mesh is not None and not parallel.megatron.distributed_optimizer:
        data_parallel.shard_parameters(part, mesh, dtype, experts)
    if [name for name, _ in part.named_parameters()] != names:
        raise RuntimeError("sharding changed the parameters' names")
    return part
