"""Listing runs: the index beside the notebooks, its faults, many processes at once, and comparing."""

import json
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from running import command, make, record_and_list, start_driver, truth, wait_for, write_notebook

from nbprod.experiment import database
from nbprod.experiment import index as index_module
from nbprod.experiment.execution import run
from nbprod.experiment.index import records
from nbprod.experiment.recording import read_record
from nbprod.experiment.runs import runs
from nbprod.settings import load_settings


def test_many_processes_lose_nothing(project: Path) -> None:
    """16 processes record and list at once; each sees its own at once, and the index ends with all."""
    record_and_list(project)
    assert len(runs()) == 160 and records(load_settings()) == truth()
    with sqlite3.connect(project / ".nbprod" / "index.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM nbprod_records_1").fetchone() == (160,)
    connection.close()


@pytest.mark.usefixtures("project")
def test_only_what_changed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "third"):
        make(name)
    assert len(runs()) == 3
    read: list[str] = []

    def watched(path: Path) -> dict[str, Any] | None:
        read.append(path.parent.name)
        return read_record(path)

    monkeypatch.setattr(index_module, "read_record", watched)
    assert len(runs()) == 3 and read == []
    make("second", auc=0.9)
    make("fourth")
    assert runs(sort="-auc")[0].id == "second" and read == ["fourth", "second"]


def test_rebuilt_index_is_equal(project: Path) -> None:
    for number in range(5):
        make(f"run-{number}", auc=float("nan") if number == 3 else 2**70)

    def rows() -> list[Any]:
        with sqlite3.connect(project / ".nbprod" / "index.sqlite") as connection:
            found = connection.execute("SELECT * FROM nbprod_records_1 ORDER BY run").fetchall()
        connection.close()
        return found

    assert len(runs()) == 5
    before = rows()
    (project / ".nbprod" / "index.sqlite").unlink()
    done = command("index", "--rebuild", "--json")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"runs": 5}, "")
    assert rows() == before and str(records(load_settings())) == str(records(load_settings()))
    assert runs()[4].metrics["auc"] == 2**70


