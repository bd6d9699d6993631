"""Bad settings are told all at once, before any work; a diverging run names its stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from loda.errors import ConfigError, StageError
from loda.run import load_run_settings, run_sequence
from tests.conftest import SettingsFactory


def test_validation_without_held_out_images_is_refused(tiny_settings: SettingsFactory) -> None:
    with pytest.raises(ConfigError, match="validation"):
        run_sequence(tiny_settings(stream={"validation": 0.0}), split="validation")


def test_divergence_names_the_stage(tiny_settings: SettingsFactory) -> None:
    with pytest.raises(StageError, match=r"adapt of stage 1 \(task-0\d\): .*diverged; lower training.lr"):
        run_sequence(tiny_settings(training={"lr": 1e30}))


@pytest.mark.parametrize("name", ["loda", "sequential"])
def test_divergence_in_the_very_last_step_names_the_stage_too(name: str, tiny_settings: SettingsFactory) -> None:
    """The loss is taken before the step: one batch, one epoch, and it never sees the weights that it led to."""
    method = {"name": name, "gao": False} if name == "loda" else {"name": name, "rank": 4}
    settings = tiny_settings(method=method, training={"lr": 1e38, "epochs": 1, "batch_size": 64})
    with pytest.raises(StageError, match=r"of stage 1 \(task-0\d\)"):
        run_sequence(settings)


def test_bad_settings_are_told_all_at_once(tiny_settings: SettingsFactory) -> None:
    settings = tiny_settings(method={"rank_general": 33, "rank_isolated": 40}, stream={"tasks": 7})
    with pytest.raises(ConfigError) as caught:
        run_sequence(settings)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    for part in ("method.rank_general: 33 exceeds the width 32", "method.rank_isolated: 40", "stream.tasks: 7"):
        assert part in told


def test_unreadable_values_are_told_all_at_once_with_their_keys() -> None:
    bad = {
        "training": {"lr": -1, "epochs": "many", "learning_rate": 1},
        "head": {"classifier": "svm"},
        "method": {"name": "loda", "rank_general": 0, "rank": 3},
        "streams": {},
    }
    with pytest.raises(ConfigError) as caught:
        load_run_settings(bad)
    told = "\n".join(caught.value.problems)
    for key in ("training.lr", "training.epochs", "training.learning_rate", "head.classifier", "streams"):
        assert any(problem.startswith(f"{key}:") for problem in caught.value.problems), key
    assert "rank_general" in told and "method" in told


def test_an_unknown_method_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'simplecli'; did you mean 'simplecil'\?"):
        load_run_settings({"method": {"name": "simplecli"}})


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 2)])
def test_an_order_that_is_no_permutation_is_refused(order: tuple[int, ...], tiny_settings: SettingsFactory) -> None:
    with pytest.raises(ConfigError, match="order: expected each task from 0 to 2 once"):
        run_sequence(tiny_settings(), order)


def test_a_study_file_is_read_and_its_platform_sections_are_left_out(
    tiny_settings: SettingsFactory, tmp_path: Path
) -> None:
    settings = tiny_settings()
    values = json.loads(settings.model_dump_json()) | {"name": "tiny", "orders": {"count": 2}, "tracking": {}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    assert load_run_settings(file) == settings


@pytest.mark.parametrize("text", ["- a\n- b\n", "training: [1, 2\n", "just words\n", "training: 3\n"])
def test_a_file_that_is_no_study_is_refused_with_its_reason(text: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_run_settings(file)


def test_a_missing_study_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no study file 'nowhere\.yaml'"):
        load_run_settings("nowhere.yaml")
