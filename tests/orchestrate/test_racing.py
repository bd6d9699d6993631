"""Who is stopped on the way, why, and that nobody else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.utils import flatten_dict
from scipy import stats

from orchestrate.racing import Race, RaceScheduler, paired_p_value
from orchestrate.study import ObjectiveSettings, RacingSettings

MEAN = ObjectiveSettings(metric="a_avg", across_orders="mean")
GOOD = {"o1": 80.0, "o2": 75.0, "o3": 70.0, "o4": 78.0}


def race(objective: ObjectiveSettings = MEAN, **racing: Any) -> Race:
    return Race(RacingSettings(**{"orders": True, **racing}), objective)


def shifted(by: float, orders: int = 4, wobble: float = 0.1) -> dict[str, float]:
    """The good setting's orders, lower or higher by about so much."""
    signs = (1, -1, 1, -1)
    return {name: GOOD[name] + by + wobble * sign for name, sign in list(zip(GOOD, signs, strict=True))[:orders]}


def test_a_setting_that_is_clearly_worse_on_the_same_orders_is_beaten() -> None:
    one = race()
    one.update("good", GOOD)
    one.update("bad", shifted(-3, orders=2))
    beaten = one.beaten("bad")
    assert beaten is not None
    assert (beaten.leader, beaten.orders) == ("good", 2)
    assert beaten.difference == pytest.approx(-3)
    assert beaten.p_value == pytest.approx(stats.ttest_rel([77.1, 71.9], [80.0, 75.0], alternative="less").pvalue)
    assert str(beaten) == f"beaten by good on 2 orders by 3.00 points (p = {beaten.p_value:.3f})"


def test_pairing_sees_what_the_spread_of_orders_hides() -> None:
    """Orders differ by ten points, settings by one: unpaired, nothing could be said."""
    one = race()
    one.update("good", GOOD)
    one.update("bad", shifted(-1, orders=3))
    assert one.beaten("bad") is not None
    ours, theirs = list(shifted(-1, orders=3).values()), list(GOOD.values())
    assert stats.ttest_ind(ours, theirs, alternative="less").pvalue > 0.3


@pytest.mark.parametrize("by", [2.0, 0.0])
def test_a_setting_that_is_better_or_alike_goes_on(by: float) -> None:
    one = race()
    one.update("good", GOOD)
    one.update("other", shifted(by))
    assert one.beaten("other") is None


def test_one_order_decides_nothing_and_min_orders_is_kept() -> None:
    one = race(min_orders=3)
    one.update("good", GOOD)
    for orders in (1, 2):
        one.update("bad", shifted(-5, orders=orders))
        assert one.beaten("bad") is None
    one.update("bad", shifted(-5, orders=3))
    assert one.beaten("bad") is not None


def test_a_setting_with_a_better_objective_is_not_stopped_for_a_lower_mean() -> None:
    """The objective is the worst order: a setting that is lower elsewhere, but not there, stays in the race."""
    worst = ObjectiveSettings(metric="a_avg", across_orders="worst")
    steady = dict.fromkeys(GOOD, 70.5)
    assert paired_p_value(list(steady.values()), list(GOOD.values()), "t") < 0.1
    for objective, stays in ((worst, True), (MEAN, False)):
        one = race(objective)
        one.update("good", GOOD)
        one.update("steady", steady)
        assert (one.beaten("steady") is None) == stays


def test_the_leader_is_the_best_of_those_with_most_orders() -> None:
    one = race()
    one.update("lucky", {"o1": 99.0})
    one.update("good", GOOD)
    one.update("fair", shifted(-1))
    one.update("new", {"o1": 50.0})
    assert one.leader("new") == "good"
    one.drop("good")
    assert one.leader("new") == "fair"


def test_without_a_rival_nobody_is_beaten() -> None:
    one = race()
    one.update("first", GOOD)
    assert one.beaten("first") is None


