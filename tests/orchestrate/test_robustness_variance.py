"""Variance components, against published analyses and REML."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf

from orchestrate.robustness.variance import variance_split

# Diameters of zones of inhibition (mm), 24 plates x 6 penicillin samples: Davies and Goldsmith 1972, table 6.6; lme4's
# `Penicillin`. Bates et al., "lme4: Mixed-effects modeling with R", fit it by REML: plate 0.7169, sample 3.7309,
# residual 0.3024. Plates stand for orders, samples for seeds.
PENICILLIN = """
27 23 26 23 23 21  27 23 26 23 23 21  25 21 25 24 24 20  26 23 25 23 23 20  25 22 26 22 23 20  24 22 25 23 22 19
24 20 23 21 22 19  26 22 26 24 24 21  24 21 24 22 22 20  24 21 24 23 22 19  26 23 26 24 24 21  25 22 26 24 24 20
26 24 26 24 25 22  26 23 26 23 23 20  26 23 25 24 24 22  25 22 25 23 23 20  25 21 24 23 23 20  25 22 24 23 23 19
24 21 23 21 21 19  26 23 26 24 24 21  25 21 24 22 22 18  25 22 25 22 22 20  24 21 24 22 24 19  24 21 24 22 21 18
"""
# Yield of dyestuff, 6 batches x 5: Davies and Goldsmith 1972, table 6.1; lme4's `Dyestuff`, REML: batch 1764.05,
# residual 2451.25.
DYESTUFF = """
1545 1440 1440 1520 1580  1540 1555 1490 1560 1495  1595 1550 1605 1510 1560  1445 1440 1595 1465 1545
1595 1630 1515 1635 1625  1520 1455 1450 1480 1445
"""


def crossed(values: np.ndarray, per_root: int = 1) -> pd.DataFrame:
    """Scores (orders, seeds) as rows; ``per_root`` orders in turn share a root."""
    return pd.DataFrame(
        [
            {"order_name": f"o{o:02d}", "root": f"r{o // per_root:02d}", "seed": s, "value": float(values[o, s])}
            for o, s in np.ndindex(*values.shape)
        ]
    )


def test_order_seed_and_residual_of_a_published_crossed_experiment() -> None:
    data = np.array(PENICILLIN.split(), dtype=float).reshape(24, 6)
    found = variance_split(crossed(data))
    assert found["components"] == {
        "order": pytest.approx(0.7169, abs=5e-5),
        "seed": pytest.approx(3.7309, abs=5e-5),
        "residual": pytest.approx(0.3024, abs=5e-5),
    }
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_roots_of_a_published_nested_experiment() -> None:
    data = np.array(DYESTUFF.split(), dtype=float).reshape(30, 1)
    found = variance_split(crossed(data, per_root=5))
    assert found["components"] == {
        "root": pytest.approx(1764.05, abs=0.01),
        "order_and_residual": pytest.approx(2451.25, abs=0.01),
    }
    assert "one training seed" in found["reasons"]["seed"]


def test_a_tree_with_seeds_agrees_with_restricted_maximum_likelihood() -> None:
    draws = np.random.default_rng(2)
    roots, orders, seeds = 6, 30, 4
    by_root = np.repeat(draws.normal(0, 3, roots), orders // roots)
    values = 60 + by_root[:, None] + draws.normal(0, 1.5, (orders, 1)) + draws.normal(0, 1, (1, seeds))
    scores = crossed(values + draws.normal(0, 0.7, (orders, seeds)), per_root=orders // roots)
    found = variance_split(scores)["components"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = smf.mixedlm(
            "value ~ 1",
            scores.assign(all=1),
            groups="all",
            vc_formula={"root": "0 + C(root)", "order": "0 + C(order_name)", "seed": "0 + C(seed)"},
        ).fit(reml=True, method="powell")
    likely = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True)) | {"residual": fit.scale}
    assert found == {name: pytest.approx(value, rel=0.02) for name, value in likely.items()}


def test_unequal_roots_use_the_right_number_of_orders_a_root() -> None:
    # Of many such trees the mean estimate is the truth: root 4, order 1; a wrong number of orders a root is not.
    draws = np.random.default_rng(0)
    sizes = np.array([1, 2, 9])
    roots = np.repeat(np.arange(3), sizes)
    found = []
    for _ in range(100):
        values = draws.normal(0, 2, 3)[roots] + draws.normal(0, 1, 12)
        scores = crossed(values[:, None]).assign(root=[f"r{r}" for r in roots])
        found.append(variance_split(scores)["components"]["root"])
    assert np.mean(found) == pytest.approx(4, rel=0.25)


def test_one_seed_can_not_tell_the_order_from_chance() -> None:
    values = np.array([[50.0], [60.0], [55.0]])
    found = variance_split(crossed(values))
    assert found["components"] == {"order_and_residual": pytest.approx(25.0)}
    assert "one training seed" in found["reasons"]["seed"]


def test_a_negative_estimate_is_shown_as_nothing_and_said() -> None:
    found = variance_split(crossed(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])))
    assert found["components"]["order"] == 0
    assert "order" in found["notes"][0]


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (crossed(np.array([[1.0, 2.0]])), "one order"),
        (crossed(np.array([[1.0, 2.0], [2.0, 4.0]]), per_root=2), "one tree root"),
        (crossed(np.array([[1.0, 2.0], [2.0, 4.0]])).iloc[:3], "incomplete"),
    ],
)
def test_what_can_not_be_split_says_why(scores: pd.DataFrame, reason: str) -> None:
    found = variance_split(scores)
    assert found["components"] is None
    assert reason in found["reasons"]["components"]