def test_damaged_index_changes_no_answer(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes turned, parts cut off, another file altogether: the answer is that of the notebooks."""
    for number in range(20):
        make(f"run-{number}")
    expected, choose = truth(), random.Random(0)
    assert records(load_settings()) == expected
    index = project / ".nbprod" / "index.sqlite"
    whole = index.read_bytes()
    assert len(whole) > 8192
    for round_ in range(120):
        content = bytearray(whole)
        for _ in range(choose.choice([1, 10, 100])):
            content[choose.randrange(len(content))] = choose.randrange(256)
        if round_ % 4 == 0:
            content = content[: choose.randrange(len(content))]
        for end in ("-wal", "-shm"):
            index.with_name(index.name + end).unlink(missing_ok=True)
        index.write_bytes(content)
        assert records(load_settings()) == expected
        assert records(load_settings()) == expected
    assert "was damaged" in caplog.text


def test_index_that_cannot_be_used(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("first")
    (project / "file").write_text("")
    monkeypatch.setenv("NBPROD_INDEX", "sqlite:///file/index.sqlite")
    done = command("runs", "--json")
    assert done.returncode == 0 and [each["id"] for each in json.loads(done.stdout)] == ["first"]
    assert done.stderr.startswith("nbprod: the index sqlite:///") and done.stderr.count("\n") == 1
    done = command("index", "--rebuild")
    assert done.returncode == 1 and "cannot be written" in done.stderr
    monkeypatch.setenv("NBPROD_INDEX", "oracl://host/index")
    done = command("runs")
    assert done.returncode == 2 and "The setting `index`" in done.stderr


def test_locked_index(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A writer that never ends makes listings say so, and not fail."""
    make("first")
    assert len(runs()) == 1
    monkeypatch.setattr(database, "PATIENCE", 0.2)
    writer = sqlite3.connect(project / ".nbprod" / "index.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert len(runs()) == 1 and caplog.text == ""
    make("second")
    assert len(runs()) == 2 and "database is locked" in caplog.text
    writer.close()
    assert len(runs()) == 2 and len(index_module.stored(*_opened())) == 2


def _opened() -> tuple[Any, str]:
    settings = load_settings()
    return database.open_engine(settings), str(settings.store)


def test_interrupted_run_is_found(project: Path) -> None:
    """A run whose process is killed is listed as running before, as interrupted after, and then kept."""
    cell = "import time\ntime.sleep(600)"
    notebook = write_notebook(project / "nbs" / "long.ipynb", "seed = 0", cell)
    code = f"from nbprod.experiment.execution import run\nrun({str(notebook)!r}, progress=False)"
    driver = start_driver(code, project)
    wait_for(lambda: len(runs()) == 1 and runs()[0].status == "running", "a run")
    name = runs()[0].id
    wait_for(lambda: truth()[name]["pid"] != driver.pid, "a worker")
    assert index_module.stored(*_opened()) == {}
    driver.kill()
    driver.communicate()
    wait_for(lambda: runs()[0].status == "interrupted", "the end")
    assert [each.status for each in runs()] == ["interrupted"]
    assert index_module.stored(*_opened())[name][1]["status"] == "interrupted"
    assert driver.returncode == -signal.SIGKILL


def test_conditions_on_the_command_line(project: Path) -> None:
    for name, auc in (("a", 0.6), ("bb", 0.7), ("ccc", 0.8)):
        make(name, auc)
    done = command("runs", "--where", "params.depth > 1 and 0.65 <= metrics.auc", "--sort", "-auc", "--json")
    assert [each["id"] for each in json.loads(done.stdout)] == ["ccc", "bb"]
    done = command("runs", "--where", "depth > 1 and acu > 0.5")
    assert done.returncode == 2 and "Did you mean 'auc'?" in done.stderr and "(column 15)" in done.stderr
    done = command("runs", "--where", "__import__('os').mkdir('made')")
    assert done.returncode == 2 and not (project / "made").exists()


@pytest.mark.usefixtures("project")
def test_columns_on_the_command_line() -> None:
    for name, auc in (("a", 0.6), ("bb", 0.75), ("ccc", 0.8123)):
        make(name, auc, seconds=125.2, models=[f"delay:{name}"], data={"train": {"rows": 1000}})
    wanted = "id,auc,params.depth,lineage.commit,run.seconds,data.train.rows"
    done = command("runs", "--sort", "-auc", "--columns", wanted, "--limit", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()] == [
        wanted.split(","),
        ["ccc", "0.8123", "3", "0a1b", "2", "min", "5", "s", "1000"],
        ["bb", "0.7500", "2", "0a1b", "2", "min", "5", "s", "1000"],
    ]
    done = command("runs", "--columns", "started, models", "--limit", "1", "--json")
    assert json.loads(done.stdout) == [{"started": "2026-01-01T09:00:00+00:00", "models": ["delay:ccc"]}]
    assert runs(sort="auc").frame(["id", "auc"]).to_dict("list") == {
        "id": ["a", "bb", "ccc"],
        "auc": [0.6, 0.75, 0.8123],
    }
    done = command("runs", "--columns", "id,lineage.comit")
    assert done.returncode == 2 and "Did you mean 'lineage.commit'?" in done.stderr
    for wrong in (["--columns", ","], ["--limit", "0"], ["--limit", "many"]):
        assert command("runs", *wrong).returncode == 2
    assert command("runs", "--columns", "id,auc", "--where", "auc > 1").stdout == "id  auc\n"
    make("dddd", seconds=None, params={"columns": ["a"] * 1000})
    assert "columns=a,a,a,a,a,… (1000)" in command("runs").stdout


def test_compare_on_the_command_line(project: Path) -> None:
    cell = "from nbprod.experiment.recording import log_data, log_metrics\nimport pandas as pd\n"
    cell += "log_data('train', pd.DataFrame({'depth': [depth]}))\nlog_metrics(share=1 / depth)"
    notebook = write_notebook(project / "nbs" / "train.ipynb", "depth = 1", cell)
    first, second = (run(notebook, {"depth": depth}, progress=False) for depth in (1, 2))
    done = command("compare", first.id, second.id, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["runs"] == [first.id, second.id]
    names = [(each["kind"], each["name"], each["left"], each["right"]) for each in told["differences"]]
    assert names[:2] == [("params", "depth", 1, 2), ("metrics", "share", 1.0, 0.5)]
    assert [name[:2] for name in names[2:]] == [("data", "train.sha256")]
    assert command("compare", first.id, first.id).stdout == "Nothing differs.\n"
    assert command("compare", first.id, second.id).stdout.startswith("kind     name")
    done = command("compare", first.id, "2020")
    assert done.returncode == 2 and "is not in" in done.stderr


def test_compare_names_changed_code(project: Path) -> None:
    """A module of the project that changed is code, as the patch that holds the change is."""
    (project / "own.py").write_text("DEPTH = 1\n")
    notebook = write_notebook(project / "nbs" / "train.ipynb", "seed = 1", "from own import DEPTH")
    first = run(notebook, progress=False)
    (project / "own.py").write_text("DEPTH = 2\n")
    second = run(notebook, progress=False)
    found = json.loads(command("compare", first.id, second.id, "--json").stdout)["differences"]
    assert {"modules.own", "patch.sha256", "library_sha256"} == {each["name"] for each in found}
    assert {each["kind"] for each in found} == {"code"}


def test_show_tells_what_made_a_run(project: Path) -> None:
    cell = "from nbprod.experiment.recording import log_data\nimport pandas as pd\n"
    cell += "log_data('train', pd.DataFrame({'depth': [depth]}))\nraise ValueError('too deep')"
    write_notebook(project / "nbs" / "train.ipynb", "depth = 1", cell)
    assert command("run", "nbs/train.ipynb").returncode == 1
    told = command("show", runs()[0].id).stdout.splitlines()
    lines = {line[:10].strip(): line[10:] for line in told}
    assert lines["error"].startswith("cell ") and lines["error"].endswith("ValueError: too deep")
    assert lines["code"].startswith("commit ") and "changes.patch" in lines["code"]
    assert lines["data"].startswith("train: 1 rows, ") and lines["made with"].startswith("python 3.")


def test_misspelled_options_get_a_suggestion(project: Path) -> None:
    write_notebook(project / "nbs" / "train.ipynb", "learning_rate = 1")
    for words in (
        ["run", "nbs/train.ipynb", "--learning-rat", "2"],
        ["run", "nbs/train.ipynb", "--timeot=3"],
    ):
        done = command(*words)
        assert done.returncode == 2 and "Did you mean '--" in done.stderr
    assert "Did you mean '--columns'?" in command("runs", "--colums", "id").stderr and not runs()


def test_members_of_an_enum_are_named(project: Path) -> None:
    source = "from enum import Enum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\ncolor: Color = Color.RED"
    write_notebook(project / "nbs" / "train.ipynb", source)
    asked = [["run", "nbs/train.ipynb", "--help"], ["params", "nbs/train.ipynb"]]
    asked += [["run", "nbs/train.ipynb", "-p", "color=green"]]
    for done in (command(*words) for words in asked):
        assert "Color (RED, BLUE)" in done.stdout + done.stderr
