"""The pages that people read, in a real browser: the report and MLflow's."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.chromium import Browser, open_browser
from tests.e2e.conftest import Searched
from tests.e2e.studies import start

pytestmark = pytest.mark.browser

PHONE, SCREEN = 390, 1280
# What MLflow's pages say by themselves, whatever is in them: its server has no users' accounts, its table library names
# options that will go, and a chart was laid out in two rounds.
MLFLOWS_OWN = re.compile(
    r"/mlflow/users/current - Failed to load resource: the server responded with a status of 404"
    r"|AG Grid: since v\d"
    r"|ResizeObserver loop completed with undelivered notifications"
)

# Labels of ticks that lie on the next one of the same axis; slanted ones are left out, since their boxes meet.
OVERLAPPING = r"""
const bad = [];
for (const axis of document.querySelectorAll('figure svg [id*=matplotlib]')) {
  const labels = [...axis.querySelectorAll('[id*=tick] text')]
    .filter(label => /rotate\(-?0 /.test(label.getAttribute('transform') || 'rotate(0 '))
    .map(label => [label.textContent, label.getBoundingClientRect()]);
  for (let k = 1; k < labels.length; k++) {
    const [before, p] = labels[k - 1], [after, q] = labels[k];
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
      bad.push(before + ' / ' + after);
  }
}
return [document.querySelectorAll('figure svg [id*=matplotlib] [id*=tick] text').length, bad];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def micro_accuracies(searched: Searched) -> dict[str, float]:
    """A_last of each evaluation order, from the rows of the Parquet file: percent of all images, two decimals."""
    rows = searched.results
    last = rows[(rows["trial"] == "chosen") & (rows["i"] == rows["i"].max())]
    right = (last["accuracy"] * last["images"] / 100).groupby(last["order_name"]).sum()
    return (100 * right / last.groupby("order_name")["images"].sum()).round(2).to_dict()


@pytest.mark.parametrize(
    ("width", "dark"),
    [(SCREEN, False), (SCREEN, True), (PHONE, False), (PHONE, True)],
    ids=["light", "dark", "phone", "dark-phone"],
)
def test_report_shows_the_numbers_of_the_parquet_file(
    searched: Searched, browser: Browser, width: int, dark: bool
) -> None:
    page = (searched.runs / "report.html").as_uri()
    browser.look(width, dark=dark)
    browser.open(page)
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page]
    assert browser.console() == []

    scores = micro_accuracies(searched)
    assert len(scores) == 5
    shown = browser.run("return [...document.querySelectorAll('.headline tr')].map(row => row.innerText)")
    values = {row.split("\t")[0]: row.split("\t")[1] for row in shown}
    assert values["A_last, test"] == f"{np.mean(list(scores.values())):.2f} %"
    assert values["worst order"] == f"{min(scores.values()):.2f} %"
    table = browser.run("return document.querySelector('#accuracy figure table').textContent")
    for name, score in scores.items():
        assert re.search(rf"{name}\s*{score:.2f}", table), name

    assert browser.run("return document.documentElement.scrollWidth") <= width
    cut = browser.run(
        "return [...document.querySelectorAll('figure svg')].filter(svg => {"
        " const box = svg.getBoundingClientRect();"
        " return box.width < 200 || box.right > innerWidth + 1 || !svg.getAttribute('aria-label'); }).length"
    )
    assert cut == 0
    ground, ink = browser.run(
        "const rgb = (e, p) => getComputedStyle(e)[p].match(/[0-9.]+/g).slice(0, 3).map(Number);"
        "return [rgb(document.body, 'backgroundColor'), rgb(document.querySelector('figure svg text'), 'fill')]"
    )
    assert (np.mean(ground) < 60) == dark
    assert (np.mean(ink) > 180) == dark


