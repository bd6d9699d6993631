"""Designed orders through the command line: recorded, shared, and the same bits with and without sharing."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import loda
from loda.workbench import open_workbench
from orchestrate.similarity import compute_similarity, task_similarity
from orchestrate.study import load_study
from tests.conftest import SettingsFactory
from tests.e2e.studies import TASKS, Done, call, orchestrate, write_study

TREE = {"design": "tree", "roots": 2, "continuations": 2, "depth": 1}
DISTINCT = 2 + 4 + 4  # stages of that tree of three tasks, of 12 asked for


class Commands:
    """Commands in one folder with a study, in this process."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.capture = folder, patch, capture

    def __call__(self, *words: str) -> Done:
        return call(self.folder, *words, patch=self.patch, capture=self.capture)

    def run(self, *words: str) -> dict[str, Any]:
        return self("run", "study.yaml", "--local", "--json", *words).values

    def recorded(self) -> dict[str, Any]:
        return json.loads((self.folder / "runs" / "tiny" / "orders.json").read_text())


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def test_a_tree_shares_its_roots_and_gives_the_bits_of_no_sharing(commands: Commands, shapes_parquet: Path) -> None:
    write_study(commands.folder, shapes_parquet, orders=TREE)
    plan = commands("plan", "study.yaml", "--json").values
    assert plan["parts"][1]["stages"] == 12 and plan["parts"][1]["stages_distinct"] == DISTINCT
    shared = commands.run()
    assert (shared["stages_requested"], shared["stages_run"], shared["stages_reused"]) == (12, DISTINCT, 2)
    record = commands.recorded()
    assert record["design"] == "tree" and record["kind"] == "task" and record["depth"] == 1
    assert [len({record["roots"][part][0], *record["roots"][part]}) for part in ("tune", "evaluate")] == [1, 2]
    assert not set(record["roots"]["tune"]) & set(record["roots"]["evaluate"])
    assert (record["seed"], record["partition_seed"], record["training_seed"]) == (0, 0, 0)
    results = pd.read_parquet(commands.folder / "runs" / "tiny" / "results.parquet")
    assert {row.root for row in results.itertuples()} == set(record["roots"]["evaluate"])
    assert all(row.root == str(row.order[0]) for row in results.itertuples())

    alone = commands.run("--no-sharing")  # the same store: nothing of it may be used
    assert alone["study_digest"] == shared["study_digest"]
    assert alone["steps_run"] == alone["steps_requested"] == 4 * 12
    for key in ("state_digests", "accuracy_matrix", "a_last", "a_avg"):
        assert alone[key] == shared[key], key
    again = commands.run("--no-sharing")
    assert again["steps_run"] == 0, "it goes on where it stopped, from what it computed itself"
    assert again["state_digests"] == shared["state_digests"]


def test_settings_do_not_share_without_sharing(commands: Commands, shapes_parquet: Path) -> None:
    file = write_study(commands.folder, shapes_parquet, resources={"sharing": False})
    commands.patch.chdir(commands.folder)
    from orchestrate.session import open_session

    session = open_session(load_study(file), search=False)
    (first, second) = session.evaluate_orders
    changes: list[dict[str, Any]] = [{}, {"method.gamma_m": 1.0}]
    keys = [{node.key for node in session.nodes(settings, work)} for settings in changes for work in (first, second)]
    assert len(set().union(*keys)) == sum(map(len, keys)) == 4 * 4 * TASKS
    nodes = session.nodes({}, first)
    own = {node.key for node in nodes}
    assert all(key in own for node in nodes for key in node.reads)


