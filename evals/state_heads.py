"""Which heads' states grow, and which stay small, by the number of tokens read (state collapse,
arXiv 2410.07145: a few heads explode while the rest stay as they were)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MEASURES = ("norm", "variance")
"""Frobenius norm of a head's state, and the variance of its numbers."""


class StateHeads:
    """Means over texts of the measures of every head."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.texts = 0
        """How many were read."""

    def note(self, layer: str, at: int, heads: Tensor) -> None:
        """Takes the states `(B, H, ...)` of a layer after `at` tokens of each text."""
        flat = heads.flatten(2)
        both = torch.stack([flat.norm(dim=-1), flat.var(-1, correction=0)]).sum(1).double().cpu()
        self._sums[layer][at] = self._sums[layer].get(at, 0) + both

    def _by_measure(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """Measure, layer, tokens read, heads."""
        return {
            measure: {
                layer: {at: (both[index] / self.texts).tolist() for at, both in sums.items()}
                for layer, sums in self._sums.items()
            }
            for index, measure in enumerate(MEASURES)
        }

    def by_tokens(self) -> dict[str, dict[str, dict[str, float]]]:
        """`norm/LAYER` and `variance/LAYER`, by tokens read: the largest and the smallest value of
        a head, and which head has it."""
        return {
            f"{measure}/{layer}": {
                str(at): {
                    "largest": max(values),
                    "largest_head": values.index(max(values)),
                    "smallest": min(values),
                    "smallest_head": values.index(min(values)),
                }
                for at, values in sorted(by_end.items())
            }
            for measure, layers in self._by_measure().items()
            for layer, by_end in layers.items()
        }

    def extremes(self, trained: int | None) -> dict[str, Any]:
        """The largest and the smallest of each measure in the whole model, with layer, head and
        tokens read; where texts are longer than those in training (`trained` tokens), also
        `growth`, the head whose largest norm beyond is most above its largest within, as a ratio.
        """
        found: dict[str, Any] = {}
        by_measure = self._by_measure()
        for measure, layers in by_measure.items():
            cells = [
                {"layer": int(layer), "head": head, "at": at, "value": value}
                for layer, by_end in layers.items()
                for at, values in by_end.items()
                for head, value in enumerate(values)
            ]
            if cells:
                largest = max(cells, key=lambda cell: cell["value"])
                smallest = min(cells, key=lambda cell: cell["value"])
                found[measure] = {"largest": largest, "smallest": smallest}
        growth = list(self._growth(by_measure["norm"], trained)) if trained else []
        if growth:
            found["growth"] = max(growth, key=lambda cell: cell["value"])
        return found

    def _growth(
        self, norms: dict[str, dict[int, list[float]]], trained: int
    ) -> Iterator[dict[str, Any]]:
        for layer, by_end in norms.items():
            within = [values for at, values in by_end.items() if at <= trained]
            beyond = [values for at, values in by_end.items() if at > trained]
            pairs = zip(zip(*within, strict=True), zip(*beyond, strict=True), strict=False)
            for head, (early, late) in enumerate(pairs):
                if max(early) > 0:
                    yield {"layer": int(layer), "head": head, "value": max(late) / max(early)}
