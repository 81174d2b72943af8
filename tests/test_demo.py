"""The whole way, as `make demo` goes it, and what it leaves for `make lab`."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from nbprod.demo import STAGES


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project that the demo has made, and what the demo printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        ["nbprod", "demo", "late-flights"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "late-flights", done.stdout


def value(printed: str, name: str) -> str:
    """What stands behind `name` in the summary."""
    found = re.search(rf"^  {name} +(.*)$", printed, re.MULTILINE)
    assert found, f"{name} is not in the summary:\n{printed}"
    return found[1]


def test_each_stage_is_announced_and_ends(demo: tuple[Path, str]):
    _, printed = demo
    for number, title in enumerate(STAGES, start=1):
        assert f"[{number}/{len(STAGES)}] {title}" in printed
    assert len(re.findall(r"^ +done in [0-9.]+ s$", printed, re.MULTILINE)) == len(STAGES)


def test_the_summary_is_computed(demo: tuple[Path, str]):
    """Facts of the data set bound it: the flights of four months, a season that changes."""
    _, printed = demo
    months = dict(re.findall(r"(2013-\d\d): ([0-9.]+)", value(printed, "AUC in service")))
    assert list(months) == ["2013-04", "2013-05", "2013-06", "2013-07"]
    assert all(0.6 < float(auc) < 0.85 for auc in months.values())
    assert 0.65 < float(value(printed, "AUC at training").split()[0]) < 0.85
    assert value(printed, "Answered").startswith("111,060 flights, the outcome of 111,060 of them")
    assert {"month", "temp", "dewp"} <= set(value(printed, "Drifted").split(", "))
    for name in ("Notebook", "Report"):
        assert Path(value(printed, name)).is_file()


def test_each_part_of_the_way_is_recorded(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    folder, printed = demo
    monkeypatch.chdir(folder)

    def said(*words: str) -> list[dict[str, object]]:
        done = subprocess.run(["nbprod", *words, "--json"], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    runs = said("runs")
    assert [run["status"] for run in runs] == ["succeeded"] * 6
    trained = [run for run in runs if run["notebook"] == "nbs/10_train.ipynb"]
    best = max(trained, key=lambda run: run["metrics"]["auc"])
    release = said("releases", "arrival_delay")[-1]
    assert release["model"] == best["models"][0] == value(printed, "Model").split(",")[0]
    assert all(gate["passed"] for gate in release["gates"])
    record = json.loads(Path(best["path"]).read_text())["metadata"]["nbprod"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record["lineage"]["commit"] == commit.stdout.strip()
    assert record["lineage"]["dirty"] is False


def test_plain_bentoml_serve_answers_as_the_model_does(
    demo: tuple[Path, str], tmp_path: Path, free_port: Callable[[], int]
):
    """Neither the project's folder nor nbprod's command line is needed to serve the Bento."""
    _, printed = demo
    bento, port = value(printed, "Bento").split()[-1], free_port()
    name, version = bento.split(":")
    folder = Path(os.environ["BENTOML_HOME"]) / "models" / name / version
    examples = json.loads((folder / "examples.json").read_text())
    with (tmp_path / "log").open("wb") as log:
        service = subprocess.Popen(
            ["bentoml", "serve", bento, "--port", str(port)], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        body = json.dumps({"rows": examples["rows"]}).encode()
        url, headers = f"http://127.0.0.1:{port}/predict", {"Content-Type": "application/json"}
        answer = patiently(lambda: urllib.request.urlopen(urllib.request.Request(url, body, headers)))
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(timeout=60)
    assert answer["model"] == bento
    assert answer["predictions"] == examples["predictions"]
    pairs = zip(answer["probabilities"], examples["probabilities"], strict=True)
    assert all(given == pytest.approx(expected, abs=1e-6) for given, expected in pairs), "it is compiled"


def patiently(request: Callable[[], object], seconds: float = 90) -> dict[str, object]:
    """The JSON answer to a request, repeated while nobody answers yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with request() as response:
                return json.load(response)
        except (urllib.error.URLError, ConnectionError) as error:
            refused = not isinstance(error, urllib.error.HTTPError) or error.code == 503
            if not refused or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_the_lab_starts_service_and_notebooks_and_stops_both(
    demo: tuple[Path, str], tmp_path: Path, free_port: Callable[[], int]
):
    folder, _ = demo
    port, log = free_port(), tmp_path / "lab.log"
    with log.open("wb") as output:
        lab = subprocess.Popen(
            ["nbprod", "lab", str(folder), "--port", str(port), "--no-browser", "--traffic", "40"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        model = patiently(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/model"))
        assert model["name"] == "arrival_delay"
        deadline = time.monotonic() + 60
        while not re.search(r"http://\S+/lab/tree/nbs/30_dashboard.ipynb", log.read_text()):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        while not re.search(r"^nbprod_rows_total\S* [1-9]", metrics(port), re.MULTILINE):
            assert time.monotonic() < deadline, "no traffic was replayed"
            time.sleep(0.2)
    finally:
        lab.terminate()
        assert lab.wait(timeout=60) == 130
    with pytest.raises(urllib.error.URLError):
        metrics(port)


def metrics(port: int) -> str:
    """What the service publishes for Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return str(response.read(), "utf-8")


def test_the_demo_leaves_other_projects_alone(project: Path):
    done = subprocess.run(["nbprod", "demo", str(project)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is a project of its own" in done.stderr
    assert sorted(path.name for path in project.iterdir()) == [".git", ".gitignore", "nbs", "settings.ini"]
