"""Orders from easy to hard by task similarity: smooth paths, jumping ones, and blends between them.

An order is easy when each task resembles the one before it. Its score is the sum of the similarities of consecutive
tasks; its hardness says where that lies between the highest score of all orders (0: easy) and the lowest (1: hard).
That similar neighbours make an order easy is a hypothesis, and measuring it is what this design is for.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np

from loda.errors import ConfigError
from orchestrate.designs import SHUFFLE_LIMIT, Order, Orders, random_orders

EXACT_LIMIT = 12  # tasks: beyond, the best of restarted local searches stands in for the exact extremes
EXTREMES_LIMIT = 64  # evaluation orders: finer blends than that are random orders by another name
_STARTS = 24
_DIRECTION, _SEARCH = 4, 5  # which draw of a seed; ``orchestrate.designs`` has the others


def path_score(order: Order, similarity_TT: np.ndarray) -> float:
    """Sum of the similarities of consecutive tasks."""
    return float(similarity_TT[list(order[:-1]), list(order[1:])].sum())


def highest_path(weight_TT: np.ndarray) -> Order:
    """The order of all tasks with the highest sum of consecutive weights, exactly (Held and Karp 1962).

    Args:
        weight_TT: (T, T) symmetric; the diagonal isn't read. Time and memory grow with 2^T: meant for T up to 12.
    """
    tasks = len(weight_TT)
    best = np.full((1 << tasks, tasks), -np.inf)  # by set of tasks walked and the last of them
    before = np.zeros((1 << tasks, tasks), dtype=np.int64)
    best[[1 << task for task in range(tasks)], range(tasks)] = 0.0
    for walked in range(1, 1 << tasks):
        totals = best[walked][:, None] + weight_TT
        for task in range(tasks):
            if not walked >> task & 1:
                before[walked | 1 << task, task] = totals[:, task].argmax()
                best[walked | 1 << task, task] = totals[:, task].max()
    walked = (1 << tasks) - 1
    order = [int(best[walked].argmax())]
    while walked := walked & ~(1 << order[-1]):
        order.append(int(before[walked | 1 << order[-1], order[-1]]))
    return tuple(order[::-1])


def nearest_path(similarity_TT: np.ndarray, score: float, seeds: list[int], taken: Collection[Order] = ()) -> Order:
    """An order, not one of ``taken``, whose score is as near as is found to the one wanted; infinite ones are extremes.

    Up to 8 tasks all orders are compared, and one of the nearest is drawn. Beyond, the best of 24 local searches from
    random orders, over swaps of two tasks and reversals of a stretch.
    """
    tasks, draws = len(similarity_TT), np.random.default_rng(seeds)

    def distances(orders_NT: np.ndarray) -> np.ndarray:
        scores_N = similarity_TT[orders_NT[:, :-1], orders_NT[:, 1:]].sum(1)
        # rounded: equal scores must not differ by the order of their sums
        return np.round(-np.sign(score) * scores_N if np.isinf(score) else np.abs(scores_N - score), 9)

    if tasks <= SHUFFLE_LIMIT:
        every = np.asarray([order for order in itertools.permutations(range(tasks)) if order not in taken])
        away_N = distances(every)
        nearest = np.flatnonzero(away_N == away_N.min())
        return tuple(every[draws.choice(nearest)].tolist())
    moves_MT = _moves(tasks)
    found: list[tuple[float, Order]] = []
    while len(found) < _STARTS:
        here_T = draws.permutation(tasks)
        away = distances(here_T[None])[0]
        while (around_M := distances(here_T[moves_MT])).min() < away:
            away = around_M.min()
            here_T = here_T[moves_MT[around_M.argmin()]]
        order = tuple(here_T.tolist())
        if order not in taken:
            found.append((float(away), order))
    return min(found)[1]


def _moves(tasks: int) -> np.ndarray:
    """(M, T) positions after each swap of two and each reversal of a stretch of three or more."""
    moves = []
    for i, j in itertools.combinations(range(tasks), 2):
        swapped, turned = list(range(tasks)), list(range(tasks))
        swapped[i], swapped[j] = j, i
        moves.append(swapped)
        if j - i > 2:  # shorter ones are swaps
            turned[i : j + 1] = turned[i : j + 1][::-1]
            moves.append(turned)
    return np.asarray(moves)


def aims(count: int) -> list[float]:
    """Hardness asked of each order: easy, hard, then 1/2, 1/4, 3/4, 1/8, ... so that more orders keep the earlier."""
    found = [0.0, 1.0]
    for number in range(1, count - 1):
        value, share = 0.0, 0.5
        while number:
            value, share, number = value + share * (number & 1), share / 2, number >> 1
        found.append(value)
    return found[:count]


def extreme_orders(
    tasks: int, tune: int, evaluate: int, seed: int, similarity_TT: np.ndarray
) -> tuple[Orders, tuple[float, ...]]:
    """Evaluation orders from easy to hard, and the hardness that each came to; tuning orders are random others.

    Easy and hard are exact up to 12 tasks; beyond, they are what ``nearest_path`` finds.

    Args:
        similarity_TT: (T, T) symmetric.

    Raises:
        ConfigError: fewer than 3 tasks or 2 orders, more orders than the limit, or tasks that are all alike.
    """
    if tasks < 3:
        raise ConfigError(f"orders.design: extremes needs at least 3 tasks, but the stream has {tasks}")
    if not 2 <= evaluate <= EXTREMES_LIMIT:
        raise ConfigError(
            f"orders.evaluate: extremes takes from 2 (easy and hard) to {EXTREMES_LIMIT} orders, but got {evaluate}; "
            "for more, use design: random"
        )
    random_orders(tasks, tune, evaluate, seed)  # says if there are too few
    if tasks <= EXACT_LIMIT:
        easy, hard = highest_path(similarity_TT), highest_path(-similarity_TT)
        turned = np.random.default_rng([seed, _DIRECTION]).random(2) < 0.5  # a path and its mirror image score alike
        easy, hard = (order[::-1] if turn else order for order, turn in zip((easy, hard), turned))
    else:
        easy = nearest_path(similarity_TT, np.inf, [seed, _SEARCH, 0])
        hard = nearest_path(similarity_TT, -np.inf, [seed, _SEARCH, 1])
    high, low = path_score(easy, similarity_TT), path_score(hard, similarity_TT)
    if high - low < 1e-6:
        raise ConfigError("orders.design: all tasks are equally similar, so no order is easier; use design: random")
    chosen = [easy, hard]
    for number, aim in enumerate(aims(evaluate)[2:], start=2):
        chosen.append(nearest_path(similarity_TT, high + aim * (low - high), [seed, _SEARCH, number], chosen))
    hardness = tuple(round((high - path_score(order, similarity_TT)) / (high - low), 6) for order in chosen)
    return (_others(tasks, tune, seed, chosen), tuple(chosen)), hardness


def _others(tasks: int, tune: int, seed: int, chosen: Collection[Order]) -> tuple[Order, ...]:
    """The random design's tuning orders, without those that are evaluated."""
    listed = random_orders(tasks, tune + len(chosen), 0, seed)[0]
    return tuple(order for order in listed if order not in chosen)[:tune]
