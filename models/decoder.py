"""The language model: embedding, blocks, final norm, output matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rondo.errors import UserError
from rondo.kernels import linear_cross_entropy, soft_cap
from rondo.kernels.segments import document_positions, first_document
from rondo.models.block import Block
from rondo.models.config import ModelConfig, make_options, problems
from rondo.models.init import initial_values
from rondo.models.layers import Embedding, Linear, RMSNorm
from rondo.models.lora import adapt
from rondo.models.mixer import ChannelMixer, Cost, SequenceContext, State, module_cost
from rondo.models.registry import FFNS, MIXERS


class DecoderState(NamedTuple):
    """What a decoder carries from one call to the next."""

    layers: list[State]
    """State of each layer's mixer."""
    length: Tensor
    """`(B,)` int64: tokens of the current document seen so far."""


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: Tensor
    """`(B, T, dim)`, after the final norm; `Decoder.logits` turns it into logits. Of a part that
    does not end the model: what the next part takes in."""
    state: DecoderState | None
    """State after the last token; None when it was not asked for."""
    aux: dict[str, Tensor]
    """Auxiliary losses by name, each a sum over tokens, not yet weighted
    (`ChannelMixer.losses`); of a part that does not end the model, none."""
    carry: dict[str, Tensor]
    """What crosses layers beside the activations (`ChannelMixer.carried`)."""


