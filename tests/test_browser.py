"""The dashboard in a real JupyterLab, in a real Chromium without a network, watching a real service."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import CHROMIUM

from nbprod.model.artifact import log_model
from nbprod.serve.bento import build
from nbprod.serve.process import start_service

SCREENSHOTS = Path(__file__).resolve().parent.parent / "build"
LAB = "window.jupyterapp"
IDLE = f"{LAB}?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUNNING = ".jp-InputPrompt:text('[*]')"


def flights(rows: int, seed: int, warmer: float = 0.0) -> pd.DataFrame:
    """Made-up flights; `warmer` in degrees."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "carrier": rng.choice(["UA", "B6", "EV", "DL"], rows),
            "hour": rng.integers(5, 24, rows),
            "distance": rng.gamma(3, 350, rows).round(),
            "temperature": rng.normal(38 + warmer, 9, rows).round(1),
            "wind_speed": rng.gamma(4, 2.5, rows).round(1),
        }
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a small model, logged, built and served."""
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OrdinalEncoder

    frame = flights(3000, seed=1)
    chance = 1 / (1 + np.exp(3 - frame["hour"] / 8 - frame["wind_speed"] / 15))
    late = np.random.default_rng(2).random(len(frame)) < chance
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    model = make_pipeline(
        make_column_transformer((encoder, ["carrier"]), remainder="passthrough"),
        HistGradientBoostingClassifier(max_iter=20),
    )
    model.fit(frame, late)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBPROD_STORE", str(tmp_path_factory.mktemp("store")))
        patch.chdir(tmp_path_factory.mktemp("empty"))
        tag = log_model(model, "arrival_delay", frame[:500], late[:500], training=frame)
        with start_service(build(tag).bento) as url:
            yield url


def post(url: str, rows: list[dict[str, Any]]) -> int:
    """The status of POST /predict."""
    body = json.dumps({"rows": rows}).encode()
    request = urllib.request.Request(f"{url}/predict", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.fixture
def traffic(service: str) -> Iterator[list[int]]:
    """Twenty requests a second for at most 90 s, every fiftieth of them wrong; yields the answers' status."""
    ended, answers = threading.Event(), []
    rows = flights(400, seed=3, warmer=15).to_dict("records")

    def send() -> None:
        for i in range(1800):
            if ended.wait(0.05):
                return
            start = i * 7 % 380
            answers.append(post(service, [{"carrier": 1}] if i % 50 == 49 else rows[start : start + 9]))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    yield answers
    ended.set()
    thread.join()


@dataclass
class Lab:
    """A JupyterLab that serves `folder`."""

    url: str
    folder: Path


