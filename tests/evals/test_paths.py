"""Paths of a graph that is learnt: graph, pairs and paths hold against powers of its matrix."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rondo.errors import UserError
from rondo.evals.tasks import examples
from rondo.evals.tasks.__main__ import main
from rondo.evals.tasks.paths import PATHS, degree, found_path, longest, planning

NODES = 100


def edges(nodes: int = NODES, seed: int = 0) -> np.ndarray:
    """1 where the train split has a path of one step: every edge is a line of its own."""
    found = np.zeros((nodes, nodes), dtype=int)
    for s, path in planning(nodes, seed).lines:
        if len(path) == 2:
            found[s] = 1
    return found


def counts(matrix: np.ndarray) -> np.ndarray:
    """The number of paths from each node to each, of a matrix above its diagonal."""
    return np.rint(np.linalg.inv(np.eye(len(matrix)) - matrix)).astype(np.int64) - np.eye(
        len(matrix), dtype=np.int64
    )


@pytest.mark.quick
def test_pairs_are_those_that_a_path_joins_in_one_split_each() -> None:
    matrix, pairs = edges(), planning(NODES, 0).pairs
    assert not np.tril(matrix).any()
    possible = NODES * (NODES - 1) // 2
    assert abs(matrix.sum() - 0.1 * possible) < 4 * np.sqrt(0.09 * possible)
    train, test = ({*pairs[split]} for split in ("train", "test"))
    assert not train & test
    assert train | test == {(int(s), int(t)) for s, t in np.argwhere(counts(matrix))}
    assert {(int(s), int(t)) for s, t in np.argwhere(matrix)} <= train
    assert {t for _, t in test} <= {t for _, t in train}
    free = len(train | test) - matrix.sum()  # a coin decides, but for a first pair of a node
    assert abs(len(test) - free / 2) < 4 * np.sqrt(free) / 2 + NODES / 2


@pytest.mark.quick
def test_lines_are_paths_each_next_node_as_likely() -> None:
    matrix, graph = edges(), planning(NODES, 0)
    number = counts(matrix)
    for (s, t), path in graph.lines:
        assert path[0] == s and path[-1] == t and all(matrix[a, b] for a, b in pairwise(path))
    per_pair = Counter(pair for pair, _ in graph.lines)
    assert per_pair == {(s, t): PATHS + matrix[s, t] for s, t in graph.pairs["train"]}
    firsts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for pair, path in graph.lines:
        firsts[pair][path[1]] += 1
    statistic, freedom = 0.0, 0
    for s, t in graph.pairs["train"]:
        ways = [n for n in np.flatnonzero(matrix[s]) if n == t or number[n, t]]
        if 2 <= len(ways) <= 4 and not matrix[s, t]:
            wanted = PATHS / len(ways)
            statistic += sum((firsts[s, t][int(n)] - wanted) ** 2 / wanted for n in ways)
            freedom += len(ways) - 1
            assert firsts[s, t].keys() <= {*map(int, ways)}
    # A sum of many is nearly normal with variance 2 a degree of freedom.
    assert freedom > 100 and abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.quick
def test_answers_are_paths_and_where_there_is_one_they_are_it() -> None:
    matrix, test = edges(), {*planning(NODES, 0).pairs["test"]}
    number, seen, only = counts(matrix), [], 0
    for prompt, answer in islice(examples("path_finding", NODES, "test"), len(test)):
        s, t = map(int, prompt.split())
        seen.append((s, t))
        assert found_path({"prompt": prompt}, [answer], nodes=NODES, seed=0)["acc"] == 1.0
        if number[s, t] == 1:
            way = [s]
            while way[-1] != t:
                (step,) = (n for n in np.flatnonzero(matrix[way[-1]]) if n == t or number[n, t])
                way.append(int(step))
            assert answer == " " + " ".join(map(str, way))
            only += 1
    assert {*seen} == test and len(seen) == len(test)  # each once before any comes again
    assert only > 5
    train = {e.prompt for e in islice(examples("path_finding", NODES, "train"), 60_000)}
    assert train == {f"{s} {t}" for s, t in planning(NODES, 0).pairs["train"]}
    assert not train & {f"{s} {t}" for s, t in seen}


@pytest.mark.quick
def test_degrees_and_the_longest_path() -> None:
    graph, matrix = planning(NODES, 0), edges()
    found = Counter()
    seen = {(node, t) for (_, t), path in graph.lines for node in path}
    for s, t in graph.pairs["test"]:
        assert degree(graph, s, t) == (1 if (s, t) in seen else 2)
        found[degree(graph, s, t)] += 1
    assert min(found[1], found[2]) > 20
    s, t = map(int, np.argwhere(matrix)[0])
    assert degree(graph, s, t) == 0
    power, steps = matrix, 1
    while power.any():
        power, steps = (power @ matrix > 0).astype(int), steps + 1
    assert longest(NODES, 0) == steps


@pytest.mark.quick
def test_what_is_no_path_counts_as_wrong() -> None:
    graph = planning(NODES, 0)
    s, t = next(pair for pair in graph.pairs["test"] if degree(graph, *pair) == 2)
    (way,) = (
        answer
        for prompt, answer in islice(
            examples("path_finding", NODES, "test"), len(graph.pairs["test"])
        )
        if prompt == f"{s} {t}"
    )
    middle = way.split()
    wrong = [
        "",
        "x",
        f"{s} {t}",
        way + " x",
        way + f" {t}",
        " ".join(middle[1:]),
        " ".join(middle[:-1]),
    ]
    for text in wrong:
        score = found_path({"prompt": f"{s} {t}"}, [text], nodes=NODES, seed=0)
        assert score == {"acc": 0.0, "acc_degree_2": 0.0}, text
    with pytest.raises(UserError, match="size: path_finding of 3 nodes has no pair to "):
        next(examples("path_finding", 3, "train"))
    assert planning(30, 1) == planning.__wrapped__(30, 1) != planning(30, 2)


def test_the_harness_and_texts_to_train_on(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from rondo.evals.catalog import Catalog, Sources
    from rondo.pretrain.data import load_tokenizer

    answers = dict(islice(examples("path_finding", NODES, "test"), 50))

    class Walker(LM):
        """Knows the paths of pairs that begin with an even node."""

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            asked = [r.args[0] for r in requests]
            assert all(r.args[1]["max_gen_toks"] == 3 * longest(NODES, 0) for r in requests)
            return [answers[p] if int(p.split()[0]) % 2 == 0 else " 0" for p in asked]

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            raise AssertionError

        loglikelihood_rolling = loglikelihood

    task = Catalog(Sources(load_tokenizer("bytes"), samples=50)).find("path_finding_100")
    tasks = TaskManager(include_defaults=False).load([task])
    found = lm_eval.evaluate(Walker(), tasks, bootstrap_iters=0)["results"]["path_finding_100"]
    known = [int(prompt.split()[0]) % 2 == 0 for prompt in answers]
    assert found["acc,none"] == pytest.approx(np.mean(known))
    graph = planning(NODES, 0)
    ones = [
        k for p, k in zip(answers, known, strict=True) if degree(graph, *map(int, p.split())) == 1
    ]
    assert found["acc_degree_1,none"] == pytest.approx(np.mean(ones))
    file = tmp_path / "paths.jsonl"
    assert main(["path_finding", "--output", str(file), "--sizes", "100", "--examples", "3"]) == 0
    first = next(examples("path_finding", NODES, "train"))
    assert json.loads(file.read_text().splitlines()[0])["text"] == first.prompt + first.answer
