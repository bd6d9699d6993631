"""Which MLflow addresses are taken, and the web page's."""

from __future__ import annotations

from pathlib import Path

import pytest

from loda.errors import ConfigError
from orchestrate.tracking_uri import tracking_uri, ui_command, ui_environment, ui_url


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://host/x"])
def test_a_uri_that_can_hold_no_study_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a database nor a server"):
        tracking_uri(uri, tmp_path)


def test_the_page_opens_in_the_view_for_experiments() -> None:
    assert ui_url(5000, "3") == "http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning"
    ranked = ui_url("https://host/", "3", search="tags.level = 'trial'", order_by="metrics.objective")
    assert ranked.startswith(
        "https://host/#/experiments/3/runs?workflowType=machine_learning&searchFilter=tags.level%20"
    )
    assert ranked.endswith("&orderByKey=metrics.objective&orderByAsc=false")
    with pytest.raises(ConfigError, match="is a server already"):
        ui_command("http://host:5000", 5001)


def test_a_password_is_not_on_the_command_line() -> None:
    uri = "postgresql://me:hunter22@host/db"
    assert not any("hunter22" in word for word in ui_command(uri, 5001))
    assert ui_environment(uri)["MLFLOW_BACKEND_STORE_URI"] == uri
    assert "sqlite:////x/mlflow.db" in ui_command("sqlite:////x/mlflow.db", 5001)
