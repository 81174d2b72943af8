"""Models that a team shares by a folder: pushed, pulled, listed, interrupted, damaged and repaired."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modelling import Machine, make_machine
from running import mounted, start_driver
from s3fs import S3FileSystem

import nbprod
from nbprod import remote as remote_module
from nbprod.cli import main
from nbprod.errors import ModelError, NotFoundError, StoreError
from nbprod.model.sharing import MANIFEST, hashes_of
from nbprod.model.store import models
from nbprod.release.exchange import fetch, pull, push
from nbprod.release.ledger import load_model, promote, resolve

TRAIN = """
import pandas as pd
from sklearn.linear_model import LinearRegression
import nbprod
inputs = pd.DataFrame({"distance": [400, 1000, 1600, 2475]})
minutes = [70.0, 150.0, 230.0, 345.0]
nbprod.log_data("train", inputs)
nbprod.log_metrics(rows=len(inputs))
nbprod.log_model(LinearRegression().fit(inputs, minutes), "air_time", inputs, minutes)
"""
FILES = ["facts.json", "contract.json", "library/features.py", "pipeline.skops"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """A function that makes a machine of that name, with its store at an address, and enters it."""

    def make(name: str, store: str = ".nbprod") -> Machine:
        return make_machine(tmp_path / name, monkeypatch, store, "extra = 0", TRAIN)

    return make


def make_version(at: Machine, version: str = "1", **facts: object) -> str:
    """A version with the files of one and nothing to load in them; its tag."""
    folder = at.home / "models" / "delay" / version
    (folder / "library").mkdir(parents=True)
    about = {"created": "2026-11-22T09:03:12+00:00", "run": None, "library": None, "classes": None}
    about |= {"estimator": "LinearRegression"}
    contents = {name: os.urandom(3000) for name in FILES[2:]}
    contents |= {"facts.json": json.dumps(about | facts).encode(), "contract.json": b'{"columns": []}'}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return f"delay:{version}"


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """The folder that a team has mounted."""
    (tmp_path / "mount").mkdir()
    return tmp_path / "mount" / "team"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints that ends well."""
    capsys.readouterr()
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_model_is_the_same_on_another_machine(
    machine: Callable[..., Machine], team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ada, bob = machine("ada"), machine("bob")
    ada.enter()
    made = nbprod.run("nbs/train.ipynb", progress=False)
    told = json.loads(said(capsys, "push", "air_time:latest", "--to", str(team), "--json"))
    assert told["model"] == made.model and told["sent"] == told["bytes"] > 1000
    assert "it was there already" in said(capsys, "push", made.model, "--to", str(team))
    original = load_model(made.model)

    bob.enter()
    assert models() == []
    assert made.model in said(capsys, "pull", "air_time", "--from", str(team))
    assert json.loads(said(capsys, "pull", made.model, "--from", str(team), "--json"))["sent"] == 0
    (listed,) = json.loads(said(capsys, "models", "--json"))
    assert listed["tag"] == made.model and listed["here"] and listed["holdout"]["r2"] > 0.99
    model = load_model("air_time:latest")
    assert model.folder.is_relative_to(bob.home) and hashes_of(model.folder) == hashes_of(original.folder)
    assert model.facts == original.facts and model.facts["data"]["train"]["rows"] == 4
    assert model.predict(model.contract.frame([{"distance": 1000}]))[0] == pytest.approx(150, abs=2)
    release = promote(made.model, "production")
    assert [gate["passed"] for gate in release.gates] == [True] * len(release.gates)
    seen = subprocess.run(["bentoml", "models", "list", "-o", "json"], capture_output=True, check=True)
    assert [each["tag"] for each in json.loads(seen.stdout)] == [made.model]
    card = said(capsys, "show", "air_time@production")
    assert f"by run {made.id}" in card and "distance  int" in card and "curl" in card


def test_a_project_whose_store_is_a_folder_of_the_team(
    machine: Callable[..., Machine], team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ada, bob = machine("ada", str(team)), machine("bob", str(team))
    ada.enter()
    made = nbprod.run("nbs/train.ipynb", progress=False)
    promote(made.model, "production")
    bob.enter()
    assert models() == [], "a model was shared that nobody pushed"
    ada.enter()
    push("air_time@production")
    bob.enter()
    (row,) = json.loads(said(capsys, "models", "--json"))
    assert row["tag"] == made.model and row["aliases"] == ["production"] and not row["here"]
    assert "in the shared store" in said(capsys, "models")
    model = load_model("air_time@production")
    shown = model._repr_html_()
    assert "fetched when the model is first used" in shown and not model.folder.exists()
    assert model.predict(model.contract.frame([{"distance": 400}]))[0] == pytest.approx(70, abs=2)
    assert pull("air_time@production").tag == made.model
    with pytest.raises(NotFoundError, match="Did you mean 'production'"):
        pull("air_time@prodution")


def test_aliases_are_those_of_the_store_that_is_asked(machine: Callable[..., Machine], team: Path) -> None:
    ada = machine("ada")
    made = nbprod.run("nbs/train.ipynb", progress=False)
    promote(made.model, "production")
    push("air_time@production", str(team))
    with pytest.raises(NotFoundError, match="Nobody has promoted one there"):
        pull("air_time@production", str(team))
    machine("bob")
    push_store = ada.project / ".nbprod"
    with pytest.raises(NotFoundError, match="is not in"):
        pull("air_time@production", str(push_store))
    ada.enter()
    push(made.model)
    machine("eve")
    assert pull("air_time@production", str(push_store)).tag == made.model


KILLED_PUSH = """
import os, signal
from fsspec.implementations.local import LocalFileSystem
from nbprod.release.exchange import push
moved, move = [], LocalFileSystem.mv
def kill(self, *paths, **options):
    if len(moved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(paths)
    move(self, *paths, **options)
LocalFileSystem.mv = kill
push({tag!r}, {to!r})
"""


def test_a_push_that_is_killed_goes_on_where_it_was(machine: Callable[..., Machine], team: Path) -> None:
    ada = machine("ada")
    tag = make_version(ada)
    driver = start_driver(KILLED_PUSH.format(tag=tag, to=str(team)), ada.project)
    assert driver.communicate(timeout=60) is not None and driver.returncode == -signal.SIGKILL
    left = sorted(path for path in team.rglob("*") if path.is_file())
    assert [path.suffix == ".tmp" for path in left].count(True) == 1 and len(left) == 3
    before = {path: path.stat().st_ino for path in left if path.suffix != ".tmp"}
    machine("bob")
    with pytest.raises(NotFoundError, match="a push was interrupted"):
        pull(tag, str(team))
    with pytest.raises(NotFoundError, match=r"no model 'delay'"):
        pull("delay:latest", str(team))
    ada.enter()
    done = push(tag, str(team))
    assert 0 < done.sent < done.bytes
    assert {path: path.stat().st_ino for path in before} == before, "what was there was sent again"
    assert sorted(path.name for path in team.rglob("*") if path.is_file()) == sorted(
        [Path(name).name for name in FILES] + [MANIFEST]
    )
    machine("eve")
    assert hashes_of(pull(tag, str(team)).folder) == hashes_of(ada.home / "models" / "delay" / "1")


KILLED_PULL = """
import os, signal
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from nbprod.release.exchange import pull
copied, copy = [], LocalFileSystem.cp_file
def kill(self, source, target, **options):
    if len(copied) == 2:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    copied.append(source)
    copy(self, source, target, **options)
LocalFileSystem.cp_file = kill
pull({tag!r}, {source!r})
"""


def test_a_pull_that_is_killed_leaves_no_half(machine: Callable[..., Machine], team: Path) -> None:
    tag = make_version(machine("ada"))
    push(tag, str(team))
    bob = machine("bob")
    driver = start_driver(KILLED_PULL.format(tag=tag, source=str(team)), bob.project)
    assert driver.communicate(timeout=60) is not None and driver.returncode == -signal.SIGKILL
    assert models() == [] and not (bob.home / "models" / "delay" / "1").exists()
    done = fetch(tag, str(team))
    assert 0 < done.sent < done.bytes, "what was whole was fetched again"
    assert [model.tag for model in models()] == [tag] and not list((bob.home / "tmp").iterdir())


def test_many_push_and_pull_at_once(machine: Callable[..., Machine], team: Path) -> None:
    ada = machine("ada")
    tag = make_version(ada)
    for number in range(300):
        (ada.home / f"models/delay/1/library/part{number}.py").write_text("x")
    bob = machine("bob")
    for enter, verb in ((ada.enter, "push"), (bob.enter, "pull")):
        enter()
        code = f"from nbprod.release.exchange import {verb}; {verb}({tag!r}, {str(team)!r})"
        drivers = [start_driver(code, Path.cwd()) for _ in range(4)]
        for driver in drivers:
            _, errors = driver.communicate(timeout=120)
            assert (driver.returncode, errors) == (0, "")
    assert not list(team.rglob("*.tmp")) and not list((bob.home / "tmp").iterdir())
    assert hashes_of(bob.home / "models/delay/1") == hashes_of(ada.home / "models/delay/1")


def damage(place: Path, how: str) -> str:
    """Do something to a version in a store; the name of the file that must be told."""
    if how == "changed":
        content = (place / "pipeline.skops").read_bytes()
        (place / "pipeline.skops").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        (place / "library" / "features.py").unlink()
        return "library/features.py"
    elif how == "added":
        (place / "library" / "extra.py").write_text("import os")
        return "library/extra.py"
    elif how == "manifest":
        (place / MANIFEST).write_bytes((place / MANIFEST).read_bytes()[:40])
        return MANIFEST
    elif how == "outside":
        names = json.loads((place / MANIFEST).read_text()) | {"../../../outside.py": "0a1b"}
        (place / MANIFEST).write_text(json.dumps(names))
        return MANIFEST
    return "pipeline.skops"


@pytest.mark.parametrize("how", ["changed", "missing", "added", "manifest", "outside"])
def test_what_is_damaged_is_refused_by_name(machine: Callable[..., Machine], team: Path, how: str) -> None:
    ada, bob = machine("ada"), machine("bob")
    ada.enter()
    tag = make_version(ada)
    push(tag, str(team))
    name = damage(team / "models" / "delay" / "1", how)
    bob.enter()
    with pytest.raises(ModelError, match=f"is not what was published: {name}"):
        pull(tag, str(team))
    assert models() == [] and not [path for path in bob.home.rglob("*") if path.is_file()]
    if how == "added":
        return
    ada.enter()
    push(tag, str(team), force=True)
    bob.enter()
    assert pull(tag, str(team)).tag == tag


def test_one_tag_is_one_version(machine: Callable[..., Machine], team: Path) -> None:
    """Neither is replaced without being told to, here or there."""
    tag = make_version(machine("ada"))
    push(tag, str(team))
    bob = machine("bob")
    make_version(bob)
    with pytest.raises(ModelError, match=r"has another delay:1: .*pipeline.skops differ"):
        push(tag, str(team))
    with pytest.raises(ModelError, match=r"is not the one in .*pipeline.skops differ"):
        pull(tag, str(team))
    push(tag, str(team), force=True)
    assert pull(tag, str(team)).folder.is_relative_to(bob.home)


def test_what_others_write_into_the_store_harms_no_listing(
    machine: Callable[..., Machine], team: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tag = make_version(machine("ada"))
    push(tag, str(team))
    good = team / "models" / "delay" / "1"
    for name in ("2", "UPPER", "with space", "3"):
        shutil.copytree(good, team / "models" / "delay" / name)
    (team / "models" / "delay" / "2" / "facts.json").write_text("[]")
    (team / "models" / "delay" / "3" / MANIFEST).unlink()
    machine("bob", str(team))
    assert [model.tag for model in models()] == [tag]
    assert "delay:2" in caplog.text and "no readable facts.json" in caplog.text
    assert resolve("delay:latest").tag == tag


@pytest.mark.parametrize("full", ["home", "store"])
def test_a_disk_that_is_full(machine: Callable[..., Machine], team: Path, tmp_path: Path, full: str) -> None:
    ada = machine("ada")
    tag = make_version(ada)
    (ada.home / "models/delay/1/pipeline.skops").write_bytes(os.urandom(2_000_000))
    bob = machine("bob")
    small = bob.home if full == "home" else tmp_path / "small"
    with mounted(small, "size=1m"):
        if full == "home":
            ada.enter()
            push(tag, str(team))
            bob.enter()
            with pytest.raises(StoreError, match=r"no space left on the disk for .*bentoml"):
                pull(tag, str(team))
            assert not [path for path in bob.home.rglob("*") if path.is_file()]
        else:
            ada.enter()
            with pytest.raises(StoreError, match="small/team has no space left"):
                push(tag, str(small / "team"))
            assert not list(small.rglob("pipeline*")) and not list(small.rglob(MANIFEST))


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server that takes connections and never answers, asked for a moment only."""
    S3FileSystem.clear_instance_cache()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "tester")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setattr(remote_module, "PATIENCE", 0.3)
        yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("silent_server")
def test_a_store_that_hangs(machine: Callable[..., Machine], caplog: pytest.LogCaptureFixture) -> None:
    """What is here is used, with a warning; what is not here is an error that says why."""
    ada = machine("ada", "s3://team/flights")
    tag = make_version(ada)
    assert resolve(tag).tag == tag and caplog.text == ""
    assert resolve("delay:latest").tag == tag
    assert "the newest delay that is here is taken" in caplog.text and "has not answered" in caplog.text
    assert [model.tag for model in nbprod.models()] == [tag]
    assert "only the models that are here" in caplog.text
    assert "Columns (0)" in resolve(tag)._repr_html_()
    for missing in ("delay:2", "other", "delay@production"):
        with pytest.raises(StoreError, match=r"s3://team/flights has not answered for 0\.3 seconds"):
            resolve(missing)
    for transfer in (push, pull):
        with pytest.raises(StoreError, match="has not answered"):
            transfer(tag)


def test_what_is_not_there(
    machine: Callable[..., Machine], team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = make_version(machine("ada"))
    push(tag, str(team))
    for words, hint in (
        (["push", "dela:latest"], "Did you mean 'delay'?"),
        (["push", tag, "--to", "/mnt/not/mounted"], "is it mounted?"),
        (["pull", "delay:2", "--from", str(team)], "Did you mean 'delay:1'?"),
        (["pull", "dela", "--from", str(team)], "Did you mean 'delay'?"),
        (["pull", "../x:1", "--from", str(team)], "is not in"),
        (["pull", tag], "has no models"),
        (["pull", tag, "--from", "s4://team"], "fsspec knows no protocol"),
        (["show", "delay@production"], "has no alias"),
    ):
        capsys.readouterr()
        assert main(words) in (1, 2), words
        errors = capsys.readouterr().err
        assert hint in errors and errors.count("\n") == 1, errors


def test_a_pickle_is_seen_wherever_it_is_listed(
    machine: Callable[..., Machine], team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tag = make_version(machine("ada"), format="pickle")
    risk = f"nbprod: kept as a pickle: {tag}. Reading it can run any code"
    for words in (["models"], ["push", tag, "--to", str(team)]):
        capsys.readouterr()
        assert main(words) == 0
        assert risk in capsys.readouterr().err
    assert json.loads(said(capsys, "models", "--json"))[0]["format"] == "pickle"
    assert "pickle. Reading it" in said(capsys, "show", tag)
    assert "pickle" in repr(resolve(tag)) and "⚠ pickle" in nbprod.models()._repr_html_()
    machine("bob")
    capsys.readouterr()
    assert main(["pull", tag, "--from", str(team)]) == 0 and risk in capsys.readouterr().err


def test_a_long_transfer_is_watched(machine: Callable[..., Machine], team: Path) -> None:
    ada = machine("ada")
    tag = make_version(ada)
    code = f"from nbprod.release.exchange import push; push({tag!r}, {str(team)!r}, progress=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"push {tag}: 100%" in done.stderr
