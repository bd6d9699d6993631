"""Effects of position and predecessor: exact on data made by the model, refused where orders don't determine them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from orchestrate.order_effects import order_effects

TASKS = 4
TASK = np.array([3.0, -1.0, -4.0, 2.0])
POSITION = np.array([-6.0, 1.0, 2.0, 3.0])
PREDECESSOR = np.array([0.5, -2.0, 2.5, -1.0])
Order = tuple[int, ...]


def made(order: Order, noise: Sequence[float] = (0.0,) * TASKS) -> list[float]:
    """Accuracies by the additive model."""
    before = [0.0, *(PREDECESSOR[task] for task in order[:-1])]
    return [
        60 + TASK[task] + POSITION[k] + before[k] + noise[k] for k, task in enumerate(order)
    ]  # fmt: skip


def some_orders(count: int) -> list[Order]:
    every = list(itertools.permutations(range(TASKS)))
    return [every[k] for k in np.random.default_rng(3).permutation(len(every))[:count]]


def test_effects_that_made_the_data_are_found_exactly() -> None:
    found = order_effects({order: made(order) for order in some_orders(8)})
    assert [effect.value for effect in found.position] == pytest.approx(POSITION)
    assert [effect.value for effect in found.predecessor] == pytest.approx(PREDECESSOR)
    assert [effect.level for effect in found.predecessor] == [0, 1, 2, 3]
    for effect in (*found.position, *found.predecessor):
        assert effect.interval_95 == pytest.approx((effect.value, effect.value), abs=1e-9)
    assert found.explained == pytest.approx(1)
    assert 0 < found.explained_without_order < 0.9


def test_a_constant_that_all_share_changes_no_effect() -> None:
    orders = some_orders(8)
    higher = order_effects({order: [value + 7 for value in made(order)] for order in orders})
    assert [effect.value for effect in higher.position] == pytest.approx(POSITION)


@pytest.mark.parametrize("tree", [False, True])
def test_intervals_follow_from_the_closed_form_of_leaving_one_root_out(tree: bool) -> None:
    """beta - beta(g) = (X'X)^-1 X_g' (I - H_gg)^-1 e_g, with the hat matrix H and the residuals e."""
    orders = sorted(itertools.permutations(range(TASKS)))[::2]
    draws = np.random.default_rng(5)
    values = {order: made(order, draws.normal(0, 1.5, TASKS)) for order in orders}
    roots = {order: str(order[0]) if tree else str(order) for order in orders}
    found = order_effects(values, roots if tree else None)

    X = np.array([row for order in orders for row in _dummies(order)])
    y = np.array([value for order in orders for value in values[order]])
    labels = np.repeat([roots[order] for order in orders], TASKS)
    inverse = np.linalg.inv(X.T @ X)
    beta = inverse @ X.T @ y
    moves = []
    for label in dict.fromkeys(labels):
        own = labels == label
        hat = X[own] @ inverse @ X[own].T
        moves.append(inverse @ X[own].T @ np.linalg.solve(np.eye(own.sum()) - hat, y[own] - X[own] @ beta))
    count = len(moves)
    variance = (count - 1) / count * sum(np.outer(move, move) for move in moves)
    contrast = np.zeros(X.shape[1])
    contrast[1 + (TASKS - 1)] = 1  # the first position
    reach = stats.t.ppf(0.975, count - 1) * np.sqrt(contrast @ variance @ contrast)
    assert found.position[0].value == pytest.approx(contrast @ beta)
    assert found.position[0].interval_95 == pytest.approx((contrast @ beta - reach, contrast @ beta + reach))
    assert count == (TASKS if tree else len(orders))


def _dummies(order: Order) -> list[list[float]]:
    """Mean, task, position, predecessor, with the last level of each kind as minus the sum of the others."""

    def code(level: int | None) -> list[float]:
        if level is None:
            return [0.0] * (TASKS - 1)
        return [-1.0] * (TASKS - 1) if level == TASKS - 1 else [float(level == k) for k in range(TASKS - 1)]

    return [
        [1.0, *code(task), *code(place), *code(order[place - 1] if place else None)] for place, task in enumerate(order)
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_orders_are_refused_rather_than_guessed(count: int) -> None:
    with pytest.raises(ValueError, match="orders"):
        order_effects({order: made(order) for order in some_orders(count)})


def test_orders_that_differ_in_their_ends_only_are_refused() -> None:
    """However many values there are: the first three positions hold the same tasks."""
    alike = {(0, 1, 2, 3): made((0, 1, 2, 3)), (0, 1, 3, 2): made((0, 1, 3, 2)), (1, 0, 2, 3): made((1, 0, 2, 3))}
    with pytest.raises(ValueError, match="too few, or too alike"):
        order_effects(alike)


def test_one_tree_root_is_one_observation_however_many_orders_it_has() -> None:
    orders = [order for order in itertools.permutations(range(TASKS)) if order[0] == 0]
    with pytest.raises(ValueError, match="three independent orders"):
        order_effects({order: made(order) for order in orders}, dict.fromkeys(orders, "0"))


def test_a_missing_accuracy_is_an_error_and_not_left_out() -> None:
    values = {order: made(order) for order in some_orders(8)}
    values[next(iter(values))][2] = float("nan")
    with pytest.raises(ValueError, match="only complete orders"):
        order_effects(values)
