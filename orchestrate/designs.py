"""Task orders drawn from a seed: random, all, balanced (Williams squares), and trees of shared prefixes.

Tuning and evaluation orders come from one seeded sequence, read from its two sides, so that they never meet:

- where all can be listed (8 tasks have 40,320 orders), the sequence is a shuffle of all: evaluation reads from the
  front, tuning from the back, until they would touch;
- beyond, a bit of SHA-256(seed, item) says on which side an item lies, and each side draws from its own generator,
  leaving out what lies on the other side or has been drawn.

What is on the two sides is orders (random, all), Williams squares (balanced) or roots (tree).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from loda.errors import ConfigError

Order = tuple[int, ...]
Orders = tuple[tuple[Order, ...], tuple[Order, ...]]  # tune, evaluate

ALL_LIMIT = 7  # tasks: 5,040 orders
DRAW_LIMIT = 20_000  # orders of one kind where all can't be listed; far below the 181,440 a side of 9 tasks
SHUFFLE_LIMIT = 8  # tasks: 40,320 orders are shuffled as a list
_LIST_LIMIT = math.factorial(SHUFFLE_LIMIT)  # items that are shuffled as a list
_CONTINUED, _ROWS = 2, 3  # which draw of a seed: 0 and 1 are the two sides


def _shuffle(items: list[Order], *seeds: int) -> list[Order]:
    return [items[i] for i in np.random.default_rng(seeds if len(seeds) > 1 else seeds[0]).permutation(len(items))]


def shuffled(tasks: int, seed: int) -> list[Order]:
    """All orders of at most 8 tasks, shuffled."""
    return _shuffle(list(itertools.permutations(range(tasks))), seed)


def two_sides(sequence: Sequence[Order], tune: int, evaluate: int) -> Orders:
    """Tuning orders from the back, evaluation orders from the front."""
    return tuple(sequence[::-1][:tune]), tuple(sequence[:evaluate])


def _draw(tasks: int, count: int, seed: int, side: int, item: Callable[[Order], Order] = tuple) -> tuple[Order, ...]:
    """Distinct items of one side; ``item`` makes one of a random order (itself, its root, its square)."""
    generator = np.random.default_rng([seed, side])
    drawn: dict[Order, None] = {}
    while len(drawn) < count:
        found = item(tuple(generator.permutation(tasks).tolist()))
        if hashlib.sha256(f"{seed}:{found}".encode()).digest()[0] & 1 == side:
            drawn[found] = None
    return tuple(drawn)


def all_orders(tasks: int, tune: int, seed: int) -> Orders:
    """Every order: those that tuning doesn't use are evaluated.

    Raises:
        ConfigError: more than 7 tasks, or none left to evaluate.
    """
    count = math.factorial(tasks)
    if tasks > ALL_LIMIT:
        raise ConfigError(
            f"orders.design: all orders of {tasks} tasks are {count:,}; at most {ALL_LIMIT} tasks "
            f"({math.factorial(ALL_LIMIT):,} orders) are supported, use design: random"
        )
    if tune >= count:
        raise ConfigError(
            f"orders.tune: {tune} tuning orders leave none to evaluate: {tasks} tasks have {count} distinct orders"
        )
    return two_sides(shuffled(tasks, seed), tune, count - tune)


def random_orders(tasks: int, tune: int, evaluate: int, seed: int) -> Orders:
    """Distinct random orders.

    Raises:
        ConfigError: more than there are, or than are drawn.
    """
    count = math.factorial(tasks)
    if tasks <= SHUFFLE_LIMIT:
        if tune + evaluate > count:
            raise ConfigError(
                f"orders: {tune} tuning and {evaluate} evaluation orders must all differ, but {tasks} tasks have only "
                f"{count:,} distinct orders; ask for fewer, or cut the stream into more tasks"
            )
        return two_sides(shuffled(tasks, seed), tune, evaluate)
    _check_draws(tasks, tune, evaluate)
    return _draw(tasks, tune, seed, side=1), _draw(tasks, evaluate, seed, side=0)


def _check_draws(tasks: int, tune: int, evaluate: int) -> None:
    if max(tune, evaluate) > DRAW_LIMIT:
        raise ConfigError(
            f"orders: at most {DRAW_LIMIT:,} tuning and {DRAW_LIMIT:,} evaluation orders are drawn (of "
            f"{math.factorial(tasks):,} that {tasks} tasks have), but got tune {tune:,}, evaluate {evaluate:,}"
        )


def williams_square(order: Order) -> tuple[Order, ...]:
    """The balanced block that an order lies in (Williams 1949): n orders for an even number n of tasks, 2n for an odd.

    Each task stands at each position equally often, and follows each other task equally often. Every order lies in
    exactly one block: a block is the order's relabellings by the cyclic shifts of its square, and for odd n by their
    mirror images, so blocks are cosets.
    """
    n = len(order)
    row = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]  # 0, 1, n-1, 2, n-2, ...
    labels = dict(zip(row, order))
    block = [tuple(labels[(x + shift) % n] for x in row) for shift in range(n)]
    if n % 2:
        block += [rotated[::-1] for rotated in block]
    return tuple(block)


def _square_name(order: Order) -> Order:
    """The first order of the block, which stands for it."""
    return min(williams_square(order))


def balanced_orders(tasks: int, tune: int, evaluate: int, seed: int) -> Orders:
    """Whole Williams squares to evaluate, drawn by the seed; tuning orders are rows of other squares.

    Raises:
        ConfigError: not a whole number of squares (says which counts are possible), or more squares than there are.
    """
    if tasks < 2:
        raise ConfigError("orders.design: balanced orders need at least 2 tasks, but the stream has 1")
    block = tasks * (1 + tasks % 2)
    exist = math.factorial(tasks) // block
    square = "pair of Williams squares" if tasks % 2 else "Williams square"
    lower = min(evaluate // block, exist) * block
    if evaluate != lower:
        possible = " or ".join(str(count) for count in (lower, lower + block) if 0 < count <= exist * block)
        raise ConfigError(
            f"orders.evaluate: balanced orders come in whole squares; a {square} of {tasks} tasks has {block} orders "
            f"(of {exist * block:,} in all), but got {evaluate}; use {possible}"
        )
    squares, tuning = evaluate // block, -(-tune // block)
    if squares + tuning > exist:
        raise ConfigError(
            f"orders: {evaluate} evaluation orders take {squares}, and {tune} tuning orders {tuning}, of the {exist} "
            f"times that a {square} of {tasks} tasks ({block} orders) exists; ask for fewer orders"
        )
    if tasks <= SHUFFLE_LIMIT:
        starts = [(0, *rest) for rest in itertools.permutations(range(1, tasks))]
        tuned, evaluated = two_sides(_shuffle([s for s in starts if _square_name(s) == s], seed), tuning, squares)
    else:
        _check_draws(tasks, tune, evaluate)
        tuned, evaluated = (_draw(tasks, n, seed, side, _square_name) for side, n in ((1, tuning), (0, squares)))
    return _rows(tuned, seed)[:tune], _rows(evaluated, seed)


def _rows(squares: Sequence[Order], seed: int) -> tuple[Order, ...]:
    """The orders of whole squares; shuffled in each, so that the first few don't begin alike."""
    return tuple(order for name in squares for order in _shuffle(list(williams_square(name)), seed, _ROWS, *name))


