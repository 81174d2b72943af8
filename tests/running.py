"""What the tests of runs share: small notebooks, a driver process, and waiting for a condition."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from nbprod.experiment.provisioning import kernel_config
from nbprod.experiment.recording import METADATA_KEY, NOTEBOOK_NAME, read_record
from nbprod.settings import load_settings

# A cell that leaves its kernel's process number in a file and then never ends.
ENDLESS = """
import os, time
from pathlib import Path
folder = Path(os.environ["NBPROD_RUN"])
(folder / "model").mkdir()
(folder / "model" / "staged").write_text("half a model")
print("so far", flush=True)
(folder / "kernel").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


def run_cells(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells of `notebook` in `folder`; raises nbclient's errors.

    The kernel gets sockets in a folder: of ports, which are picked before they are used, others may take one.
    """
    place = {"metadata": {"path": str(folder)}}
    with tempfile.TemporaryDirectory(prefix="nbprod-", ignore_cleanup_errors=True) as scratch:
        NotebookClient(notebook, timeout=120, resources=place, config=kernel_config(scratch)).execute()


# Writes runs as the engine does.
MAKE = """
from nbprod.experiment.recording import METADATA_KEY, NOTEBOOK_NAME, write_notebook
from nbprod.experiment.runs import runs
from nbprod.settings import load_settings

def make(name, auc=0.7, **facts):
    path = load_settings().runs / name / NOTEBOOK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"run": name, "status": "succeeded", "notebook": "nbs/train.ipynb", "metrics": {"auc": auc}}
    record |= {"started": "2026-01-01T09:00:00+00:00", "params": {"depth": len(name)}}
    record |= {"lineage": {"commit": "0a1b", "packages": {f"package-{each}": "1.0" for each in range(50)}}}
    write_notebook(path, {"cells": [], "metadata": {METADATA_KEY: record | facts}})
"""
_space: dict[str, Any] = {}
exec(MAKE, _space)
make: Callable[..., None] = _space["make"]


def truth() -> dict[str, Any]:
    """The records of the project's runs as the notebooks have them."""
    folders = load_settings().runs.iterdir()
    return {folder.name: read_record(folder / NOTEBOOK_NAME) for folder in folders}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of `nbprod`, with its output."""
    code = "import sys; from nbprod.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def start_recording(project: Path, number: int, count: int = 10) -> subprocess.Popen[str]:
    """A process that makes `count` runs and lists the project's after each as a user does."""
    work = f"for each in range({count}):\n    name = f'worker{number:02}-{{each}}'\n    make(name)\n"
    return start_driver(f"{MAKE}{work}    assert name in {{run.id for run in runs()}}, name\n", project)


def record_and_list(project: Path) -> None:
    """16 processes, each of which records ten runs and lists all after each; they say nothing."""
    for worker in [start_recording(project, number) for number in range(16)]:
        output, errors = worker.communicate(timeout=200)
        assert (worker.returncode, output, errors) == (0, "", "")


def write_notebook(path: Path, *sources: str, **metadata: Any) -> Path:
    """A notebook of these code cells at `path`, the first of them tagged `parameters`."""
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for source in sources
    ]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def start_driver(code: str, folder: Path) -> subprocess.Popen[str]:
    """A Python process in `folder` that executes `code`, as a script or a scheduler would."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """The first true value of `condition`; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def started_run(project: Path) -> tuple[Path, int, int]:
    """Wait until a run executes the endless cell, its last, and its notebook says so.

    The folder of the run, and the process ids of worker and kernel.
    """

    def find() -> tuple[Path, int, int] | None:
        for marker in project.glob(".nbprod/runs/*/kernel"):
            notebook = json.loads((marker.parent / NOTEBOOK_NAME).read_bytes())
            if is_running(notebook["cells"][-1]) and marker.read_text():
                pid = notebook["metadata"][METADATA_KEY]["pid"]
                return marker.parent, pid, int(marker.read_text())
        return None

    return wait_for(find, "a run in its endless cell, and the notebook to say so")


def is_running(cell: dict[str, Any]) -> bool:
    """Whether papermill has marked a cell as the one that is executed."""
    return cell["metadata"].get("papermill", {}).get("status") == "running"


def alive(pid: int) -> bool:
    """Whether a process of that id lives; a zombie that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A small file system of its own on `folder`; skips where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no program `mount`")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {os.fsdecode(done.stderr).strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
