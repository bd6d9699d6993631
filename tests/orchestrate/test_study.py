from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from loda.errors import ConfigError
from loda.methods import registry
from orchestrate.space import load_space
from orchestrate.study import Study, bundled_studies, load_study, parse_study

DOCS = Path(__file__).parents[2] / "docs"


def problems_of(values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_study(values, "mine.yaml")
    return caught.value.problems


def test_no_file_is_the_bundled_default() -> None:
    assert load_study() == load_study("alphabets")
    assert load_study().name == "alphabets"


@pytest.mark.parametrize("name", bundled_studies())
def test_bundled_studies_are_valid_and_their_space_fits(name: str) -> None:
    study = load_study(name)
    assert load_space(study.search.space).problems(study) == []


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_study(path) == Study()


def test_the_resolved_file_gives_the_same_study(tmp_path: Path) -> None:
    study = load_study().with_values({"method.rho_max": 0.05, "backbone.options": {"patch_size": 8}})
    path = tmp_path / "resolved.yaml"
    path.write_text(study.to_yaml())
    again = load_study(path)
    assert again == study
    assert again.digest == study.digest
    assert yaml.safe_load(study.to_yaml()) == study.resolved()


def test_all_problems_come_at_once_with_the_nearest_names() -> None:
    found = problems_of(
        {
            "trainng": {},
            "method": {"name": "loda", "rho_mx": 1, "recalibration": "half"},
            "training": {"lr": -1, "seed": -3, "augmentation": {"flp": True}},
            "search": {"objective": {"metrc": "a_avg"}},
            "resources": {"cpus_per_worker": math.inf},
        }
    )
    assert all(problem.startswith("mine.yaml: ") for problem in found)
    text = "\n".join(found)
    for expected in (
        "trainng: unknown key; did you mean 'training'?",
        "method.rho_mx: unknown key; did you mean 'rho_max'?",
        "method.recalibration: input should be 'diagonal', 'full' or 'none', but got 'half'",
        "training.lr: input should be greater than 0, but got -1",
        "training.seed: input should be greater than or equal to 0, but got -3",
        "training.augmentation.flp: unknown key; did you mean 'flip'?",
        "search.objective.metrc: unknown key; did you mean 'metric'?",
        "resources.cpus_per_worker: input should be a finite number",
    ):
        assert expected in text
    assert len(found) == 8


def test_keys_of_another_method_are_unknown() -> None:
    found = problems_of({"method": {"name": "sequential", "rnk": 3, "rho_max": 0.1}})
    assert "method.rnk: unknown key; did you mean 'rank'?" in found[0]
    assert "method.rho_max: unknown key; known here: name, rank, scale, start_seed" in found[1]


@pytest.mark.parametrize("path", ["training.seed", "orders.seed", "search.seed", "stream.partition_seed"])
def test_negative_seeds_are_refused(path: str) -> None:
    section, key = path.split(".")
    (problem,) = problems_of({section: {key: -1}})
    assert f"{path}: input should be greater than or equal to 0, but got -1" in problem


def test_an_unknown_method_names_the_nearest() -> None:
    (problem,) = problems_of({"method": {"name": "sequentiel"}})
    assert "method: unknown method 'sequentiel'; did you mean 'sequential'?" in problem
    assert all(name in problem for name in registry())


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ("text", "mine.yaml"),
        ({"method": "loda"}, "method"),
        ({"method": None}, "method"),
        ({"method": {"name": ["loda"]}}, "method"),
        ({"method": {"name": "loda", 3: 3}}, "method"),
        ({3: 3}, "3"),
        ({"training": None}, "training"),
        ({"training": {"epochs": True}}, "training.epochs"),
        ({"name": "a/b"}, "name"),
        ({"orders": {"design": "file"}}, "orders"),
        ({"orders": {"file": "orders.yaml"}}, "orders"),
        ({"search": {"objective": {"multi": []}}}, "search.objective.multi"),
        ({"search": {"objective": {"multi": ["cost", "cost"]}}}, "search.objective"),
        ({"search": {"objective": {"multi": ["costs"]}}}, "search.objective.multi"),
        ({"search": {"objective": {"metric": "a_lst"}}}, "search.objective.metric"),
    ],
)
def test_bad_values_are_named(values: Any, path: str) -> None:
    assert any(path in problem for problem in problems_of(values))


