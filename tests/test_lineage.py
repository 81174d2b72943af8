"""What a run was made from, and making it again: git, uncommitted changes, the library, chance, models."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from running import write_notebook

import nbprod
from nbprod.cli import main
from nbprod.errors import CellError, NotFoundError, RunError
from nbprod.experiment.changes import PATCH_NAME
from nbprod.model.reproduce import Reproduction
from nbprod.model.store import load

TRAIN = """
import pandas as pd
from sklearn.linear_model import LinearRegression
import nbprod
from small.rules import minutes
inputs = pd.DataFrame({"distance": [400.0, 1000.0, 1600.0, 2475.0]})
labels = minutes(inputs["distance"])
nbprod.log_data("train", inputs.assign(labels=labels))
nbprod.log_data("file", "../distances.csv")
model = LinearRegression().fit(inputs, labels)
nbprod.log_metrics(slope=float(model.coef_[0]), scale=scale)
nbprod.log_model(model, "air_time", inputs=inputs, labels=labels)
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def train(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a committed library and notebook, data that git ignores, and a store of its own."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (project / "small").mkdir()
    (project / "small" / "__init__.py").touch()
    (project / "small" / "rules.py").write_text("def minutes(distance):\n    return distance * 0.125 + 20\n")
    (project / ".gitignore").write_text(".nbprod/\n__pycache__/\n*.csv\n")
    (project / "distances.csv").write_text("400\n1000\n")
    (project / "requirements.lock").write_text("numpy==2.4.6\n")
    notebook = write_notebook(project / "nbs" / "train.ipynb", "scale = 1.0\nseed = 7", TRAIN)
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Train")
    return notebook


def differing(result: Reproduction) -> list[str]:
    return [check.name for check in result.checks if check.matched is False]


def found(result: Reproduction, name: str) -> str:
    return next(check.text for check in result.checks if check.name == name)


def test_the_record_says_what_made_the_run(train: Path, project: Path) -> None:
    run = nbprod.run(train, scale=2.0)
    made = run.lineage
    assert made["commit"] == git(project, "rev-parse", "HEAD").strip()
    assert made["dirty"] is False and made["patch"] is None and made["seed"] == 7
    assert sorted(made["modules"]) == ["small", "small.rules"] and len(made["library_sha256"]) == 64
    assert made["lock"]["file"] == "requirements.lock" and made["packages"]["papermill"]
    assert made["machine"]["cpus"] >= 1 and made["interpreter"]["implementation"] == "CPython"
    assert run.data["train"]["rows"] == 4 and run.data["file"]["bytes"] == 9
    assert len(run.cells) == 3 and all(cell["seconds"] >= 0 for cell in run.cells)


def test_a_run_is_reproduced_down_to_the_answers_of_its_model(train: Path) -> None:
    run = nbprod.run(train, scale=2.0)
    result = nbprod.reproduce(run.id)
    assert result.matched, str(result)
    assert result.run.params == {"scale": 2.0, "seed": 7} and result.run.lineage["reproduces"] == run.id
    names = {check.name for check in result.checks}
    assert {"data.train", "data.file", "metrics.slope", "predictions.air_time", "library", "lock"} < names
    assert found(result, "predictions.air_time") == "6 answers, equal"
    assert load(result.run.model).run == result.run.id != load(run.model).run == run.id
    assert nbprod.runs()[0].id == result.run.id


def test_a_changed_library_is_named_and_the_recorded_commit_is_equal(train: Path, project: Path) -> None:
    run = nbprod.run(train)
    rules = project / "small" / "rules.py"
    rules.write_text(rules.read_text().replace("0.125", "0.25"))
    changed = nbprod.reproduce(run.id)
    expected = {"patch", "library", "data.train", "metrics.slope", "predictions.air_time"}
    assert set(differing(changed)) == expected
    assert found(changed, "library") == "small.rules changed"
    assert found(changed, "metrics.slope") == "0.125 → 0.25, off by 0.12"
    git(project, "commit", "-q", "-a", "-m", "Twice as slow")
    assert set(differing(nbprod.reproduce(run.id))) == expected - {"patch"} | {"commit"}
    assert nbprod.reproduce(run.id, checkout=True).matched
    assert "0.25" in rules.read_text() and len(git(project, "worktree", "list").splitlines()) == 1


def test_uncommitted_changes_and_new_modules_come_back(train: Path, project: Path) -> None:
    """A changed file, a new module that git does not know, and an ignored one, all of them imported."""
    code = "from small.new import minutes\nfrom small.hidden import word\n"
    (project / "small" / "rules.py").write_text(code)
    (project / "small" / "new.py").write_text("def minutes(distance):\n    return distance * 0.5\n")
    (project / ".git" / "info" / "exclude").write_text("hidden.py\n")
    (project / "small" / "hidden.py").write_text("word = 'ä'\n")
    run = nbprod.run(train)
    patch = (run.folder / PATCH_NAME).read_text()
    assert all(text in patch for text in ("+from small.new", "+def minutes", "+word = 'ä'"))
    assert git(project, "status", "--porcelain").splitlines() == [" M small/rules.py", "?? small/new.py"]

    git(project, "checkout", "-q", "small/rules.py")
    (project / "small" / "new.py").unlink()
    (project / "small" / "hidden.py").unlink()
    assert {"patch", "library", "metrics.slope"} <= set(differing(nbprod.reproduce(run.id)))
    back = nbprod.reproduce(run.id, checkout=True)
    assert back.matched, str(back)
    assert found(back, "patch") == f"{run.lineage['patch']['bytes']} bytes"
    assert not (project / "small" / "new.py").exists()


def test_the_recorded_notebook_is_executed_and_not_todays(train: Path) -> None:
    run = nbprod.run(train)
    write_notebook(train, "scale = 1.0\nseed = 7", "1 / 0")
    result = nbprod.reproduce(run.id)
    assert set(differing(result)) == {"notebook", "patch"}
    assert "code cell 2 of train.ipynb changed" in found(result, "notebook")
    train.unlink()
    assert "no longer there" in found(nbprod.reproduce(run.id), "notebook")


def test_chance_without_a_seed_is_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "import random, nbprod\nnbprod.log_metrics(auc=random.Random(seed).random(), rows=3)"
    notebook = write_notebook(project / "nbs" / "chance.ipynb", "seed: int | None = None", cell)
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "Chance")
    run = nbprod.run(notebook)
    with pytest.raises(SystemExit) as end:
        main(["reproduce", run.id, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and told["matched"] is False and told["original"] == run.id
    assert [check["name"] for check in told["checks"] if check["matched"] is False] == ["metrics.auc"]
    seeded = nbprod.run(notebook, seed=1)
    assert main(["reproduce", seeded.id]) == 0
    assert f"{seeded.id} reproduced" in capsys.readouterr().out


def test_a_failed_run_fails_again(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "broken.ipynb", "a = 1", "1 / 0")
    with pytest.raises(CellError):
        nbprod.run(notebook)
    [run] = nbprod.runs()
    result = nbprod.reproduce(run.id)
    assert result.run.status == "failed" and "status" not in differing(result)
    write_notebook(notebook, "a = 1", "a")
    assert "status" not in differing(nbprod.reproduce(run.id)), "the recorded notebook still divides by zero"


def test_what_cannot_be_reproduced_is_said(train: Path, project: Path, capsys: pytest.CaptureFixture[str]):
    (project / "small" / "rules.py").write_text("def minutes(distance):\n    return distance\n")
    run = nbprod.run(train)
    (run.folder / PATCH_NAME).unlink()
    with pytest.raises(RunError, match="kept are gone"):
        nbprod.reproduce(run.id, checkout=True)
    with pytest.raises(NotFoundError):
        nbprod.reproduce("20200101")
    assert main(["reproduce", "20200101"]) == 2
    assert "20200101" in capsys.readouterr().err
    assert len(nbprod.runs()) == 1


@pytest.mark.usefixtures("train")
def test_from_inside_a_kernel(project: Path) -> None:
    """A notebook whose cells start a run, and log a model by hand: both know commit and changes."""
    (project / "small" / "rules.py").write_text("def minutes(distance):\n    return distance\n")
    live = TRAIN.replace("scale=scale", "scale=1")
    by_hand, inner_run = "import os\ndel os.environ['NBPROD_RUN']", "nbprod.run('nbs/train.ipynb')"
    nbprod.run(write_notebook(project / "nbs" / "outer.ipynb", by_hand, live, inner_run))
    inner = next(run for run in nbprod.runs() if run.notebook == "nbs/train.ipynb")
    [logged] = [model for model in nbprod.models("air_time") if model.run is None]
    commit = git(project, "rev-parse", "HEAD").strip()
    assert inner.lineage["commit"] == commit == logged.facts["lineage"]["commit"]
    assert "+    return distance\n" in (inner.folder / PATCH_NAME).read_text()
    assert "+    return distance\n" in (logged.folder / PATCH_NAME).read_text()
    assert list(logged.facts["lineage"]["modules"]) == ["small", "small.rules"]


@pytest.mark.usefixtures("train")
def test_a_hook_and_a_configuration_of_git_do_not_change_the_patch(project: Path) -> None:
    (project / "small" / "rules.py").write_text("def minutes(distance):\n    return distance\n")
    for name, value in {"diff.noprefix": "true", "diff.external": "false", "color.ui": "always"}.items():
        git(project, "config", name, value)
    code = "import nbprod; print(nbprod.run('nbs/train.ipynb', progress=False).id)"
    environ = os.environ | {"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index"}
    done = subprocess.run(
        ["python", "-c", code], cwd=project, env=environ, capture_output=True, text=True, check=True
    )
    result = nbprod.reproduce(done.stdout.strip(), checkout=True)
    assert result.matched, str(result)
