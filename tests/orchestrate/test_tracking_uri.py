"""Which MLflow addresses are taken, what is shown of them, and the web page's."""

from __future__ import annotations

from pathlib import Path

import pytest

from loda.errors import ConfigError
from orchestrate.tracking_uri import redact, tracking_uri, ui_command, ui_url


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://host/x"])
def test_a_uri_that_can_hold_no_study_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a database nor a server"):
        tracking_uri(uri, tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p%40ss@host/db", "postgresql://me:***@host/db"),
        ("http://host/x?token=abc&run=1", "http://host/x?token=***&run=1"),
        ("http://:pw@host and https://a:b@c", "http://:***@host and https://a:***@c"),
        ("postgresql://me:p@ss@host/db", "postgresql://me:***@host/db"),
        ("http://127.0.0.1:5000/#/x", "http://127.0.0.1:5000/#/x"),
        ("method.rank: 4", "method.rank: 4"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_the_page_opens_in_the_view_for_experiments() -> None:
    assert ui_url(5000, "3") == "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning"
    ranked = ui_url("https://host/", "3", search="tags.level = 'trial'", order_by="metrics.objective")
    assert ranked.startswith(
        "https://host/#/experiments/3/runs?workflowType=machine_learning&searchFilter=tags.level%20"
    )
    assert ranked.endswith("&orderByKey=metrics.objective&orderByAsc=false")
    with pytest.raises(ConfigError, match="is a server already"):
        ui_command("http://host:5000", 5001)
