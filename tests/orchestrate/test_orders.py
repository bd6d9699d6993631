"""Order designs: distinct, disjoint, and stable as a study grows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loda.errors import ConfigError
from orchestrate.orders import DRAW_LIMIT, design_orders


def check(tasks: int, *lists: tuple[tuple[int, ...], ...]) -> None:
    """Permutations, all different."""
    together = [order for orders in lists for order in orders]
    assert all(sorted(order) == list(range(tasks)) for order in together)
    assert len(set(together)) == len(together)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(0, 10_000))
def test_random_orders_are_distinct_and_disjoint(tasks: int, data: st.DataObject, seed: int) -> None:
    exist = math.factorial(tasks)
    tune = data.draw(st.integers(0, min(exist, 40)))
    evaluate = data.draw(st.integers(0, min(exist - tune, 40)))
    plan = design_orders("random", tasks, tune, evaluate, seed)
    assert (len(plan.tune), len(plan.evaluate)) == (tune, evaluate)
    check(tasks, plan.tune, plan.evaluate)


def test_many_orders_stay_disjoint_where_they_cannot_be_listed() -> None:
    plan = design_orders("random", 9, 3000, 3000, seed=0)  # two independent draws would share about 25 of 362,880
    check(9, plan.tune, plan.evaluate)


@pytest.mark.parametrize("tasks", [3, 5, 8, 9, 20])
def test_more_orders_keep_the_earlier_ones_and_counts_do_not_touch_each_other(tasks: int) -> None:
    small = design_orders("random", tasks, 1, 2, seed=11)
    for tune, evaluate in [(1, 4), (2, 2), (2, 4), (0, 2)]:
        plan = design_orders("random", tasks, tune, evaluate, seed=11)
        assert plan.evaluate[:2] == small.evaluate
        assert plan.tune[:1] == small.tune[: min(tune, 1)]
    wide = design_orders("random", tasks, 1, 5, seed=11)
    assert design_orders("random", tasks, 0, 5, seed=11).evaluate == wide.evaluate
    assert design_orders("random", tasks, 1, 0, seed=11).tune == wide.tune


@pytest.mark.parametrize("tasks", [4, 10])
def test_orders_follow_the_seed(tasks: int) -> None:
    first = design_orders("random", tasks, 3, 4, seed=0)
    assert first == design_orders("random", tasks, 3, 4, seed=0)
    assert first.evaluate != design_orders("random", tasks, 3, 4, seed=1).evaluate


@pytest.mark.parametrize("tasks", [4, 9])
def test_every_task_comes_first_about_equally_often(tasks: int) -> None:
    per_kind = {"tune": Counter[int](), "evaluate": Counter[int]()}
    for seed in range(200):
        plan = design_orders("random", tasks, 3, 3, seed)
        for kind, counter in per_kind.items():
            counter.update(order[0] for order in getattr(plan, kind))
    for counter in per_kind.values():
        expected = 600 / tasks
        assert all(abs(counter[task] - expected) < 5 * math.sqrt(expected) for task in range(tasks))


def test_all_orders_of_few_tasks_can_be_used_up() -> None:
    plan = design_orders("random", 3, 2, 4, seed=5)
    check(3, plan.tune, plan.evaluate)
    with pytest.raises(ConfigError, match="only 6 distinct orders"):
        design_orders("random", 3, 3, 4, seed=5)
    with pytest.raises(ConfigError, match="only 1 distinct orders"):
        design_orders("random", 1, 1, 1, seed=5)


def test_draw_limit_is_stated() -> None:
    with pytest.raises(ConfigError, match=f"{DRAW_LIMIT:,}"):
        design_orders("random", 9, 0, DRAW_LIMIT + 1, seed=0)


def test_all_design_evaluates_whatever_tuning_does_not_use() -> None:
    plan = design_orders("all", 4, 3, 1, seed=2)
    assert len(plan.tune) == 3 and len(plan.evaluate) == 21
    check(4, plan.tune, plan.evaluate)
    assert design_orders("all", 4, 0, 1, seed=2).evaluate[:21] == plan.evaluate
    assert design_orders("random", 4, 3, 5, seed=2).evaluate == plan.evaluate[:5]


def test_all_design_has_a_limit_and_leaves_some_to_evaluate() -> None:
    with pytest.raises(ConfigError, match=r"all orders of 8 tasks are 40,320; at most 7 tasks"):
        design_orders("all", 8, 0, 0, seed=0)
    with pytest.raises(ConfigError, match="3 tasks have 6 distinct orders"):
        design_orders("all", 3, 6, 0, seed=0)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_file_with_both_lists(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"orders.{suffix}", {"tune": [[0, 1, 2], [2, 1, 0]], "evaluate": [[1, 0, 2]]})
    plan = design_orders("file", 3, 1, 1, 0, file=file)
    assert plan.tune == ((0, 1, 2),) and plan.evaluate == ((1, 0, 2),)


def test_file_with_one_list_evaluates_from_the_front_and_tunes_from_the_back(tmp_path: Path) -> None:
    file = write(tmp_path / "orders.yaml", [[0, 1, 2], [2, 1, 0], ["b", "a", "c"], [1, 2, 0]])
    plan = design_orders("file", 3, 1, 2, 0, file=file, task_names=["a", "b", "c"])
    assert plan.evaluate == ((0, 1, 2), (2, 1, 0)) and plan.tune == ((1, 2, 0),)
    more = design_orders("file", 3, 2, 2, 0, file=file, task_names=["a", "b", "c"])
    assert more.evaluate == plan.evaluate and more.tune == ((1, 2, 0), (1, 0, 2))


def test_all_problems_of_a_file_come_in_one_message(tmp_path: Path) -> None:
    content = {"tune": [[0, 0, 2], [0, 1, 7], [0, 1], "abc"], "evaluate": [[0, 1, 2], [0, 1, 2], [True, 1, 2]]}
    file = write(tmp_path / "orders.yaml", content)
    with pytest.raises(ConfigError) as caught:
        design_orders("file", 3, 9, 1, 0, file=file, task_names=["ant", "bee", "cat"])
    text = "\n".join(caught.value.problems)
    assert "order 1 of tune repeats task 0 (ant)" in text and "order 1 of tune omits task 1 (bee)" in text
    assert "order 2 of tune names 7, but tasks are 0 to 2 or ant, bee, cat" in text
    assert "order 3 of tune omits task 2 (cat)" in text
    assert "order 4 of tune must be a list of 3 tasks" in text
    assert "order 2 of evaluate is the same as order 1 of evaluate" in text
    assert "order 3 of evaluate names True" in text
    assert "9 orders are wanted from tune, but it holds only 4" in text
    assert len(caught.value.problems) == 8


def test_an_order_in_both_lists_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "orders.yaml", {"tune": [[0, 1]], "evaluate": [[1, 0], [0, 1]]})
    with pytest.raises(ConfigError, match="order 2 of evaluate is the same as order 1 of tune"):
        design_orders("file", 2, 1, 1, 0, file=file)


@pytest.mark.parametrize("text", ["[1, 2", "42", "{orders: [[0, 1]]}", "!!python/object/apply:os.getcwd []"])
def test_files_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "orders.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"orders\.yaml"):
        design_orders("file", 2, 1, 1, 0, file=tmp_path / "orders.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        design_orders("file", 2, 1, 1, 0, file=tmp_path / "none.yaml")


def test_bad_numbers_and_design_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        design_orders("spiral", 0, -1, -2, -3)
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError, match="only then"):
        design_orders("file", 3, 1, 1, 0)


def test_plan_is_recorded_as_plain_json() -> None:
    plan = design_orders("random", 3, 1, 2, seed=4)
    record = plan.to_dict()
    assert json.loads(json.dumps(record)) == record
    assert (record["kind"], record["design"], record["tasks"], record["seed"]) == ("task", "random", 3, 4)
    assert record["evaluate"] == [list(order) for order in plan.evaluate] and len(record["tune"][0]) == 3
    assert record["roots"]["evaluate"] == ["-".join(map(str, order)) for order in plan.evaluate]


def test_random_and_all_designs_are_those_of_earlier_studies() -> None:
    """Studies that were run before must find their orders again."""
    plan = design_orders("random", 5, 3, 4, seed=0)
    assert plan.evaluate == ((4, 0, 3, 2, 1), (2, 4, 0, 3, 1), (1, 3, 0, 2, 4), (4, 3, 0, 1, 2))
    assert plan.tune == ((3, 4, 2, 1, 0), (3, 1, 0, 4, 2), (1, 2, 3, 4, 0))
    plan = design_orders("random", 10, 1, 2, seed=7)
    assert plan.evaluate == ((8, 0, 7, 1, 3, 6, 2, 4, 5, 9), (3, 9, 2, 8, 0, 7, 1, 6, 4, 5))
    assert plan.tune == ((9, 0, 8, 6, 7, 1, 3, 4, 2, 5),)
    assert design_orders("all", 4, 2, 1, seed=3).tune == ((3, 0, 2, 1), (3, 1, 2, 0))
