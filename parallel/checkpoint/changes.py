"""What a run that starts from another run's checkpoint need not find there, or leaves there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from rondo.parallel.checkpoint.staging import Tensors


class Changes(NamedTuple):
    """Names of tensors by part of a checkpoint ("model", "optimizer")."""

    fresh: Mapping[str, Collection[str]]
    """What the checkpoint lacks, which begins as in a new run."""
    dropped: Mapping[str, Collection[str]]
    """What the run has no use for, which is not read."""

    def stored(self, tensors: Tensors) -> Tensors:
        """Those of `tensors` that the checkpoint has."""
        return {
            part: {name: x for name, x in by_name.items() if name not in self.fresh.get(part, ())}
            for part, by_name in tensors.items()
        }

    def __str__(self) -> str:
        """For the console; empty where nothing differs."""
        found = (("begins fresh", self.fresh), ("left behind", self.dropped))
        return "; ".join(f"{what}: {_names(by_part)}" for what, by_part in found if _any(by_part))


def changes(
    stored: Mapping[str, Collection[str]],
    wanted: Mapping[str, Collection[str]],
    optional: Collection[str],
) -> Changes:
    """How a run may differ from the one that saved, from the names that are `stored` and `wanted`
    by part: in `optional` tensors of the model, and in which parameters are trained. The optimizer
    state of a parameter comes as a whole; parameters themselves must all be there."""
    fresh, dropped = (
        {
            "model": {name for name in here["model"] if name in optional} - {*there["model"]},
            "optimizer": _not_trained(here["optimizer"], there["optimizer"]),
        }
        for here, there in ((wanted, stored), (stored, wanted))
    )
    return Changes(fresh, dropped)


def _not_trained(here: Collection[str], there: Collection[str]) -> set[str]:
    """State `here` of parameters that have none `there`."""
    trained = {_parameter(name) for name in there}
    return {name for name in here if _parameter(name) not in trained}


def _parameter(state: str) -> str:
    return state.rpartition(".")[0]


def _any(by_part: Mapping[str, Collection[str]]) -> bool:
    return any(by_part.values())


def _names(by_part: Mapping[str, Collection[str]]) -> str:
    state = {_parameter(name) for name in by_part["optimizer"]}
    parts = (("", {*by_part["model"]}), ("optimizer state of ", state))
    return ", ".join(prefix + _some(names) for prefix, names in parts if names)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
