"""Files that are no notebooks, stores that cannot be written, disks that are full, and two sweeps at once."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import mounted, start_driver, write_notebook

from nbprod.cli import main
from nbprod.errors import CellError, ParameterError, RunError
from nbprod.experiment.execution import run
from nbprod.experiment.index import records
from nbprod.experiment.recording import NOTEBOOK_NAME, read_record
from nbprod.experiment.runs import runs
from nbprod.experiment.sweeps import sweep
from nbprod.settings import load_settings

CELL = {"cell_type": "code", "metadata": {}, "source": "1 + 1", "outputs": [], "execution_count": None}


def document(**changes: Any) -> bytes:
    """A notebook of one cell, with changes."""
    return json.dumps(
        {"cells": [CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 4} | changes
    ).encode()


NO_NOTEBOOKS = {
    "empty": b"",
    "a script": b"print(1)\n",
    "binary": b"\x89PNG\r\n\x1a\n\x00\xff",
    "half of one": document()[:60],
    "another JSON": b'{"accuracy": 0.7}',
    "a list": b"[1, 2]",
    "cells of text": document(cells=["1 + 1"]),
    "a source of numbers": document(cells=[CELL | {"source": [1]}]),
    "metadata of a cell": document(cells=[CELL | {"metadata": "x"}]),
    "metadata": document(metadata={"kernelspec": "python3"}),
    "an old format": document(nbformat=3, worksheets=[]),
    "an old format with cells": document(nbformat=3),
    "a format to come": document(nbformat=5),
    "no format": json.dumps({"cells": [CELL]}).encode(),
}


@pytest.mark.parametrize("name", NO_NOTEBOOKS)
def test_what_is_no_notebook(project: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """One line that names the file, exit status 2, and nothing was begun."""
    path = project / "nbs" / "odd.ipynb"
    path.write_bytes(NO_NOTEBOOKS[name])
    for words in (["run", str(path)], ["sweep", str(path)], ["run", str(path), "--retries", "2"]):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"nbprod: {path} is ") and err.count("\n") == 1
    assert not (project / ".nbprod").exists()


def test_what_is_no_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "nbs" / "folder.ipynb").mkdir()
    for name, said in (("folder.ipynb", "cannot be read: Is a directory"), ("fold.ipynb", "Did you mean")):
        assert main(["run", str(project / "nbs" / name)]) == 2
        assert said in capsys.readouterr().err
    assert not (project / ".nbprod").exists()


def test_without_a_parameters_cell(project: Path) -> None:
    """It can be executed as it is; values for it have no place to go."""
    path = project / "nbs" / "plain.ipynb"
    path.write_bytes(document())
    with pytest.raises(ParameterError, match="months"):
        run(path, months=3)
    assert not (project / ".nbprod").exists()
    assert run(path).params == {}
    path.write_bytes(document(cells=[]))
    assert run(path).status == "succeeded"


@pytest.mark.parametrize(
    "cell", ["for month in range(3)\n    pass", "print('é", "  x = 1\n y = 2", "a = \x00"]
)
def test_a_syntax_error_in_a_cell(project: Path, cell: str) -> None:
    """The run fails at that cell, and what was executed before it is kept."""
    notebook = write_notebook(project / "nbs" / "wrong.ipynb", "months = 3", "print('before')", cell)
    with pytest.raises(CellError, match="Error") as error:
        run(notebook)
    (found,) = runs()
    assert found.status == "failed" and found.path == error.value.path
    cells = json.loads(found.path.read_text())["cells"]
    assert "before" in json.dumps(cells[2]["outputs"] + cells[1]["outputs"])
    assert "".join(cells[error.value.cell - 1]["source"]) == cell


def fill(folder: Path) -> None:
    """Write to `folder` until nothing more fits."""
    with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 512):
            pass


def command(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from nbprod.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_a_disk_that_is_full_before(project: Path) -> None:
    """Nothing is begun and nothing is left; after room was made, everything works."""
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3")
    store = project / ".nbprod"
    with mounted(store, "size=512k"):
        fill(store)
        for words in (["run", str(notebook), "--retries", "2"], ["sweep", str(notebook), "-p", "months=1,2"]):
            done = command(*words)
            assert done.returncode == 1 and done.stdout == ""
            assert done.stderr.startswith(f"nbprod: The store cannot be written: {store}")
            assert "No space left on device. Make room" in done.stderr and done.stderr.count("\n") == 1
        assert [*store.glob("runs/*")] == []
        (store / "ballast").unlink()
        assert run(notebook).status == "succeeded" and len(runs()) == 1


def test_a_disk_that_fills_up_while_a_cell_runs(project: Path) -> None:
    """The run is recorded as far as there was room; it is not executed again, and the list still works."""
    loud = "import os\nprint(os.urandom(400_000).hex())"
    notebook = write_notebook(project / "nbs" / "loud.ipynb", "months = 3", "print('before')", *[loud] * 3)
    store = project / ".nbprod"
    with mounted(store, "size=2M"):
        done = command("run", str(notebook), "--retries", "2")
        assert done.returncode == 1 and done.stdout == ""
        assert "The store cannot be written" in done.stderr and "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        fill(store)
        (found,) = runs()
        assert found.status in {"failed", "interrupted"} and found.attempts == []
        json.loads(found.path.read_bytes())
        assert "before" in found.path.read_text() and not [*found.folder.glob(".*")]
        (store / "ballast").unlink()
        listed = command("runs", "--json")
        assert [each["id"] for each in json.loads(listed.stdout)] == [found.id]
        assert read_record(found.path)["status"] == found.status


def test_a_disk_that_is_full_for_the_index(project: Path) -> None:
    """The index is a cache: without it the list comes from the notebooks, and a line says so."""
    finished = run(write_notebook(project / "nbs" / "train.ipynb", "months = 3"))
    with mounted(project / "small", "size=4k"):
        fill(project / "small")
        (project / "settings.ini").write_text("[nbprod]\nindex = sqlite:///small/index.sqlite\n")
        done = command("runs", "--json")
    assert done.returncode == 0 and [each["id"] for each in json.loads(done.stdout)] == [finished.id]
    assert "cannot be used" in done.stderr and "Traceback" not in done.stderr


def test_a_store_that_can_only_be_read(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its runs can be listed and shown; another one is refused in one line."""
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3")
    store = project / ".nbprod"
    with mounted(store, "size=4M"):
        finished = run(notebook)
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        for words in (["run", str(notebook)], ["sweep", str(notebook), "-p", "months=1,2"]):
            assert main(words) == 1
            err = capsys.readouterr().err.splitlines()[-1]
            assert err.startswith(f"nbprod: The store cannot be written: {store}")
            assert "Read-only file system" in err
        assert main(["show", finished.id]) == 0 and main(["runs", "--json"]) == 0
        assert finished.id in capsys.readouterr().out
        with pytest.raises(RunError, match="Read-only"):
            sweep(notebook, {"months": [1, 2]}, jobs=2, progress=False)


