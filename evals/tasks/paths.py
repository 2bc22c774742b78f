"""Planning on a graph that is learnt, not read: paths between nodes (ALPINE, arXiv 2405.09220).

A directed acyclic graph is a function of its number of nodes and a seed. A line is `s t s n1 n2 ...
t`, a path from s to t after both; a model is trained on lines between some pairs of nodes and asked
for any path between others.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rondo.errors import UserError

EDGE_CHANCE = 0.1
PATHS = 20
"""Random paths of a pair to train on."""
Pair = tuple[int, int]


class Planning(NamedTuple):
    """A graph, and what of it is trained on."""

    after: list[list[int]]
    """Nodes that an edge leads to, by node; always to a higher one."""
    reach: list[set[int]]
    """Nodes that a path leads to, by node."""
    pairs: dict[str, list[Pair]]
    """Pairs with a path, by split."""
    lines: list[tuple[Pair, list[int]]]
    """Pairs of the train split and paths between them, several for each."""
    passed: list[set[int]]
    """By node t, those on a line to t: from which t is seen to be reached."""


@functools.cache
def planning(nodes: int, seed: int) -> Planning:
    """The graph of so many nodes: an edge from each to each higher one with probability 0.1.

    A pair is trained on if it is an edge, or by a toss of a coin, or where no pair with its end is
    yet; all others are for tests. Lines are `PATHS` random paths for each pair to train on, and its
    edge where it is one.

    Raises:
        UserError: a split would have no pair.
    """
    draw = random.Random(f"path_finding {nodes} {seed}")
    numbers = range(nodes)
    after = [[j for j in range(i + 1, nodes) if draw.random() < EDGE_CHANCE] for i in numbers]
    reach: list[set[int]] = [set() for _ in numbers]
    for i in reversed(numbers):
        reach[i].update(after[i], *(reach[j] for j in after[i]))
    pairs: dict[str, list[Pair]] = {"train": [], "test": []}
    ended: set[int] = set()
    for s, t in ((s, t) for t in numbers for s in numbers if t in reach[s]):
        trained = draw.random() < 0.5 or t in after[s] or t not in ended
        pairs["train" if trained else "test"].append((s, t))
        ended |= {t} if trained else set()
    for split, found in pairs.items():
        if not found:
            raise UserError(f"size: path_finding of {nodes} nodes has no pair to {split}")
    lines, passed = [], [set[int]() for _ in numbers]
    for s, t in pairs["train"]:
        paths = [_path(after, reach, s, t, draw) for _ in range(PATHS)]
        for path in [*paths, *([[s, t]] if t in after[s] else [])]:
            lines.append(((s, t), path))
            passed[t].update(path[:-1])
    return Planning(after, reach, pairs, lines, passed)


def _path(
    after: list[list[int]], reach: list[set[int]], s: int, t: int, draw: random.Random
) -> list[int]:
    """From s to t, each next node with equal probability among those that reach t."""
    path = [s]
    while path[-1] != t:
        path.append(draw.choice([n for n in after[path[-1]] if n == t or t in reach[n]]))
    return path


def lines(nodes: int, split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless `s t` and a path between them: all lines of the train split in random order, again
    and again, or all pairs of the test split, with a path of each."""
    graph, draw = planning(nodes, seed), random.Random(f"path_finding {nodes} {seed} {split}")
    while True:
        found = [*graph.lines]
        if split == "test":
            both = graph.after, graph.reach
            found = [((s, t), _path(*both, s, t, draw)) for s, t in graph.pairs["test"]]
        draw.shuffle(found)
        for (s, t), path in found:
            yield f"{s} {t}", " ".join(map(str, path))


def degree(graph: Planning, s: int, t: int) -> int:
    """0: an edge leads from s to t; 1: a line to t passes s; 2: only lines put together show it."""
    return 0 if t in graph.after[s] else 1 if s in graph.passed[t] else 2


def longest(nodes: int, seed: int) -> int:
    """Nodes of the longest path."""
    after, sizes = planning(nodes, seed).after, [0] * nodes
    for i in reversed(range(nodes)):
        sizes[i] = 1 + max((sizes[j] for j in after[i]), default=0)
    return max(sizes)


def found_path(
    doc: Mapping[str, str], results: Sequence[str], *, nodes: int, seed: int
) -> dict[str, float]:
    """The metric of a generated path: 1 if it begins at s, ends at t and has edges only; `acc`, and
    the same under the degree of the pair."""
    graph = planning(nodes, seed)
    s, t = map(int, doc["prompt"].split())
    known = {str(n): n for n in range(nodes)}
    path = [known.get(word, -1) for word in results[0].split()]
    steps = itertools.pairwise(path)
    right = path[:1] == [s] and path[-1] == t and all(b in graph.after[a] for a, b in steps)
    return {"acc": float(right), f"acc_degree_{degree(graph, s, t)}": float(right)}