class Decoder(nn.Module):
    """A decoder-only language model, or a run of its layers.

    Args:
        config: what to build; `vocab_size` must be given.
        layers: which layers; None for all. The embedding comes with the first layer, final norm
            and output matrix with the last. Names and initial values are those of the whole.
        seed: seeds the initial values; None draws one from torch's global generator. On the
            meta device nothing is initialised.

    Raises:
        UserError: the configuration is impossible; every problem is named.
    """

    def __init__(
        self, config: ModelConfig, *, layers: range | None = None, seed: int | None = None
    ) -> None:
        super().__init__()
        found = problems(config)
        if config.vocab_size < 1:
            found.append(f"model.vocab_size: must be at least 1, got {config.vocab_size}")
        if found:
            raise UserError("\n".join(found))
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        self.layers = range(config.num_layers) if layers is None else layers
        self.first, self.last = self.layers.start == 0, self.layers.stop == config.num_layers
        self.cross_entropy: Callable[..., Tensor] = linear_cross_entropy
        specs = config.layers()
        ffns = [FFNS[name] for name in dict.fromkeys(spec.ffn for spec in specs) if name != "none"]
        self.carried = {n: width for ffn in ffns for n, width in ffn.carried(config).items()}
        self.token_weight = self.auxiliary_weight = 1.0
        self.loss_weights = {n: weight for ffn in ffns for n, weight in ffn.losses(config).items()}
        self.embedding: Embedding | None = None
        if self.first or (self.last and config.tie_embeddings):
            self.embedding = Embedding(config.vocab_size, config.dim, std=config.init_std)
        # By number, not in a list: parts of a model keep its names.
        self.blocks = nn.ModuleDict({str(i): Block(config, specs[i], i) for i in self.layers})
        self.shared = nn.ModuleDict()
        for spec in specs:  # of all layers, in every part: they are small
            cls, options = MIXERS[spec.mixer], make_options(spec.mixer, spec.options)
            self._share(cls.shared_modules(config, options))
        for ffn in ffns:
            self._share(ffn.shared_modules(config))
        self.norm: RMSNorm | None = None
        self.head: Linear | None = None
        if self.last:
            self.norm = RMSNorm(config.dim, config)
        if self.last and not config.tie_embeddings:
            self.head = Linear(config.dim, config.vocab_size, std=config.init_std)
        if config.lora_rank:
            adapt(self, config, whole=self.first and self.last)
        if next(self.parameters()).device.type != "meta":
            self.init_weights(int(torch.randint(2**31, ())) if seed is None else seed)

    def _share(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            if name not in self.shared:
                self.shared[name] = module

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Sets every parameter to its initial value, a function of the seed and its name."""
        params = dict(self.named_parameters())
        for name, value in initial_values(self, seed):
            params[name].copy_(value)

    def forward(
        self,
        tokens: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        carry: dict[str, Tensor] | None = None,
        state: DecoderState | None = None,
        return_state: bool = True,
    ) -> Output:
        """Runs the model.

        Args:
            tokens: `(B, T)` int64 token ids; in a part of a model that does not start it, the
                `hidden` `(B, T, dim)` of the part before.
            segment_ids: `(B, T)` integer, non-decreasing in a row; other id, other document.
            positions: `(B, T)` int64, index of each token within its document; None where rows
                begin with a document (or go on from `state`).
            carry: the `carry` of the part before.
            state: state to go on from; it belongs to the document of position 0.
            return_state: False lets each layer's state (and KV cache) go at once.
        """
        if tokens.ndim != (2 if self.first else 3) or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (batch, time >= 1), got {tuple(tokens.shape)}")
        if positions is None:
            positions = _positions(tokens, segment_ids, state)
        shared = {name: module() for name, module in self.shared.items()}
        ctx = SequenceContext(positions, segment_ids, shared, keep_state=return_state)
        x = tokens
        if self.first and self.embedding is not None:
            x = self.embedding(tokens)
            if self.activation_dtype is not None:
                x = x.to(self.activation_dtype)
            kind = torch.promote_types(x.dtype, torch.float32)
            carry = {n: x.new_zeros(*x.shape[:2], w, dtype=kind) for n, w in self.carried.items()}
        states, carry = [], carry or {}
        for i, block in enumerate(self.blocks.values()):
            x, carry, after = block(x, carry, ctx, None if state is None else state.layers[i])
            states.append(after)
        x = x if self.norm is None else self.norm(x)
        after = DecoderState(states, positions[:, -1] + 1) if return_state else None
        aux = {name: carry[name].sum() for name in self.loss_weights} if self.last else {}
        return Output(x, after, aux, carry)

    @property
    def output_weight(self) -> Tensor:
        """`(vocab, dim)` matrix from hidden states to logits."""
        holder = self.embedding if self.head is None else self.head
        if holder is None:
            raise ValueError(f"layers {self.layers} do not end the model: no output matrix")
        return holder.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` hidden states to `(..., vocab)` logits, with the model's cap on them."""
        logits = hidden @ self.output_weight.to(hidden.dtype).T
        return soft_cap(logits, self.config.logit_cap)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Cross-entropy in nats of `targets` `(B, T)`, -100 where there is none; logits are
        never held for all tokens. `reduction`: "sum", "mean" (over valid tokens) or "none".
        Auxiliary losses are not in it (`auxiliary_loss`)."""
        output = self(tokens, segment_ids=segment_ids, positions=positions, return_state=False)
        return self.hidden_loss(output.hidden, targets, reduction=reduction)

    def hidden_loss(self, hidden: Tensor, targets: Tensor, *, reduction: str = "sum") -> Tensor:
        """The loss of `loss`, from the model's `hidden` `(B, T, dim)`."""
        return self.cross_entropy(
            hidden,
            self.output_weight,
            targets,
            reduction=reduction,
            logit_cap=self.config.logit_cap,
        )

    def auxiliary_loss(self, aux: dict[str, Tensor]) -> Tensor | float:
        """The weighted sum of an output's `aux`, to be added to the summed cross-entropy. Where
        only `n` of `m` tokens have a target and the whole is divided by n, an `auxiliary_weight` of
        n / m makes it a mean over all tokens."""
        weights = {n: self.auxiliary_weight * w for n, w in self.loss_weights.items()}
        return sum((weight * aux[name] for name, weight in weights.items()), 0.0)

    def total_loss(self, nats: Tensor, aux: dict[str, Tensor]) -> Tensor:
        """What training minimises: the summed cross-entropy and the auxiliary losses."""
        return self.token_weight * nats + self.auxiliary_loss(aux)

    def cost(self, length: int) -> Cost:
        """Cost in sequences of `length` tokens. The embedding look-up is free, the output
        matrix is not."""
        head = 2.0 * self.config.vocab_size * self.config.dim if self.last else 0.0
        total = Cost(head, 0, 0)
        for block in self.blocks.values():
            assert isinstance(block, Block), "nn.ModuleDict forgets its element type"
            total = total + block.cost(length)
        return Cost(total.flops, module_cost(self).parameters, total.state_bytes)

    def active_parameters(self) -> int:
        """Parameters that take part in one token's forward pass: of experts, those it goes to."""
        mixers = (m for m in self.modules() if isinstance(m, ChannelMixer))
        idle = sum(mixer.idle_parameters() for mixer in mixers)
        return sum(p.numel() for p in self.parameters()) - idle

    def matrix_names(self) -> set[str]:
        """Names of the weights inside blocks that are plain matrices (what Muon updates)."""
        return {
            f"blocks.{i}.{name}.weight"
            for i, block in self.blocks.items()
            for name, module in block.named_modules()
            if isinstance(module, Linear)
        }

    def float32_names(self) -> set[str]:
        """Names of the parameters that are never cast to a lower precision."""
        return self._declared("float32_parameters")

    def optional_names(self) -> set[str]:
        """Names of the tensors that the model may have or not, by its options; a model that is
        trained on may begin without them."""
        return self._declared("optional_tensors")

    def _declared(self, attribute: str) -> set[str]:
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name in getattr(module, attribute, ())
        }


def _positions(tokens: Tensor, segment_ids: Tensor | None, state: DecoderState | None) -> Tensor:
    """`(B, T)` int64: index of each token within its document."""
    if segment_ids is None:
        index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        return index if state is None else index + state.length[:, None]
    index = document_positions(segment_ids)
    if state is None:
        return index
    return index + torch.where(first_document(segment_ids), state.length[:, None], 0)
