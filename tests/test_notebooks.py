"""Every notebook runs from top to bottom, in a kernel of its own, and leaves the repository as it was."""

import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient.exceptions import CellExecutionError
from running import run_cells

NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
)
NOT_RUN = re.compile(r"^#\|\s*(notest\b|eval:\s*false\b)", re.MULTILINE)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
NOT_WATCHED = {".git", ".venv", "demo", "__pycache__"}
# What tests beside it write; build has their screenshots.
NOT_WATCHED |= {"build", ".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache"}


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


def execute(path: Path) -> str | None:
    """Run the notebook at `path` without saving it; what the first cell that failed said, if one did."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not NOT_RUN.search(cell.source)]
    try:
        run_cells(notebook, path.parent)
    except CellExecutionError as error:
        return COLOUR.sub("", str(error))
    return None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    before = files(ROOT)
    failure = execute(ROOT / name)
    if failure:
        pytest.fail(f"{name}: {failure}", pytrace=False)
    after = files(ROOT)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not changed, f"{name} changed files of the repository"