@pytest.fixture
def lab(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Lab]:
    """JupyterLab with a home of its own, so that nobody's settings play a part."""
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    notices = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notices.parent.mkdir(parents=True)
    notices.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    port = free_port()
    places = {
        "HOME": home,
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "IPYTHONDIR": home / "ipython",
    }
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with (tmp_path / "lab.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *options],
            env=os.environ | {name: str(place) for name, place in places.items()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for_lab(f"http://127.0.0.1:{port}/api", process)
            yield Lab(f"http://127.0.0.1:{port}", folder)
        finally:
            process.terminate()
            process.wait(30)


def wait_for_lab(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "JupyterLab did not start"
            time.sleep(0.1)


@dataclass
class Browser:
    """A page, what it wanted from outside this machine, and the errors of its scripts."""

    page: Any
    outside: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def command(self, name: str, **arguments: Any) -> None:
        """Execute a command of JupyterLab."""
        self.page.evaluate(f"({LAB}).commands.execute({json.dumps(name)}, {json.dumps(arguments)})")

    def run_cell(self, index: int) -> None:
        """Run one cell of the notebook, without waiting for it."""
        self.page.evaluate(f"{LAB}.shell.currentWidget.content.activeCellIndex = {index}")
        self.page.evaluate(f"void {LAB}.commands.execute('notebook:run-cell')")

    def text(self, pattern: str) -> str:
        """The first group of `pattern` in the dashboard's text."""
        content = self.page.locator(".nbprod-dashboard svg").text_content()
        found = re.search(pattern, content)
        assert found, content
        return found.group(1)

    def rows(self) -> int:
        """The number of predicted rows that the dashboard shows."""
        return int(self.text(r"([\d,]+)rows predicted").replace(",", ""))


@pytest.fixture
def browser(chromium: str, lab: Lab) -> Iterator[Browser]:
    """A Chromium that reaches only JupyterLab; a request to anywhere else fails the test."""
    from playwright.sync_api import Route, sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = program.new_page(viewport={"width": 1400, "height": 900}, device_scale_factor=2)
        browser = Browser(page)

        def guard(route: Route) -> None:
            if route.request.url.startswith((f"{lab.url}/", "data:", "blob:")):
                route.continue_()
            else:
                browser.outside.append(route.request.url)
                route.abort()

        page.route("**/*", guard)
        page.on("pageerror", lambda error: browser.errors.append(str(error)))
        yield browser
        program.close()
    assert browser.outside == [] and browser.errors == []


def write_notebook(folder: Path, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "watch.ipynb"
    nbformat.write(notebook, path)
    return path


def wait_for_more_rows(browser: Browser, than: int, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while (rows := browser.rows()) <= than:
        assert time.monotonic() < deadline, f"still {rows} rows"
        browser.page.wait_for_timeout(200)
    return rows


def test_a_live_service_is_watched_in_jupyterlab(service, traffic, lab, browser):
    path = write_notebook(
        lab.folder,
        f"import nbprod\n\ndashboard = nbprod.Dashboard({service!r})\ndashboard",
        "import time\nfrom pathlib import Path",
        "while not Path('enough').exists():\n    time.sleep(0.1)",
        "dashboard.stop()",
    )
    page = browser.page
    page.goto(f"{lab.url}/lab/tree/{path.name}")
    page.wait_for_function(IDLE, timeout=60_000)
    browser.command("application:toggle-left-area")
    browser.run_cell(0)

    # The numbers are there and they change.
    page.wait_for_selector(".nbprod-dashboard svg[data-status=live]", timeout=30_000)
    first = wait_for_more_rows(browser, than=0)
    second = wait_for_more_rows(browser, than=first)
    assert float(browser.text(r"Requests([\d.]+)a second")) > 1
    assert int(browser.text(r"Drift by feature(\d+)of 5 features drifted")) >= 1
    assert browser.text(r"(temperature)[\d.]+drifted") == "temperature"
    label = page.locator(".nbprod-dashboard svg[role=img]").get_attribute("aria-label")
    assert label.startswith("arrival_delay:") and "drifted: temperature" in label

    # A cell that runs does not stop them.
    browser.run_cell(1)
    browser.run_cell(2)
    page.wait_for_selector(RUNNING, timeout=10_000)
    wait_for_more_rows(browser, than=wait_for_more_rows(browser, than=second))
    assert page.locator(RUNNING).count() == 1, "the cell had ended already"
    (lab.folder / "enough").touch()
    page.wait_for_selector(RUNNING, state="detached", timeout=20_000)

    # The pointer tells the time of a point.
    box = page.locator(".nbprod-dashboard svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3 - 27, box["y"] + 160)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", browser.text(r"Requests.*?(\d\d:\d\d:\d\d)"))
    page.mouse.move(0, 0)

    # It wears the theme's colours; and leaves pictures for those who want to look.
    SCREENSHOTS.mkdir(exist_ok=True)
    for theme, card in {"Dark": "rgb(33, 33, 33)", "Light": "rgb(255, 255, 255)"}.items():
        browser.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        page.wait_for_function(f"getComputedStyle(document.querySelector('.card')).fill === '{card}'")
        page.locator(".nbprod-dashboard").screenshot(path=SCREENSHOTS / f"dashboard-{theme.lower()}.png")

    # Stopped, it leaves its picture in the notebook.
    browser.run_cell(3)
    page.wait_for_selector(".jp-OutputArea-output img", timeout=20_000)
    browser.command("docmanager:save")
    page.wait_for_function(f"!{LAB}.shell.currentWidget.context.model.dirty", timeout=20_000)
    (output,) = nbformat.read(path, as_version=4).cells[0].outputs
    assert set(output.data) == {"text/plain", "image/png"} and "is stopped" in output.data["text/plain"]
    check_picture(base64.b64decode(output.data["image/png"]), output.metadata["image/png"]["width"])
    assert traffic.count(200) > 100 and traffic.count(400) > 1

    # And whoever opens it later sees it, without a kernel.
    page.goto("about:blank")
    page.goto(f"{lab.url}/lab/tree/{path.name}?reset")
    page.wait_for_selector(".jp-OutputArea-output img", timeout=60_000)


@pytest.mark.usefixtures("service")
def test_a_model_is_a_card_in_jupyterlab(lab, browser):
    path = write_notebook(
        lab.folder, "import nbprod\n\nnbprod.load_model('arrival_delay:latest')", "nbprod.models()"
    )
    page = browser.page
    page.goto(f"{lab.url}/lab/tree/{path.name}")
    page.wait_for_function(IDLE, timeout=60_000)
    browser.run_cell(0)
    page.wait_for_selector(".nbprod-card", timeout=30_000)
    browser.run_cell(1)
    page.wait_for_selector("table.nbprod-runs", timeout=30_000)
    assert "arrival_delay:live-" in page.locator("table.nbprod-runs").inner_text()

    # What is folded opens with a click, and with the keyboard.
    columns = page.locator(".nbprod-card details").first
    assert not columns.locator("table").is_visible()
    columns.locator("summary").click()
    assert "wind_speed" in columns.locator("table").inner_text()
    columns.locator("summary").press("Enter")
    assert not columns.locator("table").is_visible()
    label = page.locator(".nbprod-card[role=group]").get_attribute("aria-label")
    assert label.startswith("Model arrival_delay:live-")

    # It wears the theme's colours.
    SCREENSHOTS.mkdir(exist_ok=True)
    for theme, color in {"Dark": "rgb(33, 33, 33)", "Light": "rgb(255, 255, 255)"}.items():
        browser.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        shown = "getComputedStyle(document.querySelector('.nbprod-card')).backgroundColor"
        page.wait_for_function(f"{shown} === '{color}'")
        page.locator(".nbprod-card").screenshot(path=SCREENSHOTS / f"card-{theme.lower()}.png")


def check_picture(png: bytes, width: int) -> None:
    """It is a PNG in twice the resolution, and something is drawn on it."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG" and picture.width == 2 * width and picture.height > 600
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colors is not None and len(colors) > 100
