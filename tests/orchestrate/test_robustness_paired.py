"""Paired differences, rank tests and profiles, against published examples and other computations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from orchestrate.robustness.paired import cluster_bootstrap, holm, paired_difference, wilcoxon
from orchestrate.robustness.ranks import performance_profiles, rank_agreement

OPTIONS: dict[str, Any] = {"confidence": 0.95, "resamples": 9999, "seed": 0}
# Hollander and Wolfe 1973, p. 29: depression scale of nine patients at two visits (R's example of wilcox.test).
VISIT_1 = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
VISIT_2 = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]
# Hollander and Wolfe 1973, p. 140: 22 players round first base in three ways (R's example of friedman.test).
BASES = """
5.40 5.50 5.55  5.85 5.70 5.75  5.20 5.60 5.50  5.55 5.50 5.40  5.90 5.85 5.70  5.45 5.55 5.60  5.40 5.40 5.35
5.45 5.50 5.35  5.25 5.15 5.00  5.85 5.80 5.70  5.25 5.20 5.10  5.65 5.55 5.45  5.60 5.35 5.45  5.05 5.00 4.95
5.50 5.50 5.40  5.45 5.55 5.50  5.55 5.55 5.35  5.45 5.50 5.55  5.50 5.45 5.25  5.65 5.60 5.40  5.70 5.65 5.55
6.30 6.30 6.25
"""


def series(values: list[float] | np.ndarray) -> pd.Series:
    return pd.Series(list(values), index=[f"o{k}" for k in range(len(values))], dtype=float)


def alone(values: pd.Series) -> dict[str, str]:
    return {str(name): str(name) for name in values.index}


def enumerated_bca(sums: np.ndarray, counts: np.ndarray, confidence: float) -> tuple[float, float]:
    """BCa from every possible draw of roots, by the formulas of Efron 1987."""
    n = len(sums)
    draws = np.array(list(itertools.product(range(n), repeat=n)))
    drawn = np.sort(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    estimate = sums.sum() / counts.sum()
    # Draws equal to the estimate count half, as in scipy.
    below = ((drawn < estimate).mean() + (drawn <= estimate).mean()) / 2
    bias = stats.norm.ppf(below)
    jackknife = (sums.sum() - sums) / (counts.sum() - counts)
    pulls = jackknife.mean() - jackknife
    acceleration = (pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5)
    z = bias + stats.norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    return tuple(np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z))))


def test_bootstrap_agrees_with_all_possible_draws_of_roots() -> None:
    values = np.random.default_rng(3).lognormal(0, 1.2, 14)  # skewed: percentiles alone would be far off
    sums = values.reshape(7, 2).sum(axis=1)
    found = cluster_bootstrap(values, [f"r{k // 2}" for k in range(14)], confidence=0.9, resamples=50_000, seed=1)
    assert found == pytest.approx(enumerated_bca(sums, np.full(7, 2), 0.9), rel=0.02)


def test_bootstrap_draws_roots_not_orders() -> None:
    # Orders of one root are copies: three roots know little, nine orders seem to know more.
    values = np.repeat([1.0, 2.0, 6.0, 3.0, 4.0, 9.0], 4)
    as_tree = cluster_bootstrap(values, [f"r{k}" for k in np.repeat(range(6), 4)], **OPTIONS)
    by_root = cluster_bootstrap(values[::4], [f"r{k}" for k in range(6)], **OPTIONS)
    as_orders = cluster_bootstrap(values, [f"o{k}" for k in range(24)], **OPTIONS)
    assert as_tree == pytest.approx(by_root)
    assert as_tree is not None and as_orders is not None
    assert as_tree[1] - as_tree[0] > 1.5 * (as_orders[1] - as_orders[0])


def test_bootstrap_weighs_orders_alike_in_unequal_roots() -> None:
    low, high = cluster_bootstrap([1.0] * 8 + [2.0, 2.5, 3.0], ["big"] * 8 + ["a", "b", "c"], **OPTIONS) or (0, 0)
    assert low < 1.4 < high  # the mean of orders, 15.5/11


def test_bootstrap_repeats_itself_by_its_seed() -> None:
    values, roots = np.random.default_rng(0).normal(size=9), list("abcdefghi")
    options: dict[str, Any] = {"confidence": 0.95, "resamples": 500}
    first, second = (cluster_bootstrap(values, roots, seed=0, **options) for _ in range(2))
    assert first == second
    assert first != cluster_bootstrap(values, roots, seed=1, **options)


def test_wilcoxon_of_the_published_example() -> None:
    values = series(np.array(VISIT_1) - np.array(VISIT_2))
    found = wilcoxon(values, alone(values))
    assert found["statistic"] == 5  # V = 40 of 45
    assert found["p"] == pytest.approx(0.03906, abs=1e-5)
    assert found["smallest_p"] == pytest.approx(2 / 2**9)


def test_wilcoxon_takes_a_root_as_one_observation() -> None:
    values = series(np.repeat([1.0, 2.0, 3.0, 4.0], 6))
    found = wilcoxon(values, {f"o{k}": f"r{k // 6}" for k in range(24)})
    assert found["roots"] == 4
    assert found["p"] == pytest.approx(0.125)
    assert wilcoxon(values, alone(values))["p"] < 0.001


def test_wilcoxon_of_equal_methods_says_so() -> None:
    values = series([0.0, 0.0, 0.0])
    found = wilcoxon(values, alone(values))
    assert found["p"] is None
    assert found["reasons"]["p"] == "all differences are zero"


def test_holm_of_the_published_example() -> None:
    # Wikipedia, "Holm-Bonferroni method", its example: H1 and H4 are rejected at 0.05.
    found = holm({"h1": 0.01, "h2": 0.04, "h3": 0.03, "h4": 0.005, "none": None}, 0.05)
    assert {name: p for name, (p, _) in found.items()} == pytest.approx(
        {"h1": 0.03, "h2": 0.06, "h3": 0.06, "h4": 0.02}
    )
    assert [name for name, (_, rejected) in found.items() if rejected] == ["h1", "h4"]


def test_a_difference_is_the_first_minus_the_second_on_the_same_orders() -> None:
    first, second = series([60.0, 62.0, 61.0, 55.0]), series([50.0, 62.0, 58.0, 56.0])
    found = paired_difference(first, second.iloc[::-1], alone(first), **OPTIONS)
    assert found["per_order"] == {"o0": 10.0, "o1": 0.0, "o2": 3.0, "o3": -1.0}
    assert (found["won"], found["tied"], found["lost"]) == (2, 1, 1)
    assert found["mean"] == 3.0
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found["interval_t"] == pytest.approx([expected.low, expected.high])
    low, high = found["interval_bca"]
    assert low < 3 < high
    assert "t interval" in found["notes"][0]
    lower = paired_difference(first, second, alone(first), higher_is_better=False, **OPTIONS)
    assert (lower["won"], lower["lost"], lower["mean"]) == (1, 2, 3.0)


def test_a_difference_of_one_order_has_no_interval() -> None:
    first, second = series([60.0]), series([50.0])
    found = paired_difference(first, second, alone(first), **OPTIONS)
    assert found["mean"] == 10.0
    assert found["interval_bca"] is None
    assert found["interval_t"] is None
    assert found["wilcoxon"]["p"] is None
    assert all("one order" in found["reasons"][key] for key in ("interval_bca", "interval_t", "std"))


def test_a_constant_difference_has_no_bootstrap_and_says_why() -> None:
    first, second = series([60.0, 61.0, 62.0]), series([50.0, 51.0, 52.0])
    found = paired_difference(first, second, alone(first), **OPTIONS)
    assert found["interval_t"] == [10.0, 10.0]
    assert found["interval_bca"] is None
    assert "changes nothing" in found["reasons"]["interval_bca"]


def test_pairs_of_different_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="same orders"):
        paired_difference(series([1.0, 2.0]), series([1.0]), alone(series([1.0, 2.0])), **OPTIONS)


def test_friedman_of_the_published_example() -> None:
    data = np.array(BASES.split(), dtype=float).reshape(22, 3)
    found = rank_agreement(pd.DataFrame(data, columns=["round out", "narrow", "wide"]), higher_is_better=False)
    assert found["friedman"]["statistic"] == pytest.approx(11.143, abs=5e-4)
    assert found["friedman"]["p"] == pytest.approx(0.003805, abs=1e-6)
    assert found["mean_ranks"]["wide"] == min(found["mean_ranks"].values())  # seconds: the shortest is the best


def test_kendalls_w_is_the_mean_rank_correlation_of_orders() -> None:
    # Without ties, mean Spearman correlation over pairs of n judges: (n W - 1) / (n - 1) (Kendall and Smith 1939).
    data = np.random.default_rng(3).normal(size=(5, 4)) + np.arange(4)
    pairs = itertools.combinations(data, 2)
    mean = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    assert rank_agreement(pd.DataFrame(data))["kendall_w"] == pytest.approx((mean * 4 + 1) / 5)


def test_perfect_agreement_is_one_and_rank_one_is_the_best() -> None:
    table = pd.DataFrame({"low": [1.0, 2.0, 3.0], "high": [7.0, 8.0, 9.0], "middle": [4.0, 5.0, 6.0]})
    found = rank_agreement(table)
    assert found["kendall_w"] == pytest.approx(1)
    assert found["mean_ranks"] == {"low": 3.0, "high": 1.0, "middle": 2.0}
    assert rank_agreement(table, higher_is_better=False)["mean_ranks"]["low"] == 1.0


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 3.0]}), "three or more"),
        (pd.DataFrame({"a": [1.0], "b": [2.0], "c": [3.0]}), "one root"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}), "tied"),
    ],
)
def test_ranks_that_can_not_be_tested_say_why(table: pd.DataFrame, reason: str) -> None:
    found = rank_agreement(table)
    assert found["friedman"] is None
    assert found["kendall_w"] is None
    assert reason in found["reasons"]["friedman"]


def test_profiles_are_shares_of_orders_strictly_above_a_score() -> None:
    found = performance_profiles({"a": series([50.0, 60.0, 60.0, 70.0]), "b": series([40.0, 60.0])})
    tau = np.array(found["tau"])
    for name, values in (("a", [50.0, 60.0, 60.0, 70.0]), ("b", [40.0, 60.0])):
        counted = [(np.array(values) > t).mean() for t in tau]
        assert found["share"][name] == pytest.approx(counted)
        assert counted[0] == 1
        assert counted[-1] == 0
    assert {40.0, 50.0, 60.0, 70.0} <= set(tau)


def test_two_roots_are_too_few_for_a_bootstrap() -> None:
    first, second = series([60.0, 61.0, 63.0, 64.0]), series([50.0, 51.0, 52.0, 53.0])
    found = paired_difference(first, second, {"o0": "a", "o1": "a", "o2": "b", "o3": "b"}, **OPTIONS)
    assert found["interval_bca"] is None
    assert "2 roots" in found["reasons"]["interval_bca"]
    assert found["interval_t"] is not None
