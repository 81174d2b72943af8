"""A store that is shared: runs, models and releases in S3, spoken to by two machines, with its faults."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from modelling import Machine, make_machine
from moto.server import ThreadedMotoServer
from running import start_driver, wait_for, write_notebook
from s3fs import S3FileSystem

from nbprod import join_rooms
from nbprod.errors import CellError, ModelError, NbprodError, RunError, SettingsError, StoreError
from nbprod.experiment import index as index_module
from nbprod.experiment import sharing
from nbprod.experiment.execution import run
from nbprod.experiment.index import rebuild, records
from nbprod.experiment.recording import NOTEBOOK_NAME
from nbprod.experiment.runs import Run, load_run, runs
from nbprod.experiment.sharing import publish_missing, shared_signatures
from nbprod.experiment.sweeps import sweep
from nbprod.model.reproduce import reproduce
from nbprod.model.sharing import shared_tags
from nbprod.model.store import models
from nbprod.release import journal
from nbprod.release.exchange import pull, push
from nbprod.release.journal import Release, write_entry
from nbprod.release.ledger import load_model, promote, releases, rollback
from nbprod.remote import Remote, create_file, list_files, list_sizes, open_filesystem, read_files
from nbprod.settings import load_settings

SECRET = "never-to-be-written-down"
TRAIN = """import pandas as pd
from sklearn.linear_model import LinearRegression
import nbprod
inputs = pd.DataFrame({"distance": [400, 1000, 1600, 2475]})
model = LinearRegression().fit(inputs, [70.0, 150.0, 230.0, 345.0 + extra])
nbprod.log_metrics(slope=model.coef_[0])
nbprod.log_model(model, "air_time", inputs)"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """An S3 server on this machine with the bucket `team`, and the credentials for it; call it to end it."""
    S3FileSystem.clear_instance_cache()  # which know the server of the test before
    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="team")
    for each in client.list_objects_v2(Bucket="team").get(
        "Contents", []
    ):  # of the test before, in this process
        client.delete_object(Bucket="team", Key=each["Key"])
    ended: list[bool] = []

    def end() -> None:
        if not ended:
            served.stop()
            ended.append(True)

    try:
        yield end
    finally:
        client.close()
        end()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """A function that makes a machine of that name, whose project has its store at a URL, and enters it."""
    join_rooms()

    def make(name: str, store: str = "s3://team/flights") -> Machine:
        return make_machine(tmp_path / name, monkeypatch, store, "extra: float = 0.0", TRAIN)

    return make


@pytest.mark.usefixtures("server")
def test_two_machines_share_everything(machine: Callable[..., Machine], tmp_path: Path) -> None:
    ada, bob = machine("ada"), machine("bob")
    ada.enter()
    made = run("nbs/train.ipynb", extra=1.0)
    assert made.folder.is_relative_to(ada.project) and load_model("air_time:latest").run == made.id

    bob.enter()
    (listed,) = runs()
    assert (listed.id, listed.params, listed.models) == (made.id, made.params, made.models)
    assert not listed.path.exists(), "a listing fetched a run"
    found = load_run(made.id[:12])
    assert found.path.is_relative_to(bob.project) and found.path.read_bytes() == made.path.read_bytes()
    assert [model.tag for model in models()] == made.models
    model = load_model("air_time:latest")
    assert model.facts["run"] == made.id and not model.folder.exists(), "a listing fetched a model"
    assert model.predict(model.contract.frame([{"distance": 1000}]))[0] == pytest.approx(150, abs=2)
    assert model.folder.is_relative_to(bob.project.parent)
    assert reproduce(made.id).matched
    promote(made.models[0], "production", "from bob")

    ada.enter()
    assert len(runs()) == 2
    assert load_model("air_time@production").tag == made.models[0]
    run("nbs/train.ipynb", extra=2.0)
    promote("air_time:latest", "production", "from ada")
    rollback("air_time", "production")
    bob.enter()
    assert [entry.action for entry in releases("air_time")] == ["promote", "promote", "rollback"]
    assert load_model("air_time@production").tag == made.models[0]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


@pytest.mark.usefixtures("server")
def test_the_index_knows_what_it_has_read(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ada, bob = machine("ada"), machine("bob")
    ada.enter()
    made = [each.id for each in sweep("nbs/train.ipynb", {"extra": [1.0, 2.0, 3.0]}, jobs=2)]
    bob.enter()
    asked: list[str] = []

    def watched(remote: Remote, names: Iterator[str]) -> dict[str, bytes]:
        asked.extend(chosen := list(names))
        return read_files(remote, chosen)

    monkeypatch.setattr(sharing, "read_files", watched)
    assert {each.id for each in runs(sort="-slope")} == set(made) and len(asked) == 3
    before = records(load_settings())
    assert len(runs()) == 3 and len(asked) == 3, "what was known was read again"
    assert rebuild(load_settings()) == 3 and records(load_settings()) == before
    assert index_module.signatures(load_settings().runs) == {}


def test_a_store_that_goes_away(
    machine: Callable[..., Machine], server: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The run is kept, and the error says so; listings show what is known here."""
    ada = machine("ada")
    first = run("nbs/train.ipynb", extra=1.0)
    server()
    with pytest.raises(
        RunError, match=r"has succeeded, but is not shared: The store s3://team/flights"
    ) as error:
        run("nbs/train.ipynb", extra=2.0)
    assert (
        error.value.path is not None and "nbprod index" in str(error.value) and SECRET not in str(error.value)
    )
    second = load_run(error.value.path.parent.name)
    assert second.status == "succeeded" and second.models and load_model(second.models[0]).run == second.id
    assert [each.id for each in runs()] == [second.id, first.id]
    assert "only what is known here is listed" in caplog.text
    with pytest.raises(NbprodError, match="kept as it is"):
        rebuild(load_settings())
    assert [each.id for each in runs()] == [second.id, first.id]
    listed = start_driver("from nbprod.cli import main; main(['runs', '--json'])", ada.project)
    output, errors = listed.communicate(timeout=60)
    assert len(json.loads(output)) == 2 and "is not shared" in errors and SECRET not in errors


