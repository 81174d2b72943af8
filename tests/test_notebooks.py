"""Every notebook runs from top to bottom, in a kernel of its own, and leaves the repository as it was."""

import asyncio
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
)
NOT_RUN = re.compile(r"^#\|\s*(notest\b|eval:\s*false\b)", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
NOT_WATCHED = {".git", ".venv", "demo", "__pycache__"}
NOT_WATCHED |= {".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file of the repository, runs and logs included, with its time of change and its size."""
    found: dict[Path, tuple[int, int]] = {}
    for path in folder.iterdir():
        if path.name in NOT_WATCHED:
            continue
        if path.is_dir() and not path.is_symlink():
            found |= files(path)
        else:
            facts = path.lstat()
            found[path] = (facts.st_mtime_ns, facts.st_size)
    return found


def execute(path: Path, home: Path) -> str | None:
    """Run the notebook at `path` without saving it; what the first cell that failed said, if one did.

    `home` is the kernel's store of BentoML.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not NOT_RUN.search(cell.source)]
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}})
    try:
        # A thread has no event loop of its own, and nbclient would leave one open.
        asyncio.run(client.async_execute(env=os.environ | {"BENTOML_HOME": str(home)}))
    except CellExecutionError as error:
        return COLOUR.sub("", str(error))
    return None


@pytest.fixture(scope="module")
def failures(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[str | None]]]:
    """By name, what the notebooks to be tested said, in the order of the tests.

    Two run at a time, or one beside other tests.
    """
    at_once = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(at_once) as pool:
        homes = [tmp_path_factory.mktemp("home") / "bentoml" for _ in names]
        running = {
            name: pool.submit(execute, ROOT / name, home) for name, home in zip(names, homes, strict=True)
        }
        yield running
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def untouched() -> dict[Path, tuple[int, int]]:
    """The files of the repository before the first notebook runs."""
    return files(ROOT)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(
    name: str, untouched: dict[Path, tuple[int, int]], failures: dict[str, Future[str | None]]
) -> None:
    failure = failures[name].result()
    if failure:
        pytest.fail(f"{name}: {failure}", pytrace=False)
    now = files(ROOT)
    changed = sorted(path for path in untouched.keys() | now.keys() if untouched.get(path) != now.get(path))
    assert not changed, f"{name}, or one that ran beside it, changed files of the repository"
