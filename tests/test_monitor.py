"""The report notebook of a project, executed as `nbprod monitor` does it, and its page in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright
from sklearn.ensemble import HistGradientBoostingClassifier

import nbprod
from nbprod.errors import CellError, NotFoundError, RunError
from nbprod.experiment.runs import load_run
from nbprod.model.artifact import log_model
from nbprod.model.contract import plain_rows
from nbprod.model.store import load
from nbprod.monitor.page import page
from nbprod.monitor.report import NOTEBOOK, Report, monitor
from nbprod.serve.prediction_log import Entry, FeedbackLog, PredictionLog
from nbprod.settings import load_settings

TEMPLATE = Path(nbprod.__file__).parent / "templates" / "flights" / NOTEBOOK
PARAMETERS = "name: str = 'late'\nsince: str | None = None"


def draw_flights(rows: int, temperature: float, months: list[int], seed: int = 0) -> pd.DataFrame:
    """Made-up flights, with the columns of a date that the template's notebook expects."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "carrier": pd.Categorical(rng.choice(["UA", "B6", "EV"], rows)),
            "temperature": rng.normal(temperature, 9, rows),
            "year": 2013,
            "month": rng.choice(months, rows),
            "day": rng.integers(1, 29, rows),
        }
    )


def is_late(flights: pd.DataFrame) -> np.ndarray:
    return (flights["temperature"] + np.random.default_rng(1).normal(0, 8, len(flights)) < 30).astype(int)


@pytest.fixture
def tag(project: Path) -> str:
    """A model in the store, for a project with the template's report notebook; nothing is logged yet."""
    shutil.copy(TEMPLATE, project / NOTEBOOK)
    winter = draw_flights(1500, 35, [1, 2, 3])
    classifier = HistGradientBoostingClassifier(max_iter=10, categorical_features="from_dtype")
    late = is_late(winter)
    return log_model(classifier.fit(winter, late), "late", inputs=winter, labels=late)


def log_rows(tag: str, flights: pd.DataFrame, outcomes: np.ndarray | None = None) -> None:
    """Let the model `tag` answer `flights`, and tell it the `outcomes`."""
    model, folder = load(tag), load_settings().predictions / "late"
    answer, ids = model.answer(flights), [f"{i:05}" for i in range(len(flights))]
    log, feedback = PredictionLog(folder, model.tag, model.contract), FeedbackLog(folder)
    values = model.contract.reader.check(plain_rows(model.contract, flights)).columns
    log.append(Entry(ids, values, answer.predictions, answer.probabilities, 0.01))
    if outcomes is not None:
        feedback.append(list(zip(ids, outcomes.tolist(), strict=True)))
    log.close()
    feedback.close()


@pytest.fixture
def open_page(chromium: str) -> Iterator[Callable[[Path], tuple[str, list[str]]]]:
    """Open an HTML file in Chromium: its visible text, and every request other than for the file itself."""
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        tab = browser.new_page()
        requested: list[str] = []
        tab.on("requestfinished", lambda request: requested.append(request.url))

        def open_file(path: Path) -> tuple[str, list[str]]:
            tab.goto(path.as_uri())
            tab.wait_for_load_state("networkidle")
            ours = (path.as_uri(), "data:")
            return tab.inner_text("body"), [url for url in requested if not url.startswith(ours)]

        yield open_file
        browser.close()


def test_the_templates_notebook_reports(tag: str, open_page: Callable) -> None:
    spring = draw_flights(1200, 50, [4, 5], seed=2)
    log_rows(tag, spring, is_late(spring))
    report = monitor("late", since="1h", progress=False)
    assert {each.column for each in report.features if each.drifted} == {"temperature", "month"}
    assert [each.start for each in report.performance.periods] == ["2013-04", "2013-05"]
    assert report.html is not None and report.path is not None
    run = load_run(report.path.parent.name)
    assert run.status == "succeeded" and run.params["since"] == report.window["since"] and not run.models
    assert report.model == tag
    text, requests = open_page(report.html)
    assert "temperature has drifted" in text and "AUC in service" in text and "read_window" not in text
    assert requests == []
    assert report.html.read_text().count("data:image/png") == 6, "the figures"
    assert Report.from_dict(report.as_dict()) == report


def test_a_first_hour_without_outcomes_is_a_report_too(tag: str) -> None:
    log_rows(tag, draw_flights(8, 35, [3], seed=3))
    report = monitor("late", progress=False)
    assert report.rows == 8 and report.performance.rows == 0
    assert {"window", "feedback"} <= {each.kind for each in report.findings}
    assert all(each.severity == "info" for each in report.findings)


@pytest.mark.usefixtures("tag")
def test_without_rows_no_kernel_starts() -> None:
    with pytest.raises(NotFoundError, match="No predictions of 'late' are logged") as caught:
        monitor("late", progress=False)
    assert caught.value.exit_code == 2
    assert not load_settings().runs.exists()


def test_a_notebook_that_logs_no_report_or_fails(project: Path, tag: str) -> None:
    log_rows(tag, draw_flights(8, 35, [3], seed=3))
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[tagged]), project / NOTEBOOK)
    with pytest.raises(RunError, match=r"logged no report: end it with `report.log\(\)`"):
        monitor("late", progress=False)
    nbformat.write(new_notebook(cells=[tagged, new_code_cell("1 / 0")]), project / NOTEBOOK)
    with pytest.raises(CellError, match="ZeroDivisionError"):
        monitor("late", progress=False)


def test_a_page_cannot_ask_a_server(tmp_path: Path, open_page: Callable) -> None:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        body = f'<h1>May</h1><img src="{url}/a.png"><script src="{url}/b.js"></script>'
        body += f'<iframe src="{url}/c"></iframe>'
        path = tmp_path / "report.html"
        path.write_text(page("May", body))
        text, requests = open_page(path)
        assert "May" in text and asked == [] and requests == []
        path.write_text(body)
        open_page(path)
        assert sorted(asked) == ["/a.png", "/b.js", "/c"], "without the policy they are asked for"
        server.shutdown()