def test_wilcoxon_takes_as_many_orders_as_it_needs() -> None:
    values = [80.0, 75.0, 70.0, 78.0, 82.0]
    for count in range(2, 6):
        p_value = paired_p_value([v - 1 - i / 10 for i, v in enumerate(values[:count])], values[:count], "wilcoxon")
        assert p_value == pytest.approx(0.5**count)


@pytest.mark.parametrize("test", ["t", "wilcoxon"])
def test_equal_values_are_no_evidence(test: str) -> None:
    assert paired_p_value([70.0, 71.0, 72.0], [70.0, 71.0, 72.0], test) > 0.4


class Trials:
    """Feeds a scheduler as Tune does."""

    def __init__(self, length: int = 4, finished: Any = None, **racing: Any) -> None:
        self.stopped: dict[str, str] = {}
        self.scheduler = RaceScheduler(
            RacingSettings(**racing), MEAN, length, lambda trial: f"trial-{trial}", finished, self.stopped.__setitem__
        )
        self.added: set[str] = set()

    def report(self, trial: str, orders: dict[str, float], first: Any = None, finished: bool = False) -> str:
        stand_in: Any = SimpleNamespace(trial_id=trial)
        if trial not in self.added:
            self.added.add(trial)
            self.scheduler.on_trial_add(None, stand_in)
        rows = [{"name": name, "a_avg": value} for name, value in orders.items()]
        tasks, so_far = first or (0, None)
        result = {"orders": rows, "first_order_tasks": tasks, "first_order_so_far": so_far, "finished": finished}
        return self.scheduler.on_trial_result(None, stand_in, flatten_dict(result))  # as Tune does


def test_the_scheduler_stops_a_beaten_trial_with_the_reason() -> None:
    trials = Trials(orders=True)
    trials.report("0", GOOD, finished=True)
    assert trials.report("1", shifted(-3, orders=1)) == TrialScheduler.CONTINUE
    assert trials.report("1", shifted(-3, orders=2)) == TrialScheduler.STOP
    assert trials.stopped["1"].startswith("beaten by trial-0 on 2 orders by 3.00 points")


def test_a_trial_that_has_finished_is_never_stopped() -> None:
    trials = Trials(orders=True)
    trials.report("0", GOOD, finished=True)
    assert trials.report("1", shifted(-3), finished=True) == TrialScheduler.CONTINUE
    assert trials.stopped == {}


def test_a_failed_trial_leads_nobody() -> None:
    trials = Trials(orders=True)
    trials.report("0", GOOD)
    trials.scheduler.on_trial_error(None, SimpleNamespace(trial_id="0"))  # type: ignore[arg-type]
    assert trials.report("1", shifted(-3, orders=2)) == TrialScheduler.CONTINUE


def test_a_race_goes_on_with_what_former_runs_found() -> None:
    trials = Trials(orders=True, finished={"trial-7": GOOD})
    assert trials.report("1", shifted(-3, orders=2)) == TrialScheduler.STOP
    assert "trial-7" in trials.stopped["1"]


def test_within_the_first_order_those_behind_after_few_tasks_are_stopped() -> None:
    trials = Trials(length=6, tasks=True)
    assert trials.report("0", {}, (1, 90.0)) == TrialScheduler.CONTINUE
    for trial, so_far in (("0", 80.0), ("1", 81.0), ("2", 82.0)):
        assert trials.report(trial, {}, (2, so_far)) == TrialScheduler.CONTINUE
    assert trials.report("3", {}, (1, 10.0)) == TrialScheduler.CONTINUE  # within the grace period
    assert trials.report("3", {}, (2, 60.0)) == TrialScheduler.STOP
    assert trials.stopped == {"3": "behind after 2 tasks of the first order (60.00 %)"}
    assert trials.report("4", {}, (2, 95.0)) == TrialScheduler.CONTINUE


def test_without_any_rule_nobody_is_stopped() -> None:
    trials = Trials()
    trials.report("0", GOOD, finished=True)
    assert trials.report("1", shifted(-30), (4, 1.0)) == TrialScheduler.CONTINUE
