"""The project that `nbprod new` makes: whole, at work, and nobody's files touched."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from running import run_cells

from nbprod import project
from nbprod.errors import NbprodError, UsageError
from nbprod.experiment.parameters import read_parameters
from nbprod.settings import load_settings


def git(folder: Path, *words: str) -> str:
    """The output of a git command in `folder`."""
    return subprocess.run(
        ["git", *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One project for the tests that only look at it."""
    return project.new(tmp_path_factory.mktemp("projects") / "late-flights")


@pytest.fixture
def unknown_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where git was never told who its user is."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("EMAIL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def test_it_is_a_project_with_everything_in_its_first_commit(made: Path):
    assert load_settings(made).library == "late_flights"
    tracked = set(git(made, "ls-files").splitlines())
    assert {
        "late_flights/features.py",
        "nbs/10_train.ipynb",
        "tests/test_features.py",
        ".gitignore",
    } <= tracked
    assert git(made, "status", "--porcelain") == ""
    assert git(made, "rev-list", "--count", "HEAD") == "1"
    assert not [name for name in tracked if "__project__" in (made / name).read_text() or "-tpl" in name]


def test_its_own_tests_pass(made: Path, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(made)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tmp_path / "own"),
    ]
    done = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert git(made, "status", "--porcelain") == ""


def test_its_tests_notice_a_library_that_was_not_exported(tmp_path: Path):
    folder = project.new(tmp_path / "flights")
    with (folder / "flights/features.py").open("a") as module:
        module.write("\nLATE_AFTER = 60\n")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_notebooks.py", "-k", "export"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "run nbdev-export" in done.stdout


def test_cleaning_its_notebooks_changes_nothing(tmp_path: Path):
    """nbdev-clean drops what it does not know, and once that was the tag of the parameters cell."""
    folder = project.new(tmp_path / "flights")
    (folder / "nbs/10_train.ipynb").touch()
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", clean], cwd=folder, check=True)
    assert git(folder, "status", "--porcelain") == ""
    assert next(parameter.name for parameter in read_parameters(folder / "nbs/10_train.ipynb")) == "months"


def test_its_setup_reads_its_settings(made: Path):
    command = [sys.executable, "setup.py", "--name", "--version", "--description"]
    done = subprocess.run(command, cwd=made, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:-1] == ["late_flights", "0.0.1"]


def test_its_training_notebook_runs_and_shows_figures(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("NBPROD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(made))
    notebook = nbformat.read(made / "nbs/10_train.ipynb", as_version=4)
    run_cells(notebook, made / "nbs")
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in each for each in data) == 3
    records = [each["application/vnd.nbprod.record+json"] for each in data if "vnd.nbprod" in str(each)]
    metrics = next(each["value"] for each in records if each["kind"] == "metrics")
    assert 0.65 < metrics["auc"] < 0.85 and metrics["log_loss"] < 0.45
    assert {each["kind"] for each in records} == {"data", "metrics", "model"}
    assert git(made, "status", "--porcelain") == ""


@pytest.mark.usefixtures("unknown_user")
def test_a_machine_without_a_git_user_gets_a_commit_of_a_neutral_one(tmp_path: Path):
    folder = project.new(tmp_path / "flights")
    assert git(folder, "log", "--format=%an <%ae>, %cn") == "nbprod <nbprod@localhost>, nbprod"
    assert "nbprod" not in (folder / ".git/config").read_text()


@pytest.mark.usefixtures("unknown_user")
def test_a_git_user_who_is_known_makes_the_commit(tmp_path: Path):
    (tmp_path / ".gitconfig").write_text(
        "[user]\n name = Ada\n email = ada@example.org\n[commit]\n gpgsign = true\n"
    )
    folder = project.new(tmp_path / "flights")
    assert git(folder, "log", "--format=%an <%ae>, %cn") == "Ada <ada@example.org>, Ada"


def test_a_new_project_inside_a_git_hook_commits_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet")
    with monkeypatch.context() as hook:
        hook.setenv("GIT_DIR", str(outer / ".git"))
        folder = project.new(outer / "flights")
    assert git(folder, "rev-list", "--count", "HEAD") == "1"
    assert git(outer, "rev-list", "--all", "--count") == "0"


def test_without_git_it_says_so_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="git is not installed"):
        project.new(tmp_path / "work" / "flights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["export_library", "_first_commit", "_move"])
@pytest.mark.parametrize(
    "error", [NbprodError("it failed"), KeyboardInterrupt()], ids=["failed", "interrupted"]
)
def test_a_step_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(project, step, fail)
    with pytest.raises(type(error)):
        project.new(tmp_path / "flights")
    assert list(tmp_path.iterdir()) == []


def test_the_current_empty_folder_can_become_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "flights"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert project.new(".") == folder
    assert Path("settings.ini").is_file() and git(Path(), "status", "--porcelain") == ""


@pytest.mark.parametrize("name", ["2013", "flüge", "import", "pandas", "json", "nbs"])
def test_a_name_that_will_not_do_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="Choose a"):
        project.new(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_will_not_do_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    note = tmp_path / "thesis" / "note.txt"
    note.write_text("mine")
    for place, words in (
        (note.parent, "is not empty"),
        (note, "is a file"),
        (note / "flights", "cannot be made"),
    ):
        with pytest.raises(UsageError, match=words):
            project.new(place)
    assert note.read_text() == "mine" and list(tmp_path.rglob("*")) == [note.parent, note]
