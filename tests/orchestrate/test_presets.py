"""The papers' own values, and changing from one method to another."""

from __future__ import annotations

import pytest

from loda.errors import ConfigError
from loda.methods import BUILT_IN, preset
from orchestrate.catalogue import method_rows, preset_options
from orchestrate.cli import _load
from orchestrate.study import Study, load_study


def _value(study: Study, path: str) -> object:
    node: object = study.resolved()
    for key in path.split("."):
        node = node[key]  # type: ignore[index]
    return node


@pytest.mark.parametrize("name", [method.name for method in BUILT_IN])
def test_a_preset_makes_a_valid_study_with_its_values(name: str) -> None:
    values = preset(name)
    study = load_study().with_values(values)
    assert study.method.name == name
    for path, value in values.items():
        assert _value(study, path) == value, path
    assert all(path.split(".")[0] in ("method", "training", "head", "backbone") for path in values)


@pytest.mark.parametrize("name", [method.name for method in BUILT_IN])
def test_a_preset_passes_through_the_command_line(name: str) -> None:
    options = preset_options(name)
    assert not any(" " in text for text in options.values())
    study = _load(None, [f"{path}={text}" for path, text in options.items()])
    assert study == load_study().with_values(preset(name))


def test_every_method_of_ours_has_its_papers_values() -> None:
    # Nothing to set, nothing that carries over from language models, and a reconstruction.
    assert {method.name for method in BUILT_IN if not method.published} == {"simplecil", "ortholora", "thanora"}


def test_published_values_that_are_settled_are_in_the_presets() -> None:
    assert preset("inflora")["training.lr"] == 5e-4 and preset("inflora")["training.batch_size"] == 128
    assert preset("sdlora")["training.lr"] == 8e-3 and preset("sdlora")["method.rank"] == 10
    assert preset("keeplora")["method.energy_features"] == 0.99 and preset("keeplora")["training.optimizer"] == "adamw"


def test_an_unknown_method_has_no_preset() -> None:
    with pytest.raises(ConfigError, match="--preset: unknown method 'inflor'; did you mean 'inflora'"):
        preset_options("inflor")


def test_another_method_starts_from_its_own_defaults() -> None:
    study = load_study()
    changed = study.with_values({"method.rank": 3, "method.name": "sequential"})
    assert changed.method.model_dump() == {"name": "sequential", "rank": 3, "scale": 1.0, "start_seed": 0}
    kept = study.with_values({"method.name": "loda", "method.rank_general": 3})
    assert kept.method == study.method.model_copy(update={"rank_general": 3})
    with pytest.raises(ConfigError, match="rank_general: unknown key"):
        study.with_values({"method.name": "sequential", "method.rank_general": 3})


def test_the_list_says_what_each_method_keeps_and_whose_rule_it_is() -> None:
    rows = {row["name"]: row for row in method_rows()}
    assert rows["olora"]["memory_growth"] == "linear" and rows["inflora"]["memory_growth"] == "bounded"
    assert rows["loda"]["memory_growth"] == "constant" and rows["loda"]["reconstructed"] is False
    assert rows["inflora"]["published"]["method.rank"] == 10