def test_report_draws_every_section_of_a_searched_study(searched: Searched, browser: Browser) -> None:
    browser.look(SCREEN)
    browser.open((searched.runs / "report.html").as_uri())
    sections = browser.run("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == ["accuracy", "orders", "comparison", "search", "ranks", "time", "provenance"]
    figures = {path.stem for path in (searched.runs / "figures").glob("*.svg")}
    assert {path.stem for path in (searched.runs / "figures").glob("*.png")} == figures
    assert len(browser.run("return document.querySelectorAll('figure svg')")) == len(figures)
    wanted = "accuracy-by-order order-effects position-and-predecessor disparity search-history parameter-importance"
    assert set(wanted.split()) <= figures
    labels, overlapping = browser.run(OVERLAPPING)
    assert labels > 50
    assert overlapping == []
    assert len(browser.print_pdf()) > 20_000


@pytest.fixture(scope="module")
def mlflow_page(searched: Searched) -> Iterator[str]:
    """The address that ``orchestrate ui`` prints, of the server that it has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(searched.folder, "ui", "--study", "tiny", "--port", str(port), group=True)
    try:
        assert server.stderr is not None
        page = server.stderr.readline().strip()
        _wait_for_server(server, f"http://127.0.0.1:{port}/health")
        yield page
    finally:
        os.killpg(server.pid, signal.SIGINT)  # what Ctrl-C does
        server.communicate(timeout=60)


def _wait_for_server(server: subprocess.Popen[str], url: str, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < until, f"no answer from {url}"
            time.sleep(0.3)


def test_mlflow_tells_the_story_of_the_study(searched: Searched, browser: Browser, mlflow_page: str) -> None:
    assert mlflow_page.startswith("http://127.0.0.1:")
    mean = f"{np.mean(list(micro_accuracies(searched).values())):.2f} %"
    names = set(searched.values["orders"])
    browser.look(1600, 1100)

    browser.open(mlflow_page)
    browser.wait_for(f"tiny: loda, A_last {mean}", "matching runs")
    host = mlflow_page.split("/#")[0]
    links = browser.run("return [...document.querySelectorAll('a')].map(a => [a.innerText, a.href])")
    views = {text: address for text, address in links if "searchFilter" in address and "/runs?" in address}
    _only_from(browser, host)

    browser.open(views["settings tried, best first"])
    browser.wait_for(*(f"trial-{number:04d}" for number in range(6)))
    _only_from(browser, host)

    browser.open(views["the same orders in charts, a line each"])
    browser.wait_for("5 matching runs", "accuracy_on")
    drawn = "return document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length"
    _wait_until(lambda: browser.run(drawn) >= len(names), "charts with a line for each order")
    shown = browser.run("return [...document.querySelectorAll('.ag-row a')].map(a => a.innerText)")
    assert {text.split(" (")[0] for text in shown} >= names
    _only_from(browser, host)


def test_mlflow_shows_the_runs_page_with_its_description(
    searched: Searched, browser: Browser, mlflow_page: str
) -> None:
    from mlflow import MlflowClient

    from orchestrate.tracking_uri import ui_url

    client = MlflowClient(searched.values["mlflow"]["uri"], searched.values["mlflow"]["uri"])
    experiment = searched.values["mlflow"]["experiment_id"]
    (study,) = client.search_runs([experiment], "tags.level = 'study'")
    host = mlflow_page.split("/#")[0]
    browser.look(1600, 1100)
    browser.open(ui_url(host, experiment, run_id=study.info.run_id))
    scores = micro_accuracies(searched)
    mean, worst = np.mean(list(scores.values())), min(scores, key=lambda name: (scores[name], name))
    browser.wait_for("Description", f"{mean:.2f} %", f"{scores[worst]:.2f} %", "orchestrate report tiny", "trial-0000")
    _only_from(browser, host)
    artifacts = {file.path for file in client.list_artifacts(study.info.run_id)}
    assert {"report.html", "figures", "results.parquet", "summary.json", "study.yaml"} <= artifacts
    figures = {Path(file.path).name for file in client.list_artifacts(study.info.run_id, "figures")}
    assert figures == {path.name for path in (searched.runs / "figures").glob("*.png")}


def _wait_until(there: object, what: str, seconds: float = 60) -> None:
    assert callable(there)
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, what
        time.sleep(0.2)


def _only_from(browser: Browser, host: str) -> None:
    """The page complained of nothing but what MLflow's pages always do, and asked nobody but its own server."""
    assert [line for line in browser.console() if not MLFLOWS_OWN.search(line)] == []
    assert {url for url in browser.requests() if not url.startswith((f"{host}/", "data:", "blob:"))} <= {"about:blank"}


def test_optuna_dashboard_opens_the_search(searched: Searched, browser: Browser) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    address = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [program, f"sqlite:///{searched.runs / 'optuna.db'}", *address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    host = f"http://127.0.0.1:{port}"
    try:
        _wait_for_server(server, f"{host}/dashboard")
        browser.look(SCREEN)
        browser.open(f"{host}/dashboard/studies/1")
        browser.wait_for("tiny", "History", "Hyperparameter Importance")
    finally:
        server.terminate()
        server.wait(timeout=30)
