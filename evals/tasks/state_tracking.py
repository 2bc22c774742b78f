"""Answers that need a state: parity, arithmetic modulo 5 (arXiv 2411.12537), words of S_n."""

from __future__ import annotations

import itertools
import random


def parity(draw: random.Random, size: int) -> tuple[str, str]:
    """Bits and the parity of their number of ones."""
    bits = [draw.randrange(2) for _ in range(size)]
    return " ".join(map(str, bits)) + " =", str(sum(bits) % 2)


def modular_arithmetic(draw: random.Random, size: int) -> tuple[str, str]:
    """`size` numbers below 5 with +, - and * between them; products first, value modulo 5."""
    numbers = [draw.randrange(5) for _ in range(size)]
    operators = draw.choices("+-*", k=size - 1)
    total, product = 0, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total, product = total + product, number if operator == "+" else -number
    words = [str(numbers[0])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        words += [operator, str(number)]
    return " ".join(words) + " =", str((total + product) % 5)


def group_word(draw: random.Random, size: int, points: int) -> tuple[str, str]:
    """Permutations of S_n by number, 0 the identity, and their product, the first applied first."""
    elements = list(itertools.permutations(range(points)))
    word = [draw.randrange(len(elements)) for _ in range(size)]
    product = tuple(range(points))
    for index in word:
        product = tuple(elements[index][p] for p in product)
    return " ".join(map(str, word)) + " =", str(elements.index(product))


def delayed_match(draw: random.Random, size: int) -> tuple[str, str]:
    """1 if the last bit is that of `size` bits before it (N-delayed match to sample), else 0;
    up to `size` more bits come first."""
    bits = [draw.randrange(2) for _ in range(draw.randint(size + 1, 2 * size + 1))]
    return f"{' '.join(map(str, bits))} =", str(int(bits[-1] == bits[-1 - size]))