@pytest.mark.usefixtures("server")
def test_what_was_not_shared_is_shared_later(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = machine("ada")
    with monkeypatch.context() as patch:
        patch.setenv("NBPROD_STORE", "s3://nobody/flights")
        with pytest.raises(RunError, match="s3://nobody/flights does not exist"):
            run("nbs/train.ipynb")
    made = runs()[0]
    assert shared_signatures(load_settings()) == {}
    done = start_driver("from nbprod.cli import main; main(['index', '--json'])", ada.project)
    output, errors = done.communicate(timeout=60)
    assert (json.loads(output), errors) == ({"runs": 1}, "")
    machine("bob")
    assert [each.id for each in runs()] == [made.id]
    assert load_model("air_time:latest").tag == made.models[0]
    assert publish_missing(load_settings()) == 0


@pytest.mark.usefixtures("server")
def test_a_run_that_fails_is_shared_too(machine: Callable[..., Machine]) -> None:
    ada = machine("ada")
    write_notebook(ada.project / "nbs" / "broken.ipynb", "seed = 0", "1 / 0")
    with pytest.raises(CellError):
        run("nbs/broken.ipynb")
    machine("bob")
    (found,) = runs()
    assert found.status == "failed" and "ZeroDivisionError" in found.error["error"]


@pytest.mark.usefixtures("server")
def test_what_was_deleted_does_not_come_back(machine: Callable[..., Machine]) -> None:
    ada = machine("ada")
    made = run("nbs/train.ipynb")
    machine("bob")
    load_run(made.id)
    filesystem, path = open_filesystem("s3://team/flights")
    filesystem.rm(f"{path}/runs", recursive=True)
    assert publish_missing(load_settings()) == 0 and [each.id for each in runs()] == [made.id]
    ada.enter()
    assert publish_missing(load_settings()) == 0 and shared_signatures(load_settings()) == {}


@pytest.mark.usefixtures("server")
def test_a_store_that_was_a_folder_before(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("ada")
    with monkeypatch.context() as patch:
        patch.setenv("NBPROD_STORE", ".nbprod")
        made = run("nbs/train.ipynb")
    assert [each.id for each in runs()] == [made.id] and publish_missing(load_settings()) == 1
    machine("bob")
    assert [each.id for each in runs()] == [made.id] and load_model("air_time:latest").run == made.id


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", ["pipeline.skops", "library/extra.py"])
def test_a_model_that_was_changed_is_refused(machine: Callable[..., Machine], name: str) -> None:
    """Another file, or one more: neither is loaded, and nothing of it is left here."""
    machine("ada")
    tag = run("nbs/train.ipynb").models[0]
    filesystem, path = open_filesystem("s3://team/flights")
    filesystem.pipe_file(f"{path}/models/{tag.replace(':', '/')}/{name}", b"something else")
    bob = machine("bob")
    with pytest.raises(ModelError, match=f"is not what was published: {name}"):
        load_model(tag).contract  # noqa: B018 - its files are fetched when they are asked for
    assert not (bob.project.parent / "bentoml" / "models" / "air_time" / tag.split(":")[1]).exists()


@pytest.mark.usefixtures("server")
def test_a_model_is_pushed_to_a_bucket(machine: Callable[..., Machine]) -> None:
    """From a project whose store is a folder, to one that shares nothing with it but the bucket."""
    machine("ada", ".nbprod")
    tag = run("nbs/train.ipynb").models[0]
    first, second = (push("air_time:latest", "s3://team/models-only") for _ in range(2))
    assert first.sent == first.bytes > 0 == second.sent
    files = list_sizes(Remote("s3://team/models-only"), "models")
    assert sum(files.values()) > first.bytes and not [name for name in files if name.endswith(".tmp")]
    bob = machine("bob", ".nbprod")
    model = pull("air_time", "s3://team/models-only")
    assert model.tag == tag and model.folder.is_relative_to(bob.project.parent)
    assert promote(tag, "production").model == tag
    with pytest.raises(StoreError, match="s3://nobody/models does not exist"):
        push(tag, "s3://nobody/models")


@pytest.mark.usefixtures("server")
def test_a_push_to_a_bucket_that_is_killed(machine: Callable[..., Machine]) -> None:
    """Nobody sees the version until another push has made it whole."""
    ada = machine("ada", ".nbprod")
    tag = run("nbs/train.ipynb").models[0]
    parts = load_model(tag).folder / "library"
    parts.mkdir()
    for number in range(300):
        (parts / f"part{number:03}.py").write_text("x")
    code = f"from nbprod.release.exchange import push; push({tag!r}, 's3://team/flights')"
    driver = start_driver(code, ada.project)
    remote = Remote("s3://team/flights")
    wait_for(lambda: list_files(remote, "models"), "the first file to be uploaded")
    driver.kill()
    driver.communicate()
    before = len(list_files(remote, "models"))
    assert 0 < before < 300 and shared_tags(remote) == []
    done = push(tag, str(remote))
    assert done.files > 300 and done.sent < done.bytes and shared_tags(remote) == [tag]


@pytest.mark.usefixtures("server")
def test_no_credentials(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("ada")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"refuses access .* AWS_ACCESS_KEY_ID"):
        list_files(Remote("s3://team/flights"), "runs")


@pytest.mark.usefixtures("server")
def test_a_killed_upload_shows_nothing_half(machine: Callable[..., Machine]) -> None:
    """Killed after the first file was uploaded: nobody sees the run, and the next command shares it."""
    ada = machine("ada")
    cell = "import os, pathlib\nfor part in range(200):\n"
    cell += "    pathlib.Path(os.environ['NBPROD_RUN'], f'a{part:03}').write_text('x')"
    write_notebook(ada.project / "nbs" / "many.ipynb", "seed = 0", cell)
    code = "from nbprod.experiment.execution import run; run('nbs/many.ipynb', progress=False)"
    driver = start_driver(code, ada.project)
    remote = Remote("s3://team/flights")
    wait_for(lambda: list_files(remote, "runs"), "the first file to be uploaded")
    driver.kill()
    driver.communicate()
    assert not [name for name in list_files(remote, "runs") if name.endswith(NOTEBOOK_NAME)]
    machine("bob")
    assert len(runs()) == 0
    ada.enter()
    (made,) = runs()
    assert made.status == "succeeded"
    assert publish_missing(load_settings()) == 1
    assert len([name for name in list_files(remote, f"runs/{made.id}") if name.startswith("a")]) == 200


@pytest.mark.usefixtures("server")
def test_two_promote_at_once(machine: Callable[..., Machine]) -> None:
    """Four processes move one alias to and fro; each move is in the journal, after the one before it."""
    ada = machine("ada")
    made: list[Run] = list(sweep("nbs/train.ipynb", {"extra": [1.0, 2.0]}, jobs=2))
    code = "from nbprod.release.ledger import promote\nfor _ in range(3):\n    for tag in {tags!r}:\n"
    code += "        promote(tag, 'production')"
    tags = [each.models[0] for each in made]
    drivers = [start_driver(code.format(tags=tags), ada.project) for _ in range(4)]
    for driver in drivers:
        _, errors = driver.communicate(timeout=200)
        assert (driver.returncode, errors) == (0, "")
    entries = releases("air_time")
    assert len(entries) > 2
    for before, after in itertools.pairwise(entries):
        assert after.previous == before.model != after.model


def test_an_answer_that_is_lost(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that gets no answer creates its object again; the move is in the journal once."""
    settings = replace(load_settings(project), remote=f"file://{tmp_path}/shared")

    def twice(remote: Remote, name: str, content: bytes) -> None:
        create_file(remote, name, content)
        create_file(remote, name, content)

    monkeypatch.setattr(journal, "create_file", twice)
    june = Release("2026-06-01T09:00:00+00:00", "promote", "production", "delay:1", None, "ada", "first")
    assert write_entry("delay", lambda _: june, settings) == june
    assert write_entry("delay", lambda _: replace(june, model="delay:2"), settings).model == "delay:2"
    assert [entry.model for entry in releases("delay", settings)] == ["delay:1", "delay:2"]


@pytest.mark.parametrize("store", ["memory://team/flights", "file://{}/shared"])
def test_other_stores(machine: Callable[..., Machine], tmp_path: Path, store: str) -> None:
    machine("ada", store.format(tmp_path))
    made = run("nbs/train.ipynb")
    machine("bob", store.format(tmp_path))
    assert [each.id for each in runs()] == [made.id] and load_run(made.id).metrics == made.metrics


def test_wrong_addresses(machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("ada", "s4://team/flights")
    with pytest.raises(SettingsError, match="fsspec knows no protocol 's4'"):
        runs()
    monkeypatch.setenv("NBPROD_STORE", "s3://key:password@team/flights")
    assert "password" not in repr(load_settings())
    machine("bob", "s3://key:password@team/flights")
    monkeypatch.delenv("NBPROD_STORE")
    with pytest.raises(SettingsError, match="credentials in the environment") as error:
        load_settings()
    assert "password" not in str(error.value)
