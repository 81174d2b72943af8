"""Sweeps: several runs at once, some of which fail, and a user who has seen enough."""

import json
import signal
from pathlib import Path

import pytest
from running import ENDLESS, alive, start_driver, wait_for, write_notebook

from nbprod.errors import RunError
from nbprod.experiment.runs import runs
from nbprod.experiment.sweeps import sweep

RECORD = "from nbprod.experiment.recording import log_metrics\n"


def test_failures_do_not_stop_the_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = RECORD + "log_metrics(share=1 / depth)"
    notebook = write_notebook(project / "nbs" / "train.ipynb", "depth = 1", train)
    tried = sweep(notebook, {"depth": [0, 1, 2, 4]}, jobs=2, progress=True)
    assert [run.params["depth"] for run in tried] == [0, 1, 2, 4]
    assert [run.status for run in tried] == ["failed", "succeeded", "succeeded", "succeeded"]
    assert tried[0].error == {
        "cell": 5,
        "line": "log_metrics(share=1 / depth)",
        "error": "ZeroDivisionError: division by zero",
    }
    assert tried.best("share").params == {"depth": 1}
    assert "4/4" in (progress := capsys.readouterr().err) and "failed=1" in progress
    assert {run.sweep for run in runs()} == {tried[0].sweep} and len(runs()) == 4


def test_runs_share_the_machine(project: Path) -> None:
    """Two at a time do overlap, and each is told its share of the cores."""
    cell = RECORD + "import os, time\nstart = time.time()\ntime.sleep(2)\n"
    cell += "log_metrics(start=start, end=time.time(), threads=float(os.environ['OMP_NUM_THREADS']))"
    notebook = write_notebook(project / "nbs" / "sleep.ipynb", "seed = 0", cell)
    first, second = (run.metrics for run in sweep(notebook, {"seed": [0, 1]}, jobs=2))
    assert first["start"] < second["end"] and second["start"] < first["end"]
    assert first["threads"] == second["threads"] >= 1


def test_unwritable_store(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "depth = 1")
    (project / ".nbprod").write_text("a file where the store should be")
    with pytest.raises(RunError, match="The store cannot be written"):
        sweep(notebook, {"depth": [1, 2]}, jobs=2)


def test_interrupt_ends_the_runs_under_way(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "endless.ipynb", "seed = 0", ENDLESS)
    code = "from nbprod.experiment.sweeps import sweep; "
    code += f"sweep({str(notebook)!r}, {{'seed': [0, 1, 2, 3]}}, jobs=2, progress=False)"
    driver = start_driver(code, project)
    kernels = wait_for(
        lambda: (found := [*project.glob(".nbprod/runs/*/kernel")]) and len(found) == 2 and found, "two runs"
    )
    wait_for(lambda: all(path.read_text() for path in kernels), "two kernels")
    pids = [json.loads(path.read_text()) for path in kernels]
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=40)
    assert driver.returncode == -signal.SIGINT and not any(alive(pid) for pid in pids)
    assert [run.status for run in runs()] == ["cancelled", "cancelled"]
