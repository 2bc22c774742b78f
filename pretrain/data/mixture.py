"""Which source the sample at a global index comes from.

The sources are leaves of a Huffman tree over their weights. A node with weights (a, b) gives its
n-th sample to its first child when floor(n a / (a + b) + 1/2) steps up there, so that each child's
count is within 1/2 of its share of the node's. Walking down from the root takes a sample to its
source, and its number at the leaf is its index within that source.

It is a pure function of (weights, index) in exact integer arithmetic, costs the depth of the tree,
and keeps no state to be resumed. Errors shrink on the way down by each node's share of its parent;
in a Huffman tree ancestors' weights grow at least like the Fibonacci numbers, so after any number
of samples every source is within 1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...) < 1.69 of its exact share.

The order is not that of the usual greedy rule, by which the source with the largest
`w_j max(i, 1) - count_j` gives sample i: to find that one, all samples before it are counted. Both
are within 1 of the shares of two sources, and of several within 2.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rondo.pretrain.data.errors import DataError


@dataclass(frozen=True)
class _Node:
    weight: int
    source: int = -1
    children: tuple[_Node, _Node] | None = None


class Mixture:
    """A deterministic interleaving of sources in proportion to `weights`.

    Raises DataError unless every weight is a finite number above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights:
            raise DataError("data.sources is empty; expected at least one source")
        for j, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise DataError(
                    f"data.sources[{j}].weight is {weight}; expected a finite number above 0"
                )
        exact = [Fraction(weight) for weight in weights]
        unit = math.lcm(*(w.denominator for w in exact))
        # Ties go by age, which makes the tree a function of the weights.
        nodes = [(int(w * unit), j, _Node(int(w * unit), j)) for j, w in enumerate(exact)]
        heapq.heapify(nodes)
        for age in range(len(nodes), 2 * len(nodes) - 1):
            (a, _, first), (b, _, second) = heapq.heappop(nodes), heapq.heappop(nodes)
            heapq.heappush(nodes, (a + b, age, _Node(a + b, children=(first, second))))
        self._root = nodes[0][2]
        self.shares = [float(w / sum(exact)) for w in exact]

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, index within the source) of the sample at global `index` >= 0."""
        node = self._root
        while node.children:
            first, second = node.children
            before = _taken(index, first.weight, node.weight)
            if _taken(index + 1, first.weight, node.weight) > before:
                node, index = first, before
            else:
                node, index = second, index - before
        return node.source, index

    def counts(self, total: int) -> list[int]:
        """Samples of each source among the first `total`."""
        found = [0] * len(self.shares)
        todo = [(self._root, total)]
        while todo:
            node, n = todo.pop()
            if node.children:
                taken = _taken(n, node.children[0].weight, node.weight)
                todo += [(node.children[0], taken), (node.children[1], n - taken)]
            else:
                found[node.source] = n
        return found


def _taken(n: int, part: int, whole: int) -> int:
    """n * part / whole, rounded."""
    return (2 * n * part + whole) // (2 * whole)
