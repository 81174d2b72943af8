"""Runs that meet faults: killed processes, full disks, cells that do not end, kernels that die."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from running import ENDLESS, alive, start_driver, started_run, wait_for, write_notebook

from nbprod.errors import CellError, RunError
from nbprod.experiment.execution import execute, open_source, run
from nbprod.experiment.recording import NOTEBOOK_NAME, read_record
from nbprod.experiment.runs import Runs, load_run, runs
from nbprod.files import write_atomic
from nbprod.settings import load_settings

DRIVER = "from nbprod.experiment.execution import run; run('nbs/endless.ipynb', progress=False)"


def gone(*pids: int) -> bool:
    return not any(alive(pid) for pid in pids)


def texts(run_path: Path) -> str:
    """All that the executed notebook's cells put out, as JSON."""
    return json.dumps([cell.get("outputs") for cell in json.loads(run_path.read_text())["cells"]])


def test_killed_worker_is_an_interrupted_run(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "endless.ipynb", "months = 3", ENDLESS)
    killed: list[int] = []

    def kill() -> None:
        _, worker, kernel = started_run(project)
        assert worker != os.getpid()
        os.kill(worker, signal.SIGKILL)
        killed.extend([worker, kernel])

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunError, match="interrupted") as error:
        run(notebook, months=4, timeout=60)
    killer.join()
    wait_for(lambda: gone(*killed), "worker and kernel to go", 5)
    assert error.value.path is not None and error.value.exit_code == 1
    found = load_run(error.value.path.parent.name)
    assert found.status == "interrupted" and found.models == [] and found.params == {"months": 4}
    assert found.error is not None and found.error["cell"] == 3
    assert not (found.folder / "model").exists()


def test_killed_parent_takes_worker_and_kernel_along(project: Path) -> None:
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", ENDLESS)
    driver = start_driver(DRIVER, project)
    folder, worker, kernel = started_run(project)
    assert load_run(folder.name).status == "running"
    driver.kill()
    driver.communicate()
    wait_for(lambda: gone(worker, kernel), "worker and kernel to go", 5)
    wait_for(lambda: [found.status for found in runs()] == ["interrupted"], "the lock to go", 5)
    assert not (folder / "model").exists()
    assert read_record(folder / NOTEBOOK_NAME)["status"] == "interrupted"


def test_killed_parent_and_worker_leave_an_interrupted_run(project: Path) -> None:
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", ENDLESS)
    driver = start_driver(DRIVER, project)
    folder, worker, kernel = started_run(project)
    os.kill(driver.pid, signal.SIGSTOP)  # so that neither sees the other's end
    for pid in (worker, driver.pid):
        os.kill(pid, signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: [found.status for found in runs()] == ["interrupted"], "the worker to go", 5)
    assert not (folder / "model").exists()
    wait_for(lambda: gone(worker, kernel), "the kernel to notice", 10)


def test_killed_before_the_first_cell_is_on_the_list(project: Path) -> None:
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", ENDLESS)
    driver = start_driver(DRIVER, project)
    wait_for(lambda: list(project.glob(f".nbprod/runs/*/{NOTEBOOK_NAME}")), "the first record")
    driver.kill()
    driver.communicate()
    wait_for(lambda: [found.status for found in runs()] == ["interrupted"], "the worker to go", 10)


def test_interrupt_saves_what_was_executed(project: Path) -> None:
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", ENDLESS)
    driver = start_driver(DRIVER, project)
    folder, worker, kernel = started_run(project)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=30)
    assert driver.returncode == -signal.SIGINT and "KeyboardInterrupt" in stderr
    assert gone(worker, kernel)
    found = load_run(folder.name)
    assert found.status == "cancelled" and not (folder / "model").exists()
    assert "so far" in texts(found.path) and "KeyboardInterrupt" in texts(found.path)
    assert found.error == {"cell": 4, "line": "", "error": "It was stopped by its user."}


def test_timeout(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "slow.ipynb", "months = 3", "while True: pass")
    with pytest.raises(RunError, match="took longer than 4 s") as error:
        run(notebook, timeout=4)
    assert not isinstance(error.value, CellError)
    assert [found.status for found in runs()] == ["failed"]


READY = "import time\nfrom pathlib import Path\nPath('ready').touch()\n"
STUBBORN = READY + "while True:\n    try:\n        time.sleep(9)\n    except KeyboardInterrupt: pass"
POLITE = READY + "try:\n    time.sleep(99)\nexcept KeyboardInterrupt:\n    print('early end')"


@pytest.mark.parametrize(("cell", "kept"), [(STUBBORN, ""), (POLITE, "early end")])
def test_stopped_while_a_cell_handles_the_interrupt(project: Path, cell: str, kept: str) -> None:
    """One cell will not end and its kernel is killed; the other ends, and the next does not start."""
    source = open_source(write_notebook(project / "nbs" / "slow.ipynb", "months = 3", cell, "print('never')"))
    stopped = threading.Event()
    stopped.is_set = (project / "nbs" / "ready").exists  # type: ignore[method-assign]
    found = execute(source, {}, cancelled=stopped)
    assert found.status == "cancelled" and found.error["cell"] == (2 if cell is STUBBORN else 3)
    assert kept in texts(found.path) and "never" not in texts(found.path)


def test_dead_kernel(project: Path) -> None:
    notebook = write_notebook(
        project / "nbs" / "dies.ipynb",
        "months = 3",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    )
    with pytest.raises(RunError, match=r"failed in cell 2\. The kernel died"):
        run(notebook)
    assert [found.status for found in runs()] == ["failed"]


