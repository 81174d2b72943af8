"""What the cells of a run print, shown while they run: in order, to the right place, in bounded memory."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import start_driver, wait_for, write_notebook

from nbprod.cli import main
from nbprod.errors import CellError
from nbprod.experiment.execution import run
from nbprod.experiment.runs import runs
from nbprod.experiment.supervision import BACKLOG, Worker, close

# Prints, and goes on only when the reader says that it was seen.
ASKING = """
import time
from pathlib import Path
print("first")
while not Path("seen").exists():
    time.sleep(0.05)
print("second")
"""


def command(project: Path, *words: str) -> subprocess.Popen[str]:
    """A command of `nbprod` in the project, with pipes for what it prints."""
    code = f"import sys; from nbprod.cli import main; sys.argv[1:] = {list(words)!r}; sys.exit(main())"
    return start_driver(code, project)


@pytest.mark.parametrize("as_json", [False, True])
def test_it_is_shown_while_the_cell_runs(project: Path, as_json: bool) -> None:
    """The cell waits until its first line was read; with --json standard output stays one document."""
    write_notebook(project / "nbs" / "asks.ipynb", "months = 3", ASKING)
    nbprod = command(project, "run", "nbs/asks.ipynb", "--stream", *(["--json"] if as_json else []))
    stream = nbprod.stderr if as_json else nbprod.stdout
    assert stream.readline() == "first\n"
    (found,) = runs()
    assert found.status == "running"
    (project / "nbs" / "seen").touch()
    stdout, stderr = nbprod.communicate(timeout=60)
    assert nbprod.returncode == 0
    if as_json:
        assert json.loads(stdout)["id"] == found.id and stderr == "second\n"
    else:
        assert stdout.startswith(f"second\nid        {found.id}\n") and stderr == ""


def test_everything_in_order(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Streams, results, displays and the error, each where it belongs; without being asked, nothing."""
    cells = [
        "import sys\nfrom IPython.display import HTML, display",
        "print('half a ', end='', flush=True)\nmonths * 2",
        "display(HTML('<b>bold</b>'))\nprint('Zürich', flush=True)\nprint('careful', file=sys.stderr)",
        "def share(late):\n    return late / 0\n\nshare(1)",
    ]
    notebook = write_notebook(project / "nbs" / "mixed.ipynb", "months = 3", *cells)
    with pytest.raises(CellError):
        run(notebook, stream=True)
    out, err = capsys.readouterr()
    assert out == "half a \n6\n<IPython.core.display.HTML object>\nZürich\n"
    assert err.startswith("careful\n---") and err.endswith("ZeroDivisionError: division by zero\n")
    assert "\x1b" not in err
    page = io.StringIO()
    with pytest.raises(CellError):
        run(notebook, stream=page)
    assert capsys.readouterr() == ("", "")
    assert page.getvalue() == out + err
    with pytest.raises(CellError):
        run(notebook)
    assert capsys.readouterr() == ("", "")


def test_beside_a_bar(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "months = 3", "print('epoch 1')")
    run(notebook, stream=True, progress=True)
    out, err = capsys.readouterr()
    assert out == "epoch 1\n" and "3/3" not in out and "2/2" in err


def test_in_jupyter(project: Path) -> None:
    """Below the cell that started the run, as outputs of that cell."""
    inner = "import sys\nprint('epoch 1')\nprint('careful', file=sys.stderr)"
    write_notebook(project / "nbs" / "inner.ipynb", "months = 3", inner)
    cell = "import nbprod\ndone = nbprod.run('nbs/inner.ipynb', stream=True)"
    outer = run(write_notebook(project / "nbs" / "outer.ipynb", "months = 3", cell))
    outputs = json.loads(outer.path.read_text())["cells"][-1]["outputs"]
    shown = {output["name"]: "".join(output["text"]) for output in outputs}
    assert shown == {"stdout": "epoch 1\n", "stderr": "careful\n"}


def test_what_a_terminal_cannot_show(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_notebook(project / "nbs" / "odd.ipynb", "months = 3", "print('Zürich \\U0001f389'); '\\ud800'")
    nbprod = command(project, "run", "nbs/odd.ipynb", "--stream")
    stdout, _ = nbprod.communicate(timeout=60)
    assert nbprod.returncode == 0 and stdout.startswith("Z\\xfcrich \\U0001f389\n'\\ud800'\n")


def test_a_reader_that_goes_away(project: Path) -> None:
    """The run goes on and is recorded, as it would be if nobody had looked."""
    write_notebook(project / "nbs" / "asks.ipynb", "months = 3", ASKING, "print('x' * 1_000_000)")
    nbprod = command(project, "run", "nbs/asks.ipynb", "--stream")
    assert nbprod.stdout.readline() == "first\n"
    nbprod.stdout.close()
    (project / "nbs" / "seen").touch()
    assert "Traceback" not in nbprod.stderr.read()
    nbprod.stderr.close()
    nbprod.wait(timeout=60)
    (found,) = runs()
    assert found.status == "succeeded" and "second" in found.path.read_text()


def test_every_attempt_is_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "from pathlib import Path\nagain = Path('tried').exists()\nPath('tried').touch()\n"
    cell += "print('again', again)\nassert again"
    notebook = write_notebook(project / "nbs" / "flaky.ipynb", "months = 3", cell)
    assert main(["run", str(notebook), "--stream", "--retries", "1"]) == 0
    assert capsys.readouterr().out.startswith("again False\nagain True\nid ")


def test_loud_cells_do_not_fill_memory(project: Path) -> None:
    """Nobody takes the events: only so many wait, and the worker with them; then closing does not hang."""
    line = json.dumps({"event": "output", "name": "stdout", "text": "x" * 65_536})
    loud = f"import sys\nfor _ in range(2_000): print({line!r})"

    def start(log: Path, _lock: int | None) -> subprocess.Popen[bytes]:
        with log.open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-c", loud], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )

    worker = Worker({}, project / "worker.log", None, start)
    wait_for(worker.events.full, "the events to wait")
    reading = Path(f"/proc/{worker.process.pid}/wchan")
    if reading.exists() and reading.read_text() not in ("", "0"):
        wait_for(lambda: "pipe" in reading.read_text(), "the worker to wait")
    assert worker.process.poll() is None and worker.events.qsize() == BACKLOG
    close(worker)
    assert worker.process.returncode is not None and not worker.reader.is_alive()


def test_a_hundred_megabytes(project: Path) -> None:
    """All of it is shown and recorded, and the process that shows it stays small meanwhile."""
    loud = "for _ in range(100): print('x' * 1_000_000)"
    write_notebook(project / "nbs" / "loud.ipynb", "months = 3", loud)
    code = """
import io, resource
from nbprod.experiment.execution import run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

class Page(io.StringIO):
    size = grown = 0

    def write(self, text):
        self.size += len(text)
        self.grown = peak() - before

page, before = Page(), peak()
finished = run("nbs/loud.ipynb", stream=page)
print(page.size, page.grown, finished.path.stat().st_size)
"""
    driver = start_driver(code, project)
    shown, megabytes, recorded = map(int, driver.communicate(timeout=120)[0].split())
    assert shown == 100_000_100 < recorded and megabytes < 50
