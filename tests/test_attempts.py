"""Runs that are executed again: what an attempt leaves, what is not retried, who is killed in between."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from running import ENDLESS, alive, start_driver, started_run, wait_for, write_notebook

from nbprod.cli import main
from nbprod.errors import CellError, RunError
from nbprod.experiment.execution import LOG_NAME, execute, kernels_for, open_source, run
from nbprod.experiment.index import records
from nbprod.experiment.recording import METADATA_KEY, NOTEBOOK_NAME, read_record
from nbprod.experiment.runs import Run, load_run, runs
from nbprod.model.reproduce import reproduce
from nbprod.settings import load_settings

# A cell that counts the attempts in a file of the project and stages half a model.
COUNT = """
import os, signal, time
from pathlib import Path
count = len(list(Path().glob("attempt-*"))) + 1
Path(f"attempt-{count}").touch()
folder = Path(os.environ["NBPROD_RUN"])
(folder / "model").mkdir()
(folder / "mine").write_text(str(count))
print("attempt", count, flush=True)
"""


# The process that executes the run says its number in the record; a forked kernel is no child of it.
KILL_WORKER = "import json; run = open(os.environ['NBPROD_RUN'] + '/notebook.ipynb'); "
KILL_WORKER += "os.kill(json.load(run)['metadata']['nbprod']['pid'], signal.SIGKILL)"


def flaky(project: Path, ending: str, attempts: int = 1) -> Path:
    """A notebook whose first attempts end by the statement `ending`, and whose next one succeeds."""
    cell = f"if count <= {attempts}:\n    {ending}"
    return write_notebook(project / "nbs" / "flaky.ipynb", "months = 3", COUNT, cell, "months")


def executed(project: Path) -> int:
    """How many attempts there were."""
    return len(list((project / "nbs").glob("attempt-*")))


def files_of(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_each_attempt_is_kept(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two failures and a success are one run in the list and the index, with its earlier attempts."""
    finished = run(flaky(project, "1 / 0", attempts=2), months=4, retries=3)
    assert finished.status == "succeeded" and executed(project) == 3 and finished.params == {"months": 4}
    assert [attempt["status"] for attempt in finished.attempts] == ["failed", "failed"]
    for attempt in finished.attempts:
        assert attempt["error"]["line"] == "1 / 0" and attempt["seconds"] > 0
        assert attempt["error"]["error"] == "ZeroDivisionError: division by zero"
    times = [attempt["started"] for attempt in finished.attempts] + [finished.started.isoformat()]
    assert times == sorted(set(times))
    assert files_of(finished.folder / "attempts") == ["1", "2"]
    for number in (1, 2):
        kept = finished.folder / "attempts" / str(number)
        # Jupyter interrupts a kernel before it ends it, and the kernel may say so in the log.
        assert {*files_of(kept)} - {LOG_NAME} == {"changes.patch", "mine", NOTEBOOK_NAME}
        assert (kept / "mine").read_text() == str(number)
        record = read_record(kept / NOTEBOOK_NAME)
        assert record["run"] == finished.id and record["status"] == "failed"
        assert len(record["attempts"]) == number - 1
    assert [found.id for found in runs()] == [finished.id] == list(records(load_settings()))
    assert load_run(finished.id).attempts == finished.attempts
    assert caplog.text.count("and is executed again. ZeroDivisionError: division by zero") == 2


def test_attempts_on_the_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = flaky(project, "raise OSError('the database\\nwas away')")
    assert main(["run", str(notebook), "--retries", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "succeeded" and [each["status"] for each in told["attempts"]] == ["failed"]
    assert main(["show", told["id"]]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^attempt 1 failed after [\d.]+ s: OSError: the database$", shown, re.MULTILINE)
    assert main(["run", str(notebook), "--retries", "-1"]) == 2
    assert "retries must be a whole number of at least 0" in capsys.readouterr().err


def test_the_last_attempt_is_the_error(project: Path) -> None:
    with pytest.raises(CellError, match="attempt 2") as error:
        run(flaky(project, "raise ValueError(f'attempt {count}')", attempts=9), retries=1)
    found = load_run(error.value.path.parent.name)
    assert found.status == "failed" and executed(project) == 2
    assert [attempt["error"]["error"] for attempt in found.attempts] == ["ValueError: attempt 1"]
    assert not list(project.glob(".nbprod/**/model"))


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "The kernel died"),
        (f"{KILL_WORKER}; time.sleep(600)", "interrupted", "was killed. (SIGKILL)"),
        ("time.sleep(600)", "failed", "took longer than 15 s"),
    ],
)
def test_what_is_killed_or_too_slow_is_retried(project: Path, ending: str, status: str, said: str) -> None:
    """The timeout is one for each attempt."""
    finished = run(flaky(project, ending), retries=1, timeout=15)
    assert finished.status == "succeeded" and executed(project) == 2
    (attempt,) = finished.attempts
    assert attempt["status"] == status and said in attempt["error"]["error"]
    assert read_record(finished.folder / "attempts" / "1" / NOTEBOOK_NAME)["status"] == status


def test_warm_attempts(project: Path) -> None:
    """Where kernels are forked, each attempt has a fresh one."""
    source = open_source(flaky(project, "os.kill(os.getpid(), signal.SIGKILL)"))
    with kernels_for(source, {}) as warm:
        finished = execute(source, {}, retries=1, warm=warm)
    assert finished.status == "succeeded" and len(finished.attempts) == 1
    for folder in (finished.folder, finished.folder / "attempts" / "1"):
        notebook = json.loads((folder / NOTEBOOK_NAME).read_text())
        assert notebook["metadata"][METADATA_KEY]["kernel"]["warm"]