def test_unknown_kernel(project: Path) -> None:
    kernel = {"name": "julia-1.10", "language": "julia", "display_name": "Julia"}
    notebook = write_notebook(project / "nbs" / "julia.ipynb", "months = 3", kernelspec=kernel)
    with pytest.raises(RunError, match=r"'julia-1\.10' is not installed \(installed: .*python3"):
        run(notebook)
    assert [found.status for found in runs()] == ["failed"]


def test_failed_run_leaves_no_staged_model(project: Path) -> None:
    stage = "import os, pathlib\n(pathlib.Path(os.environ['NBPROD_RUN']) / 'model').mkdir()\n1 / 0"
    notebook = write_notebook(project / "nbs" / "fails.ipynb", "months = 3", stage)
    with pytest.raises(CellError) as error:
        run(notebook)
    assert (error.value.cell, error.value.line) == (4, "1 / 0")
    assert not (error.value.path.parent / "model").exists()


@pytest.mark.parametrize("taken", [".nbprod", ".nbprod/runs"])
def test_unwritable_store_is_one_clear_line(project: Path, taken: str) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3")
    (project / taken).parent.mkdir(exist_ok=True)
    (project / taken).write_text("a file where a folder should be")
    with pytest.raises(RunError, match=r"The store cannot be written: .*another `store`") as error:
        run(notebook)
    assert "\n" not in str(error.value)


def test_disk_that_fills_up_while_a_cell_runs(project: Path) -> None:
    """The limit of a file's size stands in for a full disk: the notebook can no longer be saved."""
    write_notebook(project / "nbs" / "big.ipynb", "months = 3", "print('x' * 1_000_000)")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
    driver = start_driver(limit + DRIVER.replace("endless", "big"), project)
    _, stderr = driver.communicate(timeout=60)
    assert "RunError" in stderr and "File too large" in stderr
    (found,) = runs()
    assert found.status == "failed" and "File too large" in found.error["error"]


def test_notebook_on_disk_is_whole_at_every_moment(project: Path) -> None:
    loud = "print('x' * 2_000_000)"
    notebook = write_notebook(project / "nbs" / "loud.ipynb", "months = 3", *[loud] * 4)
    done, statuses = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            for path in project.glob(f".nbprod/runs/*/{NOTEBOOK_NAME}"):
                json.loads(path.read_bytes())
                statuses.append(read_record(path)["status"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(notebook)
    finally:
        done.set()
        watcher.join()
    assert set(statuses) <= {"running", "succeeded"} and "running" in statuses


def test_kernel_surroundings(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, its imports, its drawing backend, its sockets; and no warning in the notebook."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (project / "small").mkdir()
    (project / "small" / "__init__.py").write_text("answer = 42")
    cell = """
import json, os, small
from ipykernel.connect import get_connection_info
transport = json.loads(get_connection_info())["transport"]
print(os.path.basename(os.getcwd()), small.answer, transport, os.environ.get("MPLBACKEND"))
"""
    finished = run(write_notebook(project / "nbs" / "where.ipynb", "months = 3", cell))
    assert "nbs 42 ipc module://matplotlib_inline" in texts(finished.path)
    assert '"stderr"' not in texts(finished.path)
    assert sorted(child.name for child in finished.folder.iterdir()) == ["changes.patch", NOTEBOOK_NAME]
    assert len(finished.lineage["commit"]) == 40 and finished.lineage["dirty"] is True


def test_inside_a_kernel(project: Path) -> None:
    """nbprod.run in a cell: the inner run has a folder of its own, and shows its progress in the notebook."""
    write_notebook(
        project / "nbs" / "inner.ipynb", "months = 3", "import os\nprint(os.environ['NBPROD_RUN'])"
    )
    outer = write_notebook(
        project / "nbs" / "outer.ipynb",
        "months = 3",
        "from nbprod.experiment.execution import run\ninner = run('nbs/inner.ipynb', months=5)\ninner",
    )
    finished = run(outer)
    inner = next(found for found in runs() if found.id != finished.id)
    assert inner.status == "succeeded" and inner.params == {"months": 5}
    assert inner.id in texts(inner.path) and finished.id not in texts(inner.path)
    assert inner.id in texts(finished.path) and "widget-view+json" in texts(finished.path)


def test_progress_on_a_terminal(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3", "months + 1")
    run(notebook, months=4, progress=True)
    assert "train.ipynb: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown


def test_odd_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """papermill takes braces in a path for names of parameters, and sockets want short paths."""
    folder = tmp_path / "my {projects} and 100% ünïcode" / ("deep" * 30)
    (folder / "nbs").mkdir(parents=True)
    (folder / "settings.ini").write_text("[nbprod]\n")
    monkeypatch.chdir(folder)
    finished = run(write_notebook(folder / "nbs" / "{a}.ipynb", "months = 3", "months"), months=4)
    assert finished.status == "succeeded" and finished.notebook == "nbs/{a}.ipynb"


def test_an_executed_notebook_can_be_executed_again(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3", "print(months)")
    first = run(notebook, months=4)
    again = run(first.path)
    assert again.params == {"months": 3} and '"3\\n"' in texts(again.path)


def test_foreign_files_do_not_break_the_list(project: Path) -> None:
    finished = run(write_notebook(project / "nbs" / "train.ipynb", "months = 3"))
    settings = load_settings()
    whole = finished.path.read_bytes()
    for name, content in {"torn": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (settings.runs / name).mkdir()
        write_atomic(settings.runs / name / NOTEBOOK_NAME, content)
    (settings.runs / "folder" / NOTEBOOK_NAME).mkdir(parents=True)
    found = runs()
    assert isinstance(found, Runs) and [each.id for each in found] == [finished.id]