def test_the_plan_before_and_after(commands: Commands, shapes_parquet: Path) -> None:
    write_study(commands.folder, shapes_parquet, orders=TREE)
    before = commands("plan", "study.yaml", "--json").values
    assert before["stages_requested"] == 2 * TASKS + 12  # two trials over one tune order, and the tree
    assert before["stages_stored"] == 0 and before["expected_bytes"] is None
    assert before["stages_to_run"] == before["stages_distinct"]
    saved = 1 - before["stages_distinct"] / before["stages_requested"]
    assert before["share_saved_percent"] == pytest.approx(100 * saved)
    assert not (commands.folder / "stages").exists() and not (commands.folder / "runs").exists()
    commands.run()
    after = commands("plan", "study.yaml", "--json").values
    assert after["stages_distinct"] == before["stages_distinct"]
    assert after["stages_stored"] >= DISTINCT
    assert after["stages_stored"] + after["stages_to_run"] == after["stages_distinct"]
    assert after["expected_worker_hours"] == pytest.approx(after["expected_worker_seconds"] / 3600)
    size = sum(path.stat().st_size for path in (commands.folder / "stages").rglob("*.safetensors"))
    assert 0 < after["expected_bytes"] < 2 * size
    (first, second) = after["tree"]["evaluate"]
    assert [node["orders"] for node in (first, second)] == [2, 2] and first["stored"] and second["stored"]
    assert [len(node["children"]) for node in (first, second)] == [2, 2]
    assert sum(len(leaf["children"]) for leaf in first["children"]) == 2
    assert {first["task"], *(child["task"] for child in first["children"])} == set(after["tasks"])
    alone = commands("plan", "study.yaml", "--no-sharing", "--json").values
    assert alone["stages_distinct"] == alone["stages_to_run"] == alone["stages_requested"]
    assert alone["share_saved_percent"] == 0
    text = commands("plan", "study.yaml").out
    assert "tree task orders" in text and "● " in text and "(2 orders)" in text and "asked for" in text


def test_class_orders_have_tasks_of_their_own_and_the_librarys_bits(commands: Commands, shapes_parquet: Path) -> None:
    write_study(commands.folder, shapes_parquet, stream={"partition": "published"}, orders={"kind": "class", "tune": 2})
    values = commands.run()
    names = ["evaluate-class-1993", "evaluate-class-1996", "evaluate-class-1997"]
    assert list(values["orders"]) == names
    assert values["stages_run"] == values["stages_requested"] == 3 * TASKS, "they have no class group in common"
    commands.patch.chdir(commands.folder)
    for seed, name in zip((1993, 1996, 1997), names, strict=True):
        result = loda.run_sequence("study.yaml", class_seed=seed)
        assert result.state_digest == values["state_digests"][name]
        assert result.summary.a_last == values["a_last"]["per_order"][name]
    record = commands.recorded()
    assert (record["kind"], record["design"]) == ("class", "published")
    assert record["class_seeds"]["evaluate"] == [1993, 1996, 1997] and len(record["class_seeds"]["tune"]) == 2
    np.random.seed(1996)
    assert record["evaluate"][1] == np.random.permutation(6).tolist()
    exported = commands("export", "tiny", "model", "--order", names[2], "--json").values
    learned = exported["config"]["continual_learning"]
    assert learned["tasks"] == ["task-01", "task-02", "task-03"]
    assert sorted(learned["classes"][:2]) == sorted(record["evaluate"][2][:2])


def test_the_published_partition_is_the_first_class_order(tiny_settings: SettingsFactory) -> None:
    stream = {"partition": "published", "validation": 0.0}
    whole = loda.run_sequence(tiny_settings(stream=stream | {"partition_seed": 1993}))
    assert loda.run_sequence(tiny_settings(stream=stream), class_seed=1993).state_digest == whole.state_digest


def test_extremes_are_chosen_by_a_similarity_that_is_kept(commands: Commands, shapes_parquet: Path) -> None:
    write_study(commands.folder, shapes_parquet, orders={"design": "extremes", "evaluate": 3})
    values = commands.run()
    file = commands.folder / "runs" / "tiny" / "similarity.json"
    saved = json.loads(file.read_text())
    matrix = np.asarray(saved["matrix"])
    assert saved["measure"] == "class_means" and len(saved["tasks"]) == TASKS
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    scores = [sum(matrix[a, b] for a, b in itertools.pairwise(order)) for order in values["orders"].values()]
    assert scores[0] > scores[2] > scores[1], "easy, hard, between"
    assert commands.recorded()["hardness"][:2] == [0, 1]
    # A saved matrix of the same data is used again, one of other data is not.
    saved["matrix"] = (1 - matrix + np.eye(TASKS)).tolist()
    file.write_text(json.dumps(saved))
    plan = commands("plan", "study.yaml", "--json").values
    assert sorted(plan["orders"]["evaluate"][0]) == [0, 1, 2]
    assert plan["orders"]["evaluate"][0][1] == list(values["orders"].values())[1][1], "easy is hard now"
    file.write_text(json.dumps(saved | {"key": "of other data"}))
    assert commands("plan", "study.yaml", "--json").values["orders"]["evaluate"] == list(values["orders"].values())
    file.write_text("{")
    assert "similarity.json can't be read" in commands("plan", "study.yaml").err