def test_a_missing_orders_file_does_not_hide_other_problems() -> None:
    assert len(problems_of({"orders": {"design": "file"}, "training": {"lr": 0}})) == 2


@pytest.mark.parametrize("content", [b"name: [", b"\xff\xfe\x00x", b"- 1"])
def test_files_that_are_no_study_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_study(path)


@pytest.mark.parametrize("source", ["no/such.yaml", "alphabet", "."])
def test_a_missing_file_names_the_bundled_studies(source: str) -> None:
    with pytest.raises(ConfigError, match="alphabets"):
        load_study(source)


def test_an_unknown_space_names_the_bundled_ones() -> None:
    study = parse_study({"search": {"space": "lodas"}}, "mine.yaml")
    with pytest.raises(ConfigError, match="did you mean 'loda'"):
        load_space(study.search.space)


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("training: {lr: 1e-2, head_lr: 1e-3}")  # text to YAML
    assert (load_study(path).training.lr, load_study(path).training.head_lr) == (0.01, 0.001)


def test_with_values_replaces_nested_settings_and_nothing_else() -> None:
    study = load_study()
    changed = study.with_values({"method.rank_general": 3, "training.augmentation.flip": True})
    expected = study.resolved()
    expected["method"]["rank_general"] = 3
    expected["training"]["augmentation"]["flip"] = True
    assert changed.resolved() == expected
    assert study == load_study()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.rhomax": 1}, "method.rhomax: unknown key; did you mean 'rho_max'"),
        ({"methd.rho_max": 1}, "methd.rho_max: no such setting"),
        ({"training.lr.x": 1}, "training.lr.x: no such setting"),
        ({"training.lr": 0}, "training.lr: input should be greater than 0"),
    ],
)
def test_with_values_refuses_what_a_file_would(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study().with_values(values)


def test_with_values_gives_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_study().with_values({"methd.rho_max": 1, "trainin.lr": 1, "head.margin": 2})
    assert len(caught.value.problems) == 3


def test_the_digest_is_of_what_results_depend_on() -> None:
    study = load_study()
    same = study.with_values(
        {
            "resources.executor": "inline", "resources.concurrent_trials": 7, "resources.store": "elsewhere",
            "tracking.uri": "http://localhost:5000", "tracking.register_model": False,
        }
    )  # fmt: skip
    assert same.digest == study.digest
    others = {"method.rank_general": 3, "training.seed": 1, "orders.tune": 5, "search.seed": 1, "resources.workers": 2}
    digests = {study.with_values({path: value}).digest for path, value in others.items()}
    assert len(digests | {study.digest}) == len(others) + 1


def test_only_the_runs_own_settings_reach_the_stages() -> None:
    settings = load_study().run_settings()
    assert set(type(settings).model_fields) == {"stream", "backbone", "method", "training", "head", "compute"}
    assert settings.method == load_study().method


@pytest.fixture(scope="module")
def study_keys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_keys", DOCS / "study_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_study_files_is_up_to_date(study_keys: ModuleType) -> None:
    page = (DOCS / "study-file.md").read_text(encoding="utf-8")
    assert study_keys.written(page) == page, "run: python docs/study_keys.py"


def test_every_key_is_explained_and_no_other_is(study_keys: ModuleType) -> None:
    rows = [row for section in study_keys.tables().values() for row in section]
    paths = {path for path, _ in rows}
    assert [path for path, row in rows if row.split("|")[-3].strip() == "?"] == []
    assert (study_keys.TEXTS.keys() | study_keys.PUBLISHED.keys()) <= paths

    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in values.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
        return found

    assert leaves(load_study().resolved()) <= paths
