"""Compare two finished studies on the orders that both ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from loda.errors import ConfigError
from orchestrate.measurements import flat_params
from orchestrate.records import read_record, read_table
from orchestrate.robustness.analysis import COMPARED, Questions, differences, left_out, spreads
from orchestrate.robustness.tidy import METRICS, Design, Scores, score_orders
from orchestrate.robustness.variants import make_questions
from orchestrate.session import read_run_study
from orchestrate.study import Study

CHOSEN = "chosen"


@dataclass(frozen=True)
class Finished:
    """A study's results as its run folder has them.

    Attributes:
        frame: tidy accuracies on test images, see :mod:`orchestrate.robustness.tidy`.
        settings: variants; the single setting ``chosen`` of a run or a sweep.
        baseline: the variant that stands for the study.
        data_digest: of its images.
        keys: what each evaluation order is, as the classes of its tasks.
    """

    folder: Path
    study: Study
    frame: pd.DataFrame
    settings: tuple[str, ...]
    baseline: str
    data_digest: str
    keys: Mapping[str, str]


def read_finished(folder: Path) -> Finished:
    """Read a run folder: the tables of ``orchestrate robustness`` if it has them, else those of ``run`` or ``sweep``.

    Raises:
        ConfigError: no result yet, or one without the facts that orders are matched by.
    """
    study = read_run_study(folder)
    record = folder / "stream.json"
    again = "the same command again computes nothing that is stored"
    if (folder / "robustness.json").is_file():
        frame = read_table(folder / "robustness.parquet")
        values = read_record(folder / "robustness.json", ("variants", "baseline"))
        settings, baseline = tuple(values["variants"]), str(values["baseline"])
    elif (folder / "summary.json").is_file():
        table = read_table(folder / "results.parquet", ("trial", "split"))
        chosen = table[(table["trial"] == CHOSEN) & (table["split"] == "test")]
        frame = chosen.assign(setting=CHOSEN, zero_shot=float("nan"), baseline=float("nan"))
        settings, baseline = (CHOSEN,), CHOSEN
    else:
        raise ConfigError(f"{folder}: no result yet: it was interrupted or failed; {again}")
    if not record.is_file():
        raise ConfigError(f"{record}: no such file, but orders are matched by it; {again}")
    stream = read_record(record, ("data_digest", "orders"))
    return Finished(folder, study, frame, settings, baseline, stream["data_digest"], stream["orders"])


def compare_studies(first: Path, second: Path) -> dict[str, Any]:
    """The first study's setting (a robustness study's baseline) minus each of the second's, order by order.

    Args:
        first: a run folder.
        second: another one.

    Returns:
        One JSON document: ``paired`` as in a robustness study, ``spread`` of every setting over the common orders,
        the orders that only one has, and the settings that differ.

    Raises:
        ConfigError: a study without results, other images, other tasks, or no order in common.
    """
    if first.resolve() == second.resolve():
        raise ConfigError(f"{first}: a study can't be compared with itself; its variants are: orchestrate show")
    a, b = read_finished(first), read_finished(second)
    _check_streams(a, b)
    common = {key: name for name, key in a.keys.items() if key in set(b.keys.values())}
    if not common:
        raise ConfigError(
            f"no common orders: {a.study.name} has {len(a.keys)} evaluation orders and {b.study.name} {len(b.keys)}, "
            "of the same images, but none is in both (an order is the classes of its tasks, one after another); give "
            f"both the same stream.tasks and partition, and the same orders section.{_hint(a.study, b.study)}"
        )
    labels = ("first", "second") if a.study.name == b.study.name else (a.study.name, b.study.name)
    roots = _roots(a, b, common)
    questions = make_questions(a.study)
    sides = [_scores(side, common, roots) for side in (a, b)]
    named = [{_label(label, side, s): s for s in side.settings} for label, side in zip(labels, (a, b), strict=True)]
    base = _label(labels[0], a, a.baseline)
    return {
        "first": _facts(a),
        "second": _facts(b),
        "baseline": base,
        "alpha": questions.alpha,
        "confidence": questions.confidence,
        "orders": sorted(common.values()),
        "roots": roots,
        "only_first": sorted(name for name, key in a.keys.items() if key not in common),
        "only_second": sorted(name for name, key in b.keys.items() if key not in common),
        "differing_settings": _differing(a, b),
        "spread": {
            label: spreads(scores, setting, questions)
            for scores, settings in zip(sides, named, strict=True)
            for label, setting in settings.items()
            if scores.complete(setting)
        },
        "paired": {metric: _paired(sides, a.baseline, base, named[1], metric, questions) for metric in COMPARED},
    }


def _check_streams(a: Finished, b: Finished) -> None:
    if a.data_digest != b.data_digest:
        raise ConfigError(
            f"{a.study.name} and {b.study.name} ran on different images: stream.dataset {a.study.stream.dataset!r} "
            f"(digest {a.data_digest[:12]}) and {b.study.stream.dataset!r} (digest {b.data_digest[:12]}); "
            "accuracies on different test images can't be paired"
        )


def _hint(a: Study, b: Study) -> str:
    """What of the stream or the orders differs."""
    before, after = ({"stream": s.stream.model_dump(), "orders": s.orders.model_dump()} for s in (a, b))
    first, second = flat_params(before), flat_params(after)
    lines = [f"{key} {first[key]} and {second[key]}" for key in first if first[key] != second.get(key)]
    return f" They differ in: {', '.join(lines)}" if lines else ""


def _roots(a: Finished, b: Finished, common: Mapping[str, str]) -> dict[str, str]:
    """Roots of the common orders; of two trees the coarser, so that nothing dependent is taken as independent."""

    def of(side: Finished) -> dict[str, str]:
        names = {name: common[key] for name, key in side.keys.items() if key in common}
        found = dict(zip(side.frame["order_name"], side.frame["root"])) if "root" in side.frame else {}
        return {here: str(found.get(name, name)) for name, here in names.items()}

    return min(of(a), of(b), key=lambda roots: len(set(roots.values())))


def _scores(side: Finished, common: Mapping[str, str], roots: Mapping[str, str]) -> Scores:
    """Scores on the common orders, under the first study's names of them."""
    here = {name: common[key] for name, key in side.keys.items() if key in common}
    frame = side.frame[side.frame["order_name"].isin(list(here))]
    frame = frame.assign(order_name=frame["order_name"].map(here))
    seeds = tuple(sorted(int(seed) for seed in frame["seed"].unique()))
    return score_orders(frame, Design(side.settings, dict(roots), seeds, int(side.frame["j"].max()) + 1))


