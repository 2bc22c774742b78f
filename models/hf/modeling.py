"""Any model of ours as a `transformers` model. Importing this registers it:

import rondo.models.hf.modeling
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from rondo.models.config import ModelConfig
from rondo.models.decoder import Decoder, DecoderState

__all__ = ["RondoCache", "RondoConfig", "RondoForCausalLM"]


class RondoConfig(PreTrainedConfig):
    """`rondo`: the keys of a `ModelConfig`."""

    model_type = "rondo"
    rondo: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None


class RondoCache(Cache):
    """The state of every layer after the tokens so far."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecoderState | None = None
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows."""
        if self.state is not None:
            layers = [
                {name: value.index_select(0, beam_idx) for name, value in layer.items()}
                for layer in self.state.layers
            ]
            self.state = DecoderState(layers, self.state.length.index_select(0, beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.state is not None:
            rows = torch.arange(len(self.state.length), device=self.state.length.device)
            self.reorder_cache(rows.repeat_interleave(repeats))


class RondoForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Decoder` behind the interface of transformers: logits, loss, `generate` with the state
    of its layers as the cache. Rows may be padded on either side; what is masked is a document of
    its own, so that what a row's text gets does not depend on it."""

    config_class = RondoConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as the base class has it)

    def __init__(self, config: RondoConfig) -> None:
        super().__init__(config)
        assert config.rondo is not None, "config.json of a RondoForCausalLM has the key `rondo`"
        self.decoder = Decoder(ModelConfig(**config.rondo), seed=0)
        # Patterns: what stays float32 when the rest is loaded as bfloat16 or float16.
        self._keep_in_fp32_modules_strict = {
            rf"^decoder\.{re.escape(name)}$" for name in self.decoder.float32_names()
        }
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """`Decoder` has done it."""

    def get_input_embeddings(self) -> Any:
        """The embedding."""
        return self.decoder.embedding

    def get_output_embeddings(self) -> Any:
        """The output matrix; None where the embedding serves as it."""
        return self.decoder.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RondoCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `(B, T, vocab)` of `input_ids` `(B, T)`, those of `logits_to_keep` last positions
        alone if given; with `labels` `(B, T)` the loss too, of each token given those before."""
        cache = past_key_values
        if cache is None and use_cache:
            cache = RondoCache()
        output = self.decoder(
            input_ids,
            segment_ids=_segments(attention_mask, input_ids.shape[1]),
            state=None if cache is None else cache.state,
            return_state=cache is not None,
        )
        if cache is not None:
            cache.state, cache.seen = output.state, cache.seen + input_ids.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.decoder.logits(output.hidden[:, kept]), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        if return_dict is False:
            return tuple(x for x in (loss, logits, cache) if x is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RondoCache()


def _segments(mask: Tensor | None, time: int) -> Tensor | None:
    """Ids of documents: a new one wherever the mask changes."""
    if mask is None or time == 1 or bool(mask[:, -time:].all()):
        return None
    part = mask[:, -time:].bool()
    changes = part[:, 1:] != part[:, :-1]
    return torch.nn.functional.pad(changes.long().cumsum(1), (1, 0))


AutoConfig.register("rondo", RondoConfig)
AutoModelForCausalLM.register(RondoConfig, RondoForCausalLM)
