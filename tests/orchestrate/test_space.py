from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from loda.errors import ConfigError
from orchestrate.space import SearchSpace, bundled_spaces, load_space, parse_space
from orchestrate.study import Study, load_study, parse_study

LR = {"type": "float", "low": 0.001, "high": 0.1, "log": True}


def space_of(parameters: dict[str, Any], **more: Any) -> SearchSpace:
    return parse_space({"method": "loda", "parameters": parameters, **more}, "mine")


def study_of(**sections: Any) -> Study:
    return parse_study(sections, "study")


def problems_of(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_space(values, "mine")
    return caught.value.problems


def draw(space: SearchSpace, **fixed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    trial = optuna.trial.FixedTrial(fixed)
    return space.suggest(trial), trial.params


@pytest.mark.parametrize("name", bundled_spaces())
def test_bundled_spaces_fit_their_method(name: str) -> None:
    space = load_space(name)
    study = study_of(method={"name": space.method})
    assert space.name == name
    assert space.description
    assert space.problems(study) == []
    assert space.outside(study) == []


def test_the_shipped_spaces_are_there() -> None:
    assert {"loda", "loda-small", "gao", "sequential"} <= set(bundled_spaces())


def test_the_bundled_study_searches_its_own_space() -> None:
    study = load_study()
    assert load_space(study.search.space).problems(study) == []


@pytest.mark.parametrize("name", bundled_spaces())
def test_every_sampled_setting_is_a_valid_study(name: str) -> None:
    space = load_space(name)
    study = study_of(method={"name": space.method})
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(25):
        trial = search.ask()
        settings = space.suggest(trial)
        sampled = study.with_values(settings)
        # What was sampled is found again in the study that it makes.
        assert space.settings_of(space.from_settings(sampled) or {}) == settings
        assert all("." in path for path in settings)
        search.tell(trial, 0.0)


def test_loda_space_samples_thresholds_and_rho_only_where_they_are_read() -> None:
    space = load_space("loda")
    fixed = {
        "training.lr": 0.01, "method.rank_general": 4, "general_rank_by": "energy", "method.energy_general": 0.9,
        "method.rank_isolated": 8, "isolated_rank_by": "rank", "method.gao": False,
        "method.recalibration": "none",
    }  # fmt: skip
    settings, params = draw(space, **fixed)
    assert settings["method.energy_general"] == 0.9
    assert settings["method.energy_isolated"] is None
    assert "method.rho_max" not in settings
    assert "method.gamma_m" not in settings
    assert "method.energy_isolated" not in params
    assert params["general_rank_by"] == "energy"


def test_a_space_is_found_by_path(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("method: loda\nparameters: {training.lr: {type: float, low: 1e-4, high: 1e-2, log: true}}\n")
    space = load_space(path)
    assert space.name == "tiny"
    assert space.parameters["training.lr"].low == 1e-4  # YAML reads 1e-4 as text


@pytest.mark.parametrize("source", ["lodda", "nowhere/x.yaml"])
def test_an_unknown_space_names_the_known_ones(source: str) -> None:
    with pytest.raises(ConfigError, match=f"bundled: {', '.join(bundled_spaces())}"):
        load_space(source)


@pytest.mark.parametrize("content", [b"method: [", b"\xff\xfe\x00", b"- 1"])
def test_files_that_are_no_space_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_space(path)


def test_all_problems_come_at_once() -> None:
    found = problems_of(
        {
            "metod": "loda",
            "method": "lodaa",
            "parameters": {
                "training.lr": {"type": "float", "low": 1, "high": 0.1, "log": True},
                "head.margin": {"type": "float", "low": 0, "high": 0.5, "log": True},
                "head.scale": {"type": "float", "lwo": 1, "high": 2},
                "method.gao": {"type": "categorical", "choices": []},
                "method.rank_general": {"type": "int", "low": 1.5, "high": 9, "step": 2},
                "switch": {"type": "int", "low": 1, "high": 2},
                "method.rho_max": {"type": "float", "low": 0.1, "high": 0.5, "when": {"later": 1}},
                "method.rho_scale": {"type": "categorical", "choices": ["absolute"], "when": {"swich": 1}},
                "later": {"type": "categorical", "choices": [1, 1]},
            },
        }
    )
    text = "\n".join(found)
    assert all(problem.startswith("mine: ") for problem in found)
    for expected in (
        "metod: unknown key; did you mean 'method'?",
        "unknown method 'lodaa'; did you mean 'loda'?",
        "training.lr: low: 1 is greater than high: 0.1",
        "head.margin: low: must be greater than 0 with log: true, but got 0",
        "head.scale.lwo: unknown key; did you mean 'low'?",
        "method.gao: choices: expected at least one value",
        "method.rank_general: low: expected a whole number, but got 1.5",
        "switch: a name without a dot is a switch; a switch is categorical",
        "method.rho_max: when: later: named before it is defined; move it up",
        "method.rho_scale: when: swich: no such parameter or switch; did you mean 'switch'?",
        "later: choices: a value is named twice",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"type": "float", "low": 1}, "high: missing"),
        ({"type": "float", "low": 1, "high": 2, "choices": [1]}, "choices: only for type: categorical"),
        ({"type": "categorical", "choices": [1], "low": 1}, "low: not for a categorical one"),
        ({"type": "float", "low": 1, "high": 2, "log": True, "step": 0.5}, "can't be combined with log"),
        ({"type": "float", "low": 0, "high": 1, "step": 0.3}, "can't be reached"),
        ({"type": "categorical", "choices": [[1]]}, "expected plain values"),
        ({"type": "floot", "low": 0, "high": 1}, "type: input should be"),
        ({"low": 0, "high": 1}, "type: field required"),
        ({"type": "float", "low": 0, "high": 1, "otherwise": 2}, "otherwise: only together with when"),
        ("0.1", "expected a mapping with the key type"),
    ],
)
def test_a_bad_parameter_is_explained(parameter: Any, message: str) -> None:
    assert message in "\n".join(problems_of({"method": "loda", "parameters": {"training.lr": parameter}}))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"method.gao": "yes"}, "expected one of true, false, but got yes"),
        ({"method.gao": 1}, "expected one of true, false, but got 1"),
        ({"training.lr": 0.01}, "a float never has exactly that value"),
    ],
)
def test_a_condition_must_be_able_to_hold(condition: dict[str, Any], message: str) -> None:
    parameters = {
        "training.lr": LR,
        "method.gao": {"type": "categorical", "choices": [True, False]},
        "method.rho_max": {"type": "float", "low": 0.1, "high": 1, "when": condition},
    }
    assert message in "\n".join(problems_of({"method": "loda", "parameters": parameters}))