def _label(label: str, side: Finished, setting: str) -> str:
    return label if side.settings == (CHOSEN,) else f"{label}: {setting}"


def _paired(
    sides: list[Scores],
    baseline: str,
    base: str,
    others: Mapping[str, str],
    metric: str,
    questions: Questions,
) -> dict[str, Any]:
    first, second = sides
    out = left_out(second, metric)
    found: dict[str, Any] = {
        "baseline": base,
        "differences": {},
        "left_out": {label: out[setting] for label, setting in others.items() if setting in out},
        "reasons": {},
    }
    why = left_out(first, metric).get(baseline)
    if why is not None:
        found["reasons"]["differences"] = f"{base}: {why}"
        return found
    whole = {label: second.by_order(s, metric) for label, s in others.items() if s not in out}
    if not whole:
        found["reasons"]["differences"] = "the second study has no complete setting"
    higher = METRICS[metric].better == "higher"
    values = first.by_order(baseline, metric)
    found["differences"] = differences(values, whole, first.design.roots, questions, higher_is_better=higher)
    return found


def _facts(side: Finished) -> dict[str, Any]:
    return {
        "study": side.study.name,
        "folder": str(side.folder),
        "study_digest": side.study.digest,
        "method": side.study.method.name,
        "settings": list(side.settings),
        "seeds": sorted(int(seed) for seed in side.frame["seed"].unique()),
        "orders": len(side.keys),
    }


def _differing(a: Finished, b: Finished) -> dict[str, list[str | None]]:
    """Settings of the study files that differ, by key path; what a sweep or a variant changed is not in them."""
    first, second = (flat_params(side.study.run_settings().model_dump(mode="json")) for side in (a, b))
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key) and key != "stream.dataset")
    return {key: [first.get(key), second.get(key)] for key in keys}
