"""What Megatron's layers cannot divide. Nothing of Megatron is imported to say so."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rondo.models import ModelConfig
from rondo.models.config import make_options
from rondo.models.layers import Linear
from rondo.models.mixer import ChannelMixer, Mixer
from rondo.models.registry import FFNS, MIXERS


def vocabulary_problems(size: int, ranks: int) -> Iterator[str]:
    """What is wrong with `size` token ids over `ranks`."""
    if size % ranks:
        yield (
            f"parallel.tp: {ranks} ranks do not divide the {size} token ids, as Megatron's "
            "embedding needs; use another tokenizer, give model.vocab_size, or use parallel.engine "
            "native"
        )


def model_problems(config: ModelConfig) -> Iterator[str]:
    """Mixers and channel mixers of `config` that Megatron has no layers for. Raises UserError for
    a configuration that is wrong in itself."""
    specs = {repr(spec): spec for spec in config.layers()}.values()
    with torch.device("meta"):
        for spec in specs:
            options = make_options(spec.mixer, spec.options, spec.name)
            yield from _rows(f"mixers.{spec.name}", MIXERS[spec.mixer](config, options, 0))
        for name in sorted({spec.ffn for spec in specs} - {"none"}):
            yield from _rows(f"ffns.{name}", FFNS[name](config))


def _rows(key: str, module: Mixer | ChannelMixer) -> Iterator[str]:
    """RowParallelLinear sums over ranks; what else adds up over them, nothing would sum."""
    matrices = {name for name, child in module.named_modules() if isinstance(child, Linear)}
    for name, word in module.sharding.items():
        if word == "row" and name not in matrices:
            yield (
                f"model.{key}: {type(module).__name__}.{name} adds up over the ranks of "
                "parallel.tp, and is no matrix that Megatron has a layer for; use parallel.engine "
                "native"
            )
