"""From a run to a released model: only what ended well is listed, whatever is killed and whenever."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from running import write_notebook

import nbprod
from nbprod.cli import main
from nbprod.errors import NotFoundError, ReleaseError
from nbprod.model.store import models
from nbprod.release.ledger import releases

TRAIN = """
import pandas as pd
from sklearn.linear_model import LinearRegression
import nbprod
inputs = pd.DataFrame({"distance": [400, 1000, 1600, 2475]})
model = LinearRegression().fit(inputs, [70.0 * scale, 150.0, 230.0, 345.0])
nbprod.log_metrics(scale=scale)
nbprod.log_model(model, name, inputs=inputs, labels=[70.0, 150.0, 230.0, 345.0])
"""


@pytest.fixture
def train(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training notebook in a project of its own, with a BentoML store of its own."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return write_notebook(project / "nbs" / "train.ipynb", "name = 'air_time'\nscale = 1.0", TRAIN)


def test_a_run_becomes_a_version_with_its_notebook(train: Path):
    run = nbprod.run(train, scale=1.5)
    model = nbprod.load_model("air_time:latest")
    assert (model.tag, model.run) == (run.model, run.id) == (f"air_time:{run.id}", run.id)
    assert model.notebook is not None
    assert json.loads(model.notebook.read_text())["metadata"]["nbprod"]["status"] == "succeeded"
    assert model.facts["params"]["scale"] == 1.5
    assert model.facts["metrics"] == {"scale": 1.5}
    assert not (run.folder / "model").exists()
    seen = subprocess.run(
        ["bentoml", "models", "list", "-o", "json"], capture_output=True, text=True, check=True
    )
    assert [each["tag"] for each in json.loads(seen.stdout)] == [run.model]


def test_a_run_that_fails_after_log_model_leaves_no_version(train: Path):
    broken = write_notebook(train.with_name("broken.ipynb"), "name = 'air_time'\nscale = 1.0", TRAIN, "1 / 0")
    assert main(["run", str(broken)]) == 1
    assert models() == []
    assert nbprod.runs()[0].models == []
    with pytest.raises(NotFoundError, match="no model 'air_time'"):
        nbprod.load_model("air_time:latest")


def test_the_same_name_cannot_be_logged_twice_in_a_run(train: Path, capsys: pytest.CaptureFixture[str]):
    twice = write_notebook(train.with_name("twice.ipynb"), "name = 'air_time'\nscale = 1.0", TRAIN, TRAIN)
    assert main(["run", str(twice)]) == 1
    assert "was logged already in this run" in capsys.readouterr().err
    assert models() == []


def test_a_model_that_is_killed_on_its_way_to_the_store_gets_there_later(train: Path):
    """Between the record that says succeeded and the version in the store, a process can be killed."""
    code = (
        "import os, signal, nbprod.model.artifact as artifact\n"
        "artifact.commit = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"import nbprod\nnbprod.run({str(train)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert models() == []
    run = nbprod.runs()[0]
    assert run.status == "succeeded"
    assert nbprod.promote(run.model, "production").model == run.model
    assert [model.tag for model in models()] == [run.model]


@pytest.mark.usefixtures("train")
def test_only_a_clean_run_is_promoted():
    by_hand = f"name, scale = 'air_time', 1.0\n{TRAIN}"
    subprocess.run([sys.executable, "-c", by_hand], check=True, capture_output=True)
    logged = nbprod.load_model("air_time:latest")
    assert logged.version.startswith("live-")
    with pytest.raises(ReleaseError, match="logged by hand in a live kernel"):
        nbprod.promote(logged.tag, "production")
    assert releases("air_time") == []


def test_a_version_whose_record_was_changed_is_refused(train: Path):
    model = nbprod.load_model(nbprod.run(train).model)
    assert model.notebook is not None
    notebook = json.loads(model.notebook.read_text())
    notebook["metadata"]["nbprod"]["status"] = "failed"
    model.notebook.write_text(json.dumps(notebook))
    with pytest.raises(ReleaseError, match="ended as failed"):
        nbprod.promote(model.tag, "production")


def test_kill_9_while_promoting_loses_no_release_and_keeps_no_half(train: Path):
    first, second = nbprod.run(train).model, nbprod.run(train, scale=2.0).model
    code = (
        "import sys, nbprod\n"
        "print('ready', flush=True)\n"
        f"tags, turn = {[first, second]!r}, 0\n"
        "while True:\n"
        "    turn = 1 - turn\n"
        "    print(nbprod.promote(tags[turn], 'production').model, flush=True)\n"
    )
    known = 0
    for delay in (0.0, 0.03, 0.2):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
            told = [line for line in process.stdout if line.endswith("\n")]
        entries = releases("air_time")
        assert len(entries) >= known + len(told)
        assert all(after.previous == before.model for before, after in pairwise(entries))
        assert nbprod.load_model("air_time@production").tag == entries[-1].model
        nbprod.promote(first, "production")
        known = len(releases("air_time"))


def test_two_people_promote_at_once(train: Path):
    tags = [nbprod.run(train).model, nbprod.run(train, scale=2.0).model]
    code = "import sys, nbprod\nfor turn in range(10): nbprod.promote(sys.argv[1 + turn % 2], 'production')"
    processes = [subprocess.Popen([sys.executable, "-c", code, *order]) for order in (tags, tags[::-1])]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    entries = releases("air_time")
    assert all(after.previous == before.model for before, after in pairwise(entries))


def test_commands_say_what_is_wrong(train: Path, capsys: pytest.CaptureFixture[str]):
    model = nbprod.run(train).model
    capsys.readouterr()
    for words, status, said in (
        (["promote", "air_tim:latest", "production"], 2, "Did you mean 'air_time'?"),
        (["promote", model, "latest"], 2, "is no alias"),
        (["rollback", "air_time", "production"], 2, "nothing to roll back"),
        (["build", "air_time@production"], 2, "has no alias 'production'"),
        (["show", "2019"], 2, "2019"),
        (["run", "nbs/none.ipynb"], 2, "none.ipynb"),
        (["run", "nbs/train.ipynb", "-p", "scal=2"], 2, "Did you mean 'scale'?"),
        (["run", "nbs/train.ipynb", "-p", "scale=banana"], 2, "scale"),
        (["monitor", "air_time"], 2, "20_report.ipynb"),
        (["lab"], 2, "No model is in production"),
    ):
        assert main(words) == status, words
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("nbprod: ")
        assert said in captured.err, captured.err


@pytest.mark.usefixtures("train")
def test_listings_in_json_have_the_keys_of_the_design(capsys: pytest.CaptureFixture[str]):
    def said(*words: str) -> object:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert set(said("params", "nbs/train.ipynb")[0]) >= {"name", "type", "default", "help"}
    run = said("run", "nbs/train.ipynb", "-p", "scale=2")
    keys = {"id", "status", "notebook", "path", "params", "metrics", "models", "started", "seconds"}
    assert set(run) >= keys
    assert run["params"]["scale"] == 2.0
    assert said("show", run["id"]) == run == said("runs", "--sort", "-scale")[0]
    release = said("promote", run["models"][0], "production", "--why", "first")[0]
    assert set(release) >= {"time", "alias", "model", "previous", "who", "why", "gates"}
    assert said("releases", "air_time") == [release]
    model = said("models")[0]
    assert set(model) >= {"tag", "name", "version", "created", "run", "aliases", "format", "compiled"}
    assert model["aliases"] == ["production"]
    swept = said("sweep", "nbs/train.ipynb", "-p", "scale=1,2")
    assert sorted(each["params"]["scale"] for each in swept["runs"]) == [1.0, 2.0]


def test_a_project_without_settings_is_one_clear_line(tmp_path: Path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NBPROD_")}
    done = subprocess.run(
        ["nbprod", "runs"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nbprod new PATH" in done.stderr
