"""The language model: embedding, blocks, final norm, output matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rondo.errors import UserError
from rondo.kernels import linear_cross_entropy
from rondo.kernels.segments import first_document, positions
from rondo.models.block import Block
from rondo.models.config import ModelConfig, make_options, problems
from rondo.models.init import initial_values
from rondo.models.layers import Embedding, Linear, RMSNorm
from rondo.models.mixer import Cost, SequenceContext, State, module_cost
from rondo.models.registry import MIXERS


class DecoderState(NamedTuple):
    """What a decoder carries from one call to the next."""

    layers: list[State]
    """State of each layer's mixer."""
    length: Tensor
    """`(B,)` int64: tokens of the current document seen so far."""


class Output(NamedTuple):
    """What a forward pass gives."""

    hidden: Tensor
    """`(B, T, dim)`, after the final norm; `Decoder.logits` turns it into logits."""
    state: DecoderState | None
    """State after the last token; None when it was not asked for."""
    aux: dict[str, Tensor]
    """Auxiliary losses by name."""


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: what to build; `vocab_size` must be given.
        seed: seeds the initial values; None draws one from torch's global generator. On the
            meta device nothing is initialised.

    Raises:
        UserError: the configuration is impossible; every problem is named.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        found = problems(config)
        if config.vocab_size < 1:
            found.append(f"model.vocab_size: must be at least 1, got {config.vocab_size}")
        if found:
            raise UserError("\n".join(found))
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        self.embedding = Embedding(config.vocab_size, config.dim, std=config.init_std)
        specs = config.layers()
        self.blocks = nn.ModuleList(Block(config, spec, i) for i, spec in enumerate(specs))
        self.shared = nn.ModuleDict()
        for spec in specs:
            cls, options = MIXERS[spec.mixer], make_options(spec.mixer, spec.options)
            for name, module in cls.shared_modules(config, options).items():
                if name not in self.shared:
                    self.shared[name] = module
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(config.dim, config.vocab_size, std=config.init_std)
        if self.embedding.weight.device.type != "meta":
            self.init_weights(int(torch.randint(2**31, ())) if seed is None else seed)

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
        state: DecoderState | None = None,
        return_state: bool = True,
    ) -> Output:
        """Runs the model.

        Args:
            tokens: `(B, T)` int64 token ids.
            segment_ids: `(B, T)` integer, non-decreasing in a row; other id, other document.
            state: state to go on from; it belongs to the document of position 0.
            return_state: False lets each layer's state (and KV cache) go at once.
        """
        ctx = self._context(tokens, segment_ids, state)
        ctx.keep_state = return_state
        x = self.embedding(tokens)
        if self.activation_dtype is not None:
            x = x.to(self.activation_dtype)
        states = []
        for i, block in enumerate(self.blocks):
            x, layer_state = block(x, ctx, None if state is None else state.layers[i])
            states.append(layer_state)
        after = DecoderState(states, ctx.positions[:, -1] + 1) if return_state else None
        return Output(self.norm(x), after, {})

    def _context(
        self, tokens: Tensor, segment_ids: Tensor | None, state: DecoderState | None
    ) -> SequenceContext:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (batch, time >= 1), got {tuple(tokens.shape)}")
        if segment_ids is None:
            index = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
            if state is not None:
                index = index + state.length[:, None]
        else:
            index = positions(segment_ids)
            if state is not None:
                index = index + torch.where(first_document(segment_ids), state.length[:, None], 0)
        shared = {name: module() for name, module in self.shared.items()}
        return SequenceContext(positions=index, segment_ids=segment_ids, shared=shared)

    @property
    def output_weight(self) -> Tensor:
        """`(vocab, dim)` matrix from hidden states to logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` hidden states to `(..., vocab)` logits."""
        return hidden @ self.output_weight.to(hidden.dtype).T

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        segment_ids: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Cross-entropy in nats of `targets` `(B, T)`, -100 where there is none; logits are
        never held for all tokens. `reduction`: "sum", "mean" (over valid tokens) or "none"."""
        hidden = self(tokens, segment_ids=segment_ids, return_state=False).hidden
        return linear_cross_entropy(hidden, self.output_weight, targets, reduction=reduction)

    def cost(self, length: int) -> Cost:
        """Cost in sequences of `length` tokens. The embedding look-up is free, the output
        matrix is not."""
        head = 2.0 * self.config.vocab_size * self.config.dim
        total = Cost(head, 0, 0)
        for block in self.blocks:
            assert isinstance(block, Block), "nn.ModuleList forgets its element type"
            total = total + block.cost(length)
        return Cost(total.flops, module_cost(self).parameters, total.state_bytes)

    def matrix_names(self) -> set[str]:
        """Names of the weights inside blocks that are plain matrices (what Muon updates)."""
        return {
            f"blocks.{i}.{name}.weight"
            for i, block in enumerate(self.blocks)
            for name, module in block.named_modules()
            if isinstance(module, Linear)
        }

    def float32_names(self) -> set[str]:
        """Names of the parameters that are never cast to a lower precision."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name in getattr(module, "float32_parameters", ())
        }
