"""Racing: more orders only for settings that may still win. Paired by order, stopped when beaten with confidence.

Two rules, each a switch in the study's ``racing`` section:

- **orders**: after each order that a setting finishes, it is compared with the leader over the orders that both have
  finished. It is stopped if a paired one-sided test says, with ``confidence``, that it is worse, *and* its objective
  over those orders is lower (as Optuna's WilcoxonPruner has it, whose test this offers beside Student's).
- **tasks**: within its first order, which is the same for all, asynchronous successive halving over tasks (ASHA,
  Li et al. 2020, Ray's implementation) stops settings that are behind after few tasks.

Tests are repeated as orders come in, so the chance that a setting as good as the leader is stopped at some time is
higher than ``1 - confidence``; ``benchmarks/racing.py`` measures what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from scipy import stats

from orchestrate.objective import across_orders

if TYPE_CHECKING:
    from orchestrate.study import ObjectiveSettings, RacingSettings


@dataclass(frozen=True)
class Beaten:
    """Why a setting is stopped: by whom, on how many orders, by how much on average (points), at which p-value."""

    leader: str
    orders: int
    difference: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"beaten by {self.leader} on {self.orders} orders by {-self.difference:.2f} points (p = {self.p_value:.3f})"
        )


class Race:
    """Values of settings by order, and who is out.

    Args:
        racing: the study's ``racing`` section.
        objective: how a setting's orders are put together.
    """

    def __init__(self, racing: RacingSettings, objective: ObjectiveSettings) -> None:
        self.racing, self.objective = racing, objective
        self.values: dict[str, dict[str, float]] = {}
        self.out: set[str] = set()

    def update(self, setting: str, values: Mapping[str, float]) -> None:
        """The metric (%) of each order that a setting has finished so far."""
        self.values[setting] = dict(values)

    def drop(self, setting: str) -> None:
        """A setting that failed or was stopped leads nobody."""
        self.out.add(setting)

    def leader(self, other_than: str) -> str | None:
        """The best objective among the settings that have finished most orders."""
        rivals = {
            name: values
            for name, values in self.values.items()
            if name != other_than and name not in self.out and values
        }
        if not rivals:
            return None
        most = max(len(values) for values in rivals.values())
        return max(
            (name for name, values in rivals.items() if len(values) == most),
            key=lambda name: across_orders(list(rivals[name].values()), self.objective),
        )

    def beaten(self, setting: str) -> Beaten | None:
        """Whether a setting is beaten on what is known now."""
        leader = self.leader(setting)
        if leader is None:
            return None
        mine, theirs = self.values[setting], self.values[leader]
        common = [order for order in mine if order in theirs]
        if len(common) < max(2, self.racing.min_orders):
            return None
        ours, leaders = [mine[order] for order in common], [theirs[order] for order in common]
        if across_orders(ours, self.objective) >= across_orders(leaders, self.objective):
            return None
        p_value = paired_p_value(ours, leaders, self.racing.test)
        if not p_value < 1 - self.racing.confidence:
            return None
        return Beaten(leader, len(common), float(np.mean(ours) - np.mean(leaders)), p_value)


def paired_p_value(ours: list[float], theirs: list[float], test: str) -> float:
    """One-sided p-value of "ours are lower", paired; 1 where the test can't say.

    Args:
        test: ``t`` (Student's, from two orders on) or ``wilcoxon`` (signed-rank; its smallest p-value is 2^-n, so
            that confidence 0.9 takes at least four orders).
    """
    difference = np.subtract(ours, theirs)
    if np.ptp(difference) == 0 and test == "t":  # no spread: scipy divides by zero
        return 0.0 if difference[0] < 0 and len(difference) > 2 else 1.0
    if test == "t":
        p_value = float(stats.ttest_rel(ours, theirs, alternative="less").pvalue)
    else:
        p_value = float(stats.wilcoxon(difference, alternative="less", zero_method="zsplit").pvalue)
    return p_value if math.isfinite(p_value) else 1.0


class RaceScheduler(FIFOScheduler):
    """The race as a Tune scheduler: it only ever stops trials; which one starts next is the searcher's business.

    Args:
        racing, objective: sections of the study.
        tasks: how many tasks an order has.
        name_of: a trial's name, by Tune's trial id.
        finished: values by order of settings that former runs of the study have finished, by name.
        on_stop: called with (trial id, reason) for each trial that is stopped.
    """

    def __init__(
        self,
        racing: RacingSettings,
        objective: ObjectiveSettings,
        tasks: int,
        name_of: Callable[[str], str],
        finished: Mapping[str, Mapping[str, float]] | None = None,
        on_stop: Callable[[str, str], None] = lambda trial, reason: None,
    ) -> None:
        super().__init__()
        self.race = Race(racing, objective)
        for name, values in (finished or {}).items():
            self.race.update(name, values)
        self.name_of, self.on_stop = name_of, on_stop
        self.halving: AsyncHyperBandScheduler | None = None
        if racing.tasks and tasks > racing.grace_tasks:
            self.halving = AsyncHyperBandScheduler(
                time_attr="tasks",
                metric="so_far",
                mode="max",
                max_t=tasks,
                grace_period=racing.grace_tasks,
                reduction_factor=racing.reduction_factor,
                stop_last_trials=False,
            )
        self._halved: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if self.halving is not None:
            self.halving.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("finished"):
            self._update(trial.trial_id, result)
            return TrialScheduler.CONTINUE
        reason = self._behind(tune_controller, trial, result) or self._beaten(trial.trial_id, result)
        if reason is None:
            return TrialScheduler.CONTINUE
        self.race.drop(self.name_of(trial.trial_id))
        self.on_stop(trial.trial_id, reason)
        return TrialScheduler.STOP

    def _behind(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str | None:
        tasks, so_far = result.get("first_order_tasks"), result.get("first_order_so_far")
        if self.halving is None or trial.trial_id in self._halved or not tasks:
            return None
        if (
            self.halving.on_trial_result(tune_controller, trial, {"tasks": tasks, "so_far": so_far})
            == TrialScheduler.STOP
        ):
            return f"behind after {tasks} tasks of the first order ({so_far:.2f} %)"
        if result.get("orders"):  # the first order is through, or another one is: tasks decide no more
            self._halved.add(trial.trial_id)
        return None

    def _update(self, trial_id: str, result: Mapping[str, Any]) -> None:
        metric = self.race.objective.metric
        orders = result.get("orders") or []
        self.race.update(self.name_of(trial_id), {row["name"]: row[metric] for row in orders})

    def _beaten(self, trial_id: str, result: Mapping[str, Any]) -> str | None:
        self._update(trial_id, result)
        if not self.race.racing.orders:
            return None
        beaten = self.race.beaten(self.name_of(trial_id))
        return None if beaten is None else str(beaten)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.race.drop(self.name_of(trial.trial_id))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its scheduler to restore it some day; a study that goes on builds it anew from Optuna's storage.
        return {}
