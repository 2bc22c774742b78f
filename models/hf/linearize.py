"""Attention layers of a pretrained model as gated linear attention, as Liger does it (arXiv
2503.01496): `liger` has the parameters of `attention`, so that all weights stay what they are and
only the configuration says how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rondo.errors import UserError
from rondo.models.config import LayerSpec, ModelConfig
from rondo.models.mixers.liger import LigerOptions

LIGER, KEPT = "liger", "attention"
_EXPLICIT = {
    key: getattr(LigerOptions(), key)
    for key in ("window", "gate_divisor", "recurrent_share", "window_share")
}
"""Written out, so that a folder says how it is to be read."""


def linearize(config: ModelConfig, pattern: Sequence[str]) -> ModelConfig:
    """The model with the same parameters whose layers are read as `pattern` says.

    Args:
        config: the model, as it was imported.
        pattern: one entry a layer or a run of layers, repeated over depth: `liger` or `attention`,
            with a count or without, as `["liger*7", "attention"]`. At `attention` the layer stays
            what it is; at `liger` its attention becomes `liger` with the same heads, rotations
            and norms, and the window of `liger` instead of its own.

    Raises:
        UserError: an entry is neither, or a layer that is to become `liger` has no attention.
    """
    for entry in pattern:
        if entry.partition("*")[0] not in (LIGER, KEPT):
            raise UserError(
                f"linearize: expected {LIGER} or {KEPT}, with a count or without, as "
                f"[{LIGER}*7, {KEPT}], got {entry!r}"
            )
    wanted = dataclasses.replace(config, pattern=list(pattern), mixers={}).layers()
    mixers, found = dict(config.mixers), []
    for number, (spec, plan) in enumerate(zip(config.layers(), wanted, strict=True)):
        layer = spec.name
        if plan.name == LIGER:
            layer = _liger_name(spec, number)
            options = {key: value for key, value in spec.options.items() if key != "window"}
            mixers[layer] = {**({} if layer == LIGER else {"kind": LIGER}), **options, **_EXPLICIT}
        found.append(layer if spec.ffn == config.ffn else f"{layer}+{spec.ffn}")
    mixers = {name: options for name, options in mixers.items() if name in _names(found)}
    return dataclasses.replace(config, pattern=shortest(found), mixers=mixers)


def shortest(pattern: Sequence[str]) -> list[str]:
    """The shortest pattern that, repeated, gives as many layers as `pattern` has, each the same."""
    size = len(pattern)
    for period in range(1, size + 1):
        if all(pattern[i] == pattern[i % period] for i in range(size)):
            return [*pattern[:period]]
    return [*pattern]


def _liger_name(spec: LayerSpec, number: int) -> str:
    """What a layer is called as `liger`; layers with other options have another name."""
    if spec.mixer != KEPT:
        raise UserError(
            f"linearize: layer {number} is {spec.mixer}, and only {KEPT} can become {LIGER}"
        )
    return LIGER if spec.name == KEPT else f"{LIGER}_{spec.name}"


def _names(pattern: Sequence[str]) -> set[str]:
    return {entry.partition("+")[0] for entry in pattern}