def tree_orders(tasks: int, tune: int, seed: int, roots: int, continuations: int, depth: int) -> Orders:
    """``roots`` distinct beginnings of ``depth`` tasks, each continued in ``continuations`` distinct ways.

    Each tuning order has a root of its own, none of the evaluated ones: a setting that was chosen on stages which the
    evaluation walks again would be judged on what it was tuned on.

    Raises:
        ConfigError: all problems: more roots or continuations than there are or than are drawn, or no such depth.
    """
    if not 1 <= depth < tasks:
        raise ConfigError(
            f"orders.depth: {depth} shared tasks, but orders of {tasks} tasks branch after 1 to {tasks - 1}"
        )
    exist, ways = math.perm(tasks, depth), math.factorial(tasks - depth)
    problems = []
    if continuations > ways:
        problems.append(
            f"orders.continuations: {continuations} of each root, but {tasks - depth} remaining tasks have only "
            f"{ways:,} orders; use at most {ways:,}, or a smaller depth"
        )
    if roots + tune > exist:
        problems.append(
            f"orders.roots: {roots} roots, and one more for each of {tune} tuning orders, but {tasks} tasks have only "
            f"{exist:,} beginnings of {depth}; ask for fewer, or a greater depth"
        )
    if max(tune, roots * continuations) > DRAW_LIMIT:
        problems.append(
            f"orders: a tree of {roots:,} x {continuations:,} orders and {tune:,} tuning orders; at most "
            f"{DRAW_LIMIT:,} of either are drawn"
        )
    if problems:
        raise ConfigError(problems)
    if exist <= _LIST_LIMIT:
        tuned, evaluated = two_sides(_shuffle(list(itertools.permutations(range(tasks), depth)), seed), tune, roots)
    else:
        tuned, evaluated = (
            _draw(tasks, count, seed, side, lambda order: order[:depth]) for side, count in ((1, tune), (0, roots))
        )
    return (
        tuple(order for root in tuned for order in _continued(root, tasks, 1, seed)),
        tuple(order for root in evaluated for order in _continued(root, tasks, continuations, seed)),
    )


def _continued(root: Order, tasks: int, count: int, seed: int) -> list[Order]:
    """Distinct orders that begin with a root, drawn by seed and root: other roots and counts don't change them."""
    rest = [task for task in range(tasks) if task not in root]
    generator = np.random.default_rng([seed, _CONTINUED, *root])
    drawn: dict[Order, None] = {}
    while len(drawn) < count:
        drawn[(*root, *generator.permutation(rest).tolist())] = None
    return list(drawn)
