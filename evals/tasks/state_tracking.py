"""Tasks that need a state: parity, a walk on a circle (arXiv 2207.02098), arithmetic modulo 5
(arXiv 2411.12537), words of permutation groups.

Each draws words and, beside each word, what the answer would be if the text ended with it (None
where none is asked for).
"""

from __future__ import annotations

import functools
import itertools
import random

Walk = tuple[list[str], list[str | None]]
"""Words, and the answer after each."""
CIRCLE = 5
_MOVES = {"stay": 0, "right": 1, "left": -1}


def parity(draw: random.Random, size: int) -> Walk:
    """`size` bits, and the parity of the number of ones so far."""
    bits = [draw.randrange(2) for _ in range(size)]
    return [str(bit) for bit in bits], [str(sum_ % 2) for sum_ in itertools.accumulate(bits)]


def cycle_navigation(draw: random.Random, size: int) -> Walk:
    """`size` steps from place to place on a circle of five, and the place reached, from 0 on."""
    moves = draw.choices(list(_MOVES), k=size)
    places = itertools.accumulate(_MOVES[move] for move in moves)
    return moves, [str(place % CIRCLE) for place in places]


def modular_arithmetic(draw: random.Random, size: int) -> Walk:
    """`size` numbers below 5 with +, - and * between them; products first, value modulo 5. What
    comes after an operator is not asked for."""
    numbers = [draw.randrange(5) for _ in range(size)]
    operators = draw.choices("+-*", k=size - 1)
    total, product = 0, numbers[0]
    words: list[str] = [str(product)]
    labels: list[str | None] = [str(product)]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, product = total + product, number if operator == "+" else -number
        words += [operator, str(number)]
        labels += [None, str((total + product) % 5)]
    return words, labels


def group_word(
    draw: random.Random, size: int, points: int, even: bool = False, generators: bool = False
) -> Walk:
    """Permutations of S_n by number, 0 the identity, and their product so far, the first applied
    first. `even`: those of A_n only, n odd. `generators`: words of two that make all others, a turn
    of all points and one of two of them, of three for A_n."""
    table = _products(points, even)
    letters = _generators(points, even) if generators else range(len(table))
    word = [draw.choice(letters) for _ in range(size)]
    products = itertools.accumulate(word, lambda product, index: table[product][index], initial=0)
    return [str(index) for index in word], [str(p) for p in itertools.islice(products, 1, None)]


def two_steps(walk: Walk) -> Walk:
    """Two words for each, with the answer after the second: a delta rule, which multiplies its
    state by one reflection a word, then has a product of two for each, as DeltaProduct with n_h = 2
    does (arXiv 2502.10297)."""
    words, answers = walk
    twice = [each for word in words for each in (word, f"{word}'")]
    return twice, [each for answer in answers for each in (None, answer)]


@functools.cache
def _products(points: int, even: bool) -> list[list[int]]:
    """`[p][q]`: the number of the permutation that is p, then q."""
    elements = _elements(points, even)
    number = {p: i for i, p in enumerate(elements)}
    return [[number[tuple(q[x] for x in p)] for q in elements] for p in elements]


@functools.cache
def _generators(points: int, even: bool) -> list[int]:
    """Numbers of a turn of the first two or three points, and of all of them."""
    turns = [(*range(1, n), 0, *range(n, points)) for n in (3 if even else 2, points)]
    return [_elements(points, even).index(turn) for turn in turns]


def _elements(points: int, even: bool) -> list[tuple[int, ...]]:
    return [p for p in itertools.permutations(range(points)) if not even or _is_even(p)]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def delayed_match(draw: random.Random, size: int) -> tuple[str, str]:
    """1 if the last bit is that of `size` bits before it (N-delayed match to sample), else 0;
    up to `size` more bits come first.

    The usual definition compares x[-1] with x[-N], N - 1 before it: `size` is that N - 1."""
    bits = [draw.randrange(2) for _ in range(draw.randint(size + 1, 2 * size + 1))]
    return f"{' '.join(map(str, bits))} =", str(int(bits[-1] == bits[-1 - size]))