def test_a_retried_run_is_reproduced(project: Path) -> None:
    finished = run(flaky(project, "1 / 0"), months=5, retries=1)
    again = reproduce(finished.id, progress=False)
    assert again.matched and again.run.params == {"months": 5} and again.run.attempts == []


def test_unknown_kernel_is_not_retried(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel = {"name": "julia-1.10", "language": "julia", "display_name": "Julia"}
    notebook = write_notebook(project / "nbs" / "julia.ipynb", "months = 3", kernelspec=kernel)
    with pytest.raises(RunError, match="is not installed") as error:
        run(notebook, retries=2)
    assert files_of(error.value.path.parent) == ["changes.patch", NOTEBOOK_NAME, "worker.log"]
    assert runs()[0].attempts == [] and caplog.text == ""


def test_a_store_that_cannot_be_written_is_not_retried(project: Path) -> None:
    """A limit of a file's size stops the saving; `tests/test_faults.py` has a disk that is really full."""
    write_notebook(project / "nbs" / "big.ipynb", "months = 3", COUNT, "print('x' * 1_000_000)")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    code += "from nbprod.experiment.execution import run; run('nbs/big.ipynb', retries=2, progress=False)"
    driver = start_driver(code, project)
    _, stderr = driver.communicate(timeout=60)
    assert "The store cannot be written" in stderr and "File too large" in stderr
    (found,) = runs()
    assert found.status == "failed" and found.attempts == [] and executed(project) == 1


def retried_run(project: Path) -> tuple[Path, int, int]:
    """Wait for the endless cell of a second attempt: the run's folder, its worker and its kernel."""
    wait_for(lambda: [*project.glob(".nbprod/runs/*/attempts/1")], "the first attempt to be kept")
    return started_run(project)


@pytest.mark.parametrize("attempt", [1, 2])
def test_ctrl_c_is_the_end_of_all_attempts(project: Path, attempt: int) -> None:
    """It interrupts the cell, saves what was executed and marks the run; nothing is executed after it."""
    fails = f"assert count >= {attempt}, 'not yet'"
    count = "from pathlib import Path\ncount = len(list(Path().glob('attempt-*'))) + 1\n"
    count += "Path(f'attempt-{count}').touch()\n"
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", count + fails, ENDLESS)
    code = "from nbprod.experiment.execution import run\n"
    code += "run('nbs/endless.ipynb', retries=3, progress=False)"
    driver = start_driver(code, project)
    folder, worker, kernel = started_run(project) if attempt == 1 else retried_run(project)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=40)
    assert driver.returncode == -signal.SIGINT and "KeyboardInterrupt" in stderr
    assert not alive(worker) and not alive(kernel) and executed(project) == attempt
    found = load_run(folder.name)
    assert found.status == "cancelled" and len(found.attempts) == attempt - 1
    assert "so far" in found.path.read_text() and not (folder / "model").exists()


# The moments between two attempts: the name that is used next, at which use, and how the run then stands.
BETWEEN: dict[str, Any] = {
    "before the attempt is kept": ("set_aside", 1, "failed", 0),
    "while it is kept": ("shutil.copy2", 2, "failed", 0),
    "before the next one has its record": ("first_record", 2, "failed", 0),
    "before the next one has its worker": ("Worker", 2, "interrupted", 1),
}


@pytest.mark.parametrize("moment", BETWEEN)
def test_driver_killed_between_attempts(project: Path, moment: str) -> None:
    name, use, status, kept = BETWEEN[moment]
    flaky(project, "1 / 0", attempts=9)
    driver = start_driver(
        f"""
import os, signal
from nbprod.experiment import execution
known, uses = execution.{name}, []

def killed(*arguments, **options):
    uses.append(1)
    if len(uses) == {use}:
        os.kill(os.getpid(), signal.SIGKILL)
    return known(*arguments, **options)

execution.{name} = killed
execution.run("nbs/flaky.ipynb", retries=3, progress=False)
""",
        project,
    )
    driver.communicate(timeout=60)
    assert driver.returncode == -signal.SIGKILL and executed(project) == 1

    def listed() -> list[Run]:
        found = list(runs())
        return found if [each.status for each in found] == [status] else []

    (found,) = wait_for(listed, f"the run as {status}", 10)
    assert len(found.attempts) == kept and found.error is not None
    whole = json.loads(found.path.read_text())["cells"]
    assert status == "interrupted" or "ZeroDivisionError" in json.dumps(whole)
    if kept:
        assert read_record(found.folder / "attempts" / "1" / NOTEBOOK_NAME)["status"] == "failed"


def test_driver_killed_in_a_later_attempt(project: Path) -> None:
    count = "from pathlib import Path\nfirst = not Path('attempt-1').exists()\nPath('attempt-1').touch()\n"
    write_notebook(project / "nbs" / "endless.ipynb", "months = 3", count + "assert not first", ENDLESS)
    code = "from nbprod.experiment.execution import run\n"
    code += "run('nbs/endless.ipynb', retries=1, progress=False)"
    driver = start_driver(code, project)
    folder, worker, kernel = retried_run(project)
    assert load_run(folder.name).status == "running" and len(load_run(folder.name).attempts) == 1
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: [found.status for found in runs()] == ["interrupted"], "the lock to go", 10)
    wait_for(lambda: not alive(worker) and not alive(kernel), "worker and kernel to go", 10)
    assert len(load_run(folder.name).attempts) == 1 and not list(project.glob(".nbprod/**/model"))
