"""What a study leaves for people at its end: facts of its layers, its report and figures. They never make it fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrate.facts import write_facts
from orchestrate.results import OrderResult
from orchestrate.session import Session

logger = logging.getLogger(__name__)


def write_pages(session: Session, evaluated: Sequence[OrderResult], values: Mapping[str, Any]) -> list[Path]:
    """Write ``facts.parquet``, ``report.html`` and ``figures/`` to the run folder.

    Args:
        evaluated: the evaluation orders.
        values: the study's document, which becomes ``summary.json``.

    Returns:
        As :func:`report_pages`.
    """
    try:
        write_facts(session, evaluated)
    except Exception as error:
        logger.warning("facts of layers couldn't be written: %s", error)
    return report_pages(session, values)


def report_pages(session: Session, values: Mapping[str, Any] | None) -> list[Path]:
    """Write ``report.html`` and ``figures/``.

    Args:
        values: the document of a run or sweep that ends this moment; None: all is in the run folder.

    Returns:
        What MLflow should hold of it: the page and the PNG figures. Empty when the report couldn't be drawn; the study
        is over by then, and its results matter more.
    """
    from orchestrate.report import make_report  # draws: half a second of imports that the search doesn't need

    try:
        made = make_report(session.folder, summary=values)
    except Exception as error:  # whatever it is, the results stand
        command = f"orchestrate report {session.study.name}"
        logger.warning("the report couldn't be drawn (%s); `%s` tries again", error, command)
        return []
    return [Path(made["report"]), *(Path(path) for path in made["figures"] if path.endswith(".png"))]
