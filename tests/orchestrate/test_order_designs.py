"""Designed orders: balanced squares, trees of shared prefixes, extremes of similarity, and class orders."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.errors import ConfigError
from loda.stream import cut_published
from orchestrate.designs import DRAW_LIMIT, williams_square
from orchestrate.extremes import EXACT_LIMIT, EXTREMES_LIMIT, aims, highest_path, nearest_path, path_score
from orchestrate.orders import Order, OrderPlan, design_class_orders, design_orders


def check(tasks: int, plan: OrderPlan) -> None:
    """Permutations, all different, over both lists."""
    together = [*plan.tune, *plan.evaluate]
    assert all(sorted(order) == list(range(tasks)) for order in together)
    assert len(set(together)) == len(together)


def counts(orders: tuple[Order, ...]) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """How often each task stands at each position, and each follows each other."""
    places = Counter((position, task) for order in orders for position, task in enumerate(order))
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    return places, pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 11), st.integers(1, 3), st.integers(0, 12), st.integers(0, 1000))
def test_balanced_orders_have_every_task_at_every_place_and_after_every_other_equally_often(
    tasks: int, squares: int, tune: int, seed: int
) -> None:
    block = tasks if tasks % 2 == 0 else 2 * tasks
    plan = design_orders("balanced", tasks, tune, squares * block, seed)
    assert (len(plan.tune), len(plan.evaluate)) == (tune, squares * block)
    check(tasks, plan)
    places, pairs = counts(plan.evaluate)
    assert set(places.values()) == {squares * block // tasks} and len(places) == tasks**2
    assert set(pairs.values()) == {squares * block // tasks} and len(pairs) == tasks * (tasks - 1)


@pytest.mark.parametrize("tasks", [2, 3, 4, 5, 6])
def test_williams_squares_cut_all_orders_into_disjoint_blocks(tasks: int) -> None:
    blocks = {frozenset(williams_square(order)) for order in itertools.permutations(range(tasks))}
    block = tasks if tasks % 2 == 0 else 2 * tasks
    assert {len(found) for found in blocks} == {block}
    assert len(blocks) == math.factorial(tasks) // block


@pytest.mark.parametrize("tasks", [5, 6, 9, 10])
def test_more_balanced_orders_keep_the_earlier_ones_and_the_tuning_orders(tasks: int) -> None:
    block = tasks if tasks % 2 == 0 else 2 * tasks
    small = design_orders("balanced", tasks, 2, block, seed=3)
    large = design_orders("balanced", tasks, 5, 3 * block, seed=3)
    assert large.evaluate[:block] == small.evaluate and large.tune[:2] == small.tune
    assert design_orders("balanced", tasks, 2, block, seed=4).evaluate != small.evaluate
    if tasks > 5:  # squares are shuffled within: its first orders are no cyclic shifts that begin with task 0
        firsts = {design_orders("balanced", tasks, 1, block, seed=seed).tune[0][0] for seed in range(20)}
        assert len(firsts) > 2


@pytest.mark.parametrize(
    ("tasks", "tune", "evaluate", "text"),
    [
        (6, 1, 14, r"6 orders .*but got 14; use 12 or 18"),
        (5, 1, 15, r"pair of Williams squares of 5 tasks has 10 orders.*use 10 or 20"),
        (10, 1, 4, r"but got 4; use 10$"),
        (4, 1, 28, r"24 in all\), but got 28; use 24"),
        (4, 1, 24, r"24 evaluation orders take 6, and 1 tuning orders 1, of the 6 times"),
        (3, 1, 6, "ask for fewer orders"),
        (1, 0, 1, "at least 2 tasks"),
        (10, 1, DRAW_LIMIT + 10, "at most 20,000"),
    ],
)
def test_balanced_counts_that_cannot_be_had_are_refused_with_those_that_can(
    tasks: int, tune: int, evaluate: int, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        design_orders("balanced", tasks, tune, evaluate, seed=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.data(), st.integers(0, 1000))
def test_a_tree_has_its_roots_and_continuations_and_tuning_orders_of_other_roots(
    tasks: int, data: st.DataObject, seed: int
) -> None:
    depth = data.draw(st.integers(1, tasks - 1))
    exist = math.perm(tasks, depth)
    tune = data.draw(st.integers(0, min(4, exist - 1)))
    roots = data.draw(st.integers(1, min(5, exist - tune)))
    continuations = data.draw(st.integers(1, min(6, math.factorial(tasks - depth))))
    tree = {"roots": roots, "continuations": continuations, "depth": depth}
    plan = design_orders("tree", tasks, tune, 1, seed, **tree)
    check(tasks, plan)
    assert (len(plan.tune), len(plan.evaluate)) == (tune, roots * continuations)
    by_root = Counter(order[:depth] for order in plan.evaluate)
    assert len(by_root) == roots and set(by_root.values()) == {continuations}
    tuned = [order[:depth] for order in plan.tune]
    assert len(set(tuned)) == tune and not set(tuned) & set(by_root)
    labels = plan.roots("evaluate")
    assert {label: Counter(labels)[label] for label in labels} == {
        "-".join(map(str, root)): continuations for root in by_root
    }
    assert not set(labels) & set(plan.roots("tune"))
    assert plan == design_orders("tree", tasks, tune, 1, seed, **tree)


@pytest.mark.parametrize(("tasks", "depth"), [(6, 2), (10, 5), (12, 6)])
def test_a_tree_grows_without_changing_what_it_had(tasks: int, depth: int) -> None:
    small = design_orders("tree", tasks, 1, 1, 5, roots=2, continuations=3, depth=depth)
    large = design_orders("tree", tasks, 3, 1, 5, roots=4, continuations=6, depth=depth)
    assert [large.evaluate[6 * root + c] for root in range(2) for c in range(3)] == list(small.evaluate)
    assert large.tune[:1] == small.tune
    assert small.evaluate != design_orders("tree", tasks, 1, 1, 6, roots=2, continuations=3, depth=depth).evaluate


def test_the_shared_half_of_a_tree_is_walked_once_a_root() -> None:
    plan = design_orders("tree", 10, 3, 1, 0, roots=4, continuations=8, depth=5)
    prefixes = {order[:length] for order in plan.evaluate for length in range(1, 11)}
    assert len(prefixes) <= 4 * 5 + 32 * 5  # of 320: 56 %; continuations that go on alike share still more
    for length in range(1, 6):
        assert len({order[:length] for order in plan.evaluate}) <= 4


@pytest.mark.parametrize(
    ("tree", "tune", "texts"),
    [
        ({"roots": 4, "continuations": 8, "depth": 5}, 1, ["orders.depth: 5", "1 to 4"]),
        ({"roots": 4, "continuations": 8, "depth": 2}, 1, ["orders.continuations: 8", "3 remaining tasks", "only 6"]),
        ({"roots": 5, "continuations": 2, "depth": 1}, 1, ["orders.roots: 5", "only 5 beginnings of 1"]),
        ({"roots": 20, "continuations": 8, "depth": 2}, 1, ["orders.roots", "orders.continuations"]),
        ({"roots": 4, "continuations": None, "depth": 0}, 1, ["orders.continuations", "orders.depth"]),
    ],
)
def test_a_tree_that_cannot_be_had_is_refused(tree: dict[str, int | None], tune: int, texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        design_orders("tree", 5, tune, 1, 0, **tree)
    assert all(text in "\n".join(caught.value.problems) for text in texts), caught.value.problems


def test_a_tree_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 20,000"):
        design_orders("tree", 12, 1, 1, 0, roots=201, continuations=100, depth=5)


def planted(tasks: int, seed: int) -> np.ndarray:
    """A random symmetric similarity in [-1, 1]."""
    values = np.random.default_rng(seed).uniform(-1, 1, (tasks, tasks)).round(6)
    return np.triu(values, 1) + np.triu(values, 1).T + np.eye(tasks)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000))
def test_extremes_are_the_extremes_of_all_orders(tasks: int, seed: int) -> None:
    similarity_TT = planted(tasks, seed)
    scores = {order: path_score(order, similarity_TT) for order in itertools.permutations(range(tasks))}
    plan = design_orders("extremes", tasks, 1, 3, seed, similarity_TT=similarity_TT)
    easy, hard, between = plan.evaluate
    assert scores[easy] == pytest.approx(max(scores.values()))
    assert scores[hard] == pytest.approx(min(scores.values()))
    assert plan.hardness is not None and plan.hardness[:2] == (0.0, 1.0)
    middle = (scores[easy] + scores[hard]) / 2
    others = [abs(score - middle) for order, score in scores.items() if order not in (easy, hard)]
    assert abs(scores[between] - middle) == pytest.approx(min(others))
    check(tasks, plan)


def test_a_line_of_tasks_is_walked_along_it() -> None:
    places = np.asarray([4.0, 0.0, 2.0, 5.0, 1.0, 3.0])  # task 1 lies at 0, task 4 at 1, ...
    similarity_TT = 1 - np.abs(places[:, None] - places) / 5
    easy = design_orders("extremes", 6, 1, 2, 0, similarity_TT=similarity_TT).evaluate[0]
    assert easy in ((1, 4, 2, 5, 0, 3), (3, 0, 5, 2, 4, 1))
    directions = {
        design_orders("extremes", 6, 1, 2, seed, similarity_TT=similarity_TT).evaluate[0] for seed in range(12)
    }
    assert len(directions) == 2, "which end comes first is drawn by the seed"


def test_the_search_beyond_the_exact_limit_finds_what_the_exact_solver_finds() -> None:
    for seed in range(3):
        similarity_TT = planted(EXACT_LIMIT, seed)
        for sign in (1, -1):
            exact = path_score(highest_path(sign * similarity_TT), similarity_TT)
            found = path_score(nearest_path(similarity_TT, sign * np.inf, [seed]), similarity_TT)
            assert found == pytest.approx(exact)


@pytest.mark.parametrize("tasks", [10, 14])
def test_blends_lie_where_they_were_asked_and_more_keep_the_earlier(tasks: int) -> None:
    similarity_TT = planted(tasks, 1)
    plan = design_orders("extremes", tasks, 3, 9, 2, similarity_TT=similarity_TT)
    assert plan.hardness is not None
    assert plan.hardness == pytest.approx([0, 1, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8], abs=0.02)
    assert list(plan.hardness[2:]) != aims(9)[2:], "what they came to, not what was asked"
    check(tasks, plan)
    small = design_orders("extremes", tasks, 3, 4, 2, similarity_TT=similarity_TT)
    assert plan.evaluate[:4] == small.evaluate and plan.tune == small.tune
    assert plan == design_orders("extremes", tasks, 3, 9, 2, similarity_TT=similarity_TT)


def test_extremes_that_cannot_be_had_are_refused() -> None:
    def refused(tasks: int, tune: int, evaluate: int, similarity_TT: np.ndarray, text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            design_orders("extremes", tasks, tune, evaluate, 0, similarity_TT=similarity_TT)

    refused(2, 0, 2, planted(2, 0), "at least 3 tasks")
    refused(5, 1, 1, planted(5, 0), r"from 2 \(easy and hard\)")
    refused(10, 1, EXTREMES_LIMIT + 1, planted(10, 0), "to 64 orders, but got 65")
    refused(3, 2, 5, planted(3, 0), "only 6 distinct orders")
    refused(5, 1, 2, np.ones((5, 5)), "equally similar")


@pytest.mark.parametrize(("classes", "first"), [(200, [168, 136, 51, 9, 183]), (100, [68, 56, 78, 8, 23])])
def test_class_orders_are_the_published_ones(classes: int, first: list[int]) -> None:
    plan = design_class_orders((1993, 1996, 1997), classes, 10, tune=2, seed=0)
    assert plan.kind == "class" and plan.class_seeds is not None
    assert list(plan.evaluate[0][:5]) == first
    for seed, order in zip((1993, 1996, 1997), plan.evaluate, strict=True):
        np.random.seed(seed)
        assert order == tuple(np.random.permutation(classes))
    assert cut_published(plan.evaluate[0], 10)[0].classes == tuple(sorted(plan.evaluate[0][: classes // 10]))


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(0, 5), st.integers(0, 1000))
def test_class_orders_are_disjoint_and_stable(classes: int, tune: int, seed: int) -> None:
    plan = design_class_orders((1993, 1996), classes, 4, tune, seed)
    cut = [tuple(task.classes for task in cut_published(order, 4)) for order in (*plan.tune, *plan.evaluate)]
    assert len(set(cut)) == tune + 2
    more = design_class_orders((1993, 1996), classes, 4, tune + 1, seed)
    assert more.evaluate == plan.evaluate and more.tune[:tune] == plan.tune
    assert plan.roots("evaluate") == ("class-1993", "class-1996")
    assert plan.to_dict()["class_seeds"]["evaluate"] == [1993, 1996]


def test_too_few_class_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few class orders for 2 tuning"):
        design_class_orders((1993,), 2, 2, 2, 0)
    with pytest.raises(ConfigError, match=r"give the same 2 tasks of 2 classes"):
        design_class_orders((1, 2, 3), 2, 2, 0, 0)