def test_two_sweeps_at_once(project: Path) -> None:
    """Two processes sweep in one project while a third lists: no run is lost, mixed up or counted twice."""
    cell = "from nbprod.experiment.recording import log_metrics\nlog_metrics(double=2.0 * months)"
    write_notebook(project / "nbs" / "train.ipynb", "months = 3\nside = ''", cell)
    words = "['sweep', 'nbs/train.ipynb', '-p', 'months=1,2,3,4', '-p', 'side={}', '--jobs', '2', '--json']"
    code = f"import sys; from nbprod.cli import main; sys.exit(main({words}))"
    drivers = [start_driver(code.replace("{}", side), project) for side in ("left", "right")]
    while any(driver.poll() is None for driver in drivers):
        assert len(runs()) <= 8
    told = []
    for driver in drivers:
        stdout, stderr = driver.communicate(timeout=100)
        assert driver.returncode == 0, stderr
        told.append(json.loads(stdout))
    found = list(runs())
    assert len({each.id for each in found}) == len(found) == 8
    assert records(load_settings()) == {each.id: read_record(each.path) for each in found}
    for side, swept in zip(("left", "right"), told, strict=True):
        own = [each for each in found if each.sweep == swept["id"]]
        assert {each.id for each in own} == {each["id"] for each in swept["runs"]}
        assert sorted(each.params["months"] for each in own) == [1, 2, 3, 4]
        for each in own:
            assert each.params["side"] == side and each.metrics == {"double": 2.0 * each.params["months"]}
            assert each.status == "succeeded" and (each.folder / NOTEBOOK_NAME).is_file()