def test_points_are_checked_and_normalised() -> None:
    assert space_of({"training.lr": LR}, points=[{"training.lr": 0.1}]).points == ({"training.lr": 0.1},)
    ranks = {"method.rank_general": {"type": "int", "low": 2, "high": 8}}
    assert space_of(ranks, points=[{"method.rank_general": 4.0}]).points[0] == {"method.rank_general": 4}
    found = problems_of(
        {"method": "loda", "parameters": ranks, "points": [{"method.rank_general": 9}, {"method.rank_genral": 3}]}
    )
    assert "points[0].method.rank_general: expected a whole number from 2 to 8, but got 9" in found[0]
    assert "did you mean 'method.rank_general'?" in found[1]


def test_a_child_of_an_inactive_parameter_is_inactive() -> None:
    space = space_of(
        {
            "method.gao": {"type": "categorical", "choices": [True, False]},
            "method.rho_scale": {
                "type": "categorical", "choices": ["absolute", "relative"], "when": {"method.gao": True}
            },
            "method.rho_max": {"type": "float", "low": 0.1, "high": 1, "when": {"method.rho_scale": "relative"}},
        }
    )  # fmt: skip
    assert draw(space, **{"method.gao": False})[1] == {"method.gao": False}
    settings, _ = draw(space, **{"method.gao": True, "method.rho_scale": "relative", "method.rho_max": 0.5})
    assert settings["method.rho_max"] == 0.5


def test_a_space_for_another_method_is_refused() -> None:
    found = load_space("loda").problems(study_of(method={"name": "sequential"}))
    assert found == [
        "search space 'loda' is for method 'loda', but the study's method is 'sequential'; "
        "set search.space or method.name"
    ]


def test_problems_name_settings_that_are_absent_refused_or_not_to_be_searched() -> None:
    space = space_of(
        {
            "training.lr": {"type": "float", "low": 0, "high": 1},
            "method.rho_mx": {"type": "float", "low": 0.1, "high": 1},
            "method.recalibration": {"type": "categorical", "choices": ["diagonal", "fully"]},
            "orders.tune": {"type": "int", "low": 1, "high": 3},
            "training.seed": {"type": "int", "low": 0, "high": 3},
            "training.augmentation": {"type": "categorical", "choices": [1]},
        }
    )
    found = space.problems(study_of())
    text = "\n".join(found)
    assert len(found) == 6
    assert "training.lr: the setting refuses 0" in text
    assert "method.rho_mx: no such setting; did you mean 'method.rho_max'?" in text
    assert "method.recalibration: the setting refuses fully (input should be 'diagonal'" in text
    assert "orders.tune: can't be searched" in text
    assert "training.seed: can't be searched" in text
    assert "training.augmentation: no such setting" in text


def test_own_setting_as_a_point_sets_the_switches() -> None:
    space = load_space("loda")
    point = space.from_settings(study_of(method={"name": "loda", "energy_general": 0.9, "gao": False}))
    assert point is not None
    assert point["general_rank_by"] == "energy"
    assert point["method.energy_general"] == 0.9
    assert point["isolated_rank_by"] == "rank"
    assert "method.rho_max" not in point


def test_own_setting_outside_says_why() -> None:
    space = load_space("loda")
    study = study_of(method={"name": "loda", "energy_general": 0.2}, training={"lr": 3.0})
    assert space.from_settings(study) is None
    reasons = "\n".join(space.outside(study))
    assert "training.lr: expected a number from 0.001 to 0.5, but the study has 3.0" in reasons
    assert "method.energy_general" in reasons


def test_stepped_and_whole_numbers_match_only_on_their_grid() -> None:
    space = space_of(
        {
            "head.margin": {"type": "float", "low": 0, "high": 0.3, "step": 0.1},
            "training.epochs": {"type": "int", "low": 1, "high": 9, "step": 4},
        }
    )
    assert space.from_settings(study_of(head={"margin": 0.2}, training={"epochs": 5})) is not None
    assert len(space.outside(study_of(head={"margin": 0.25}, training={"epochs": 4}))) == 2


def test_extremes_set_each_end_once() -> None:
    space = space_of({"method.rank_general": {"type": "int", "low": 2, "high": 64}, "training.lr": LR})
    found = dict(space.extremes(study_of()))
    assert list(found) == [
        "method.rank_general: 2", "method.rank_general: 64", "training.lr: 0.001", "training.lr: 0.1"
    ]  # fmt: skip
    assert found["method.rank_general: 64"].resolved()["method"]["rank_general"] == 64
