"""The table of runs in a real JupyterLab: it follows the theme, and a click opens the executed notebook."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHROMIUM
from running import make, wait_for, write_notebook

from nbprod.lab import jupyter_command
from nbprod.settings import load_settings

LAB = "window.jupyterapp"
NOTEBOOK = "nbs/look.ipynb"


@pytest.fixture
def lab(project: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[str]:
    """The address of a JupyterLab on the project, started as `nbprod lab` does."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    write_notebook(project / NOTEBOOK, "import nbprod\nnbprod.runs(sort='-auc')", kernelspec=kernel)
    home, port = tmp_path / "home", free_port()
    notices = home / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notices.parent.mkdir(parents=True)
    notices.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HOME")
    places = {name: str(home / name) for name in names} | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    options = [f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command = [*jupyter_command(load_settings(), browser=False), *options, "--ip=127.0.0.1"]
    with (tmp_path / "lab.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--LabApp.expose_app_in_browser=True"],
            env=os.environ | places | {"NBPROD_LAB": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(lambda: _answers(f"http://127.0.0.1:{port}/api"), "JupyterLab")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def page(chromium: str, lab: str) -> Iterator[Any]:
    """A page with the notebook, executed."""
    from playwright.sync_api import sync_playwright

    for name, auc in (("first", 0.7), ("second", 0.75), ("third", 0.6)):
        make(name, auc, seconds=125.2)
    make("broken", status="failed", metrics={}, seconds=1.0)
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = program.new_page(viewport={"width": 1200, "height": 700})
        page.goto(f"{lab}/lab/tree/{NOTEBOOK}")
        idle = f"{LAB}?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        page.wait_for_function(idle, timeout=60_000)
        page.evaluate(f"void {LAB}.commands.execute('notebook:run-all-cells')")
        page.wait_for_selector("table.nbprod-runs", timeout=60_000)
        yield page
        program.close()


def test_table_in_jupyterlab(page: Any) -> None:
    table = page.locator("table.nbprod-runs")
    lines = [row.split("\t") for row in table.inner_text().splitlines()]
    assert lines[0] == ["id", "status", "started", "duration", "depth", "auc"]
    assert [line[0] for line in lines[1:]] == ["second", "first", "third", "broken"]
    assert lines[1][1] == "succeeded" and lines[1][3:] == ["2 min 5 s", "6", "0.75"]
    color = "element => getComputedStyle(element).color"
    dot = "element => getComputedStyle(element, '::before').color"
    bright, red = (
        page.eval_on_selector(*ask) for ask in (("table.nbprod-runs", color), (".nbprod-failed", dot))
    )
    assert red != page.eval_on_selector(".nbprod-succeeded", dot)
    align = "element => getComputedStyle(element).textAlign"
    aligned = [page.eval_on_selector(f"table.nbprod-runs {which}", align) for which in ("td", ".nbprod-end")]
    assert aligned == ["left", "right"]
    page.evaluate(f"{LAB}.commands.execute('apputils:change-theme', {{theme: 'JupyterLab Dark'}})")
    changed = f"getComputedStyle(document.querySelector('table.nbprod-runs')).color !== '{bright}'"
    page.wait_for_function(changed, timeout=30_000)
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    table.get_by_role("link", name="second").click()
    opened = f"{LAB}.shell.currentWidget?.context?.path === '.nbprod/runs/second/notebook.ipynb'"
    page.wait_for_function(opened, timeout=30_000)