@pytest.mark.parametrize("measure", ["class_means", "second_moments"])
def test_similarity_reads_training_images_alone_and_follows_the_tasks(
    tiny_settings: SettingsFactory, tmp_path: Path, measure: Any
) -> None:
    bench = open_workbench(tiny_settings())
    matrix = task_similarity(bench, measure, tmp_path).matrix_TT
    assert matrix.shape == (3, 3) and np.abs(matrix).max() == 1 and np.ptp(matrix) > 0.1
    turned = compute_similarity(turned_round(bench), measure)
    assert turned == pytest.approx(matrix[::-1, ::-1], abs=2e-6)
    rows = {split: set(map(int, bench.splits[split])) for split in bench.splits}
    seen = set(bench._decoded)
    assert seen == rows["train"]


def turned_round(bench: Any) -> Any:
    """The workbench with its tasks the other way round."""
    return dataclasses.replace(bench, tasks=bench.tasks[::-1])


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"orders": {"design": "tree", "roots": 2}}, ["design: tree needs roots, continuations and depth"]),
        ({"orders": {"roots": 2}}, ["roots: only with design: tree"]),
        ({"orders": {"kind": "class"}}, ["orders.kind: class", "partition: random", "stream.partition: published"]),
        ({"orders": {"kind": "class", "design": "all"}}, ["all permutes the tasks of a fixed partition"]),
        ({"orders": {"class_seeds": [1]}}, ["class_seeds: only with kind: class"]),
        (
            {"orders": {"kind": "class", "class_seeds": [1, 1]}, "stream": {"partition": "published"}},
            ["class_seeds: name each once"],
        ),
        ({"orders": {"kind": "class", "class_seeds": [-1]}}, ["class_seeds.0", "greater than or equal to 0"]),
        ({"orders": {"design": "balanced", "evaluate": 4}}, ["whole squares", "use 6"]),
        ({"orders": {**TREE, "roots": 3}}, ["orders.roots: 3", "only 3 beginnings of 1"]),
        ({"orders": {**TREE, "continuations": 3}}, ["orders.continuations: 3", "only 2 orders"]),
        ({"orders": {"design": "extremes", "evaluate": 1}}, ["from 2 (easy and hard) to 64"]),
    ],
)
def test_a_design_that_cannot_be_had_is_refused_before_any_work(
    commands: Commands, shapes_parquet: Path, sections: dict[str, Any], parts: list[str]
) -> None:
    write_study(commands.folder, shapes_parquet, mlflow=False, **sections)
    done = commands("run", "study.yaml", "--local")
    assert done.code == 2 and "Traceback" not in done.err
    assert all(part in done.err for part in parts), done.err
    assert not (commands.folder / "stages").exists()


def test_keys_that_came_later_leave_the_digest_of_earlier_studies_alone() -> None:
    study = load_study()
    values = study.resolved()
    for section in ("resources", "tracking", "racing", "robustness"):
        values.pop(section)
    del values["training"]["optimizer"], values["stream"]["resize"], values["compute"]["precision"]
    del values["compute"]["pixel_cache"], values["compute"]["pixel_cache_gb"]
    values |= {"workers": study.resources.workers, "search": values["search"] | {"space": study.search.space}}
    for key in ("kind", "roots", "continuations", "depth", "similarity", "class_seeds"):
        del values["orders"][key]
    assert study.digest == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert study.with_values({"resources.sharing": False}).digest == study.digest
    tree = study.with_values({f"orders.{key}": value for key, value in TREE.items()})
    assert len({study.digest, tree.digest, tree.with_values({"orders.roots": 3}).digest}) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_the_inline_executor_walks_class_orders_without_sharing_to_the_same_bits(
    commands: Commands, shapes_parquet: Path
) -> None:
    orders = {"kind": "class", "class_seeds": [5, 6], "tune": 1}
    write_study(commands.folder, shapes_parquet, stream={"partition": "published"}, orders=orders)
    here = commands.run()
    words = ("run", "study.yaml", "--json", "--no-sharing", "-s", "resources.executor=inline")
    inline = orchestrate(commands.folder, *words).values
    assert inline["steps_run"] == inline["steps_requested"] == here["steps_requested"]
    assert inline["state_digests"] == here["state_digests"]
    assert inline["accuracy_matrix"] == here["accuracy_matrix"]
