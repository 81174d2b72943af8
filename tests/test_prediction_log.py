"""The prediction log: nothing answered is lost or double, whatever is killed; private and old is gone."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import boto3
import httpx
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from modelling import encoder, flights, late, logged
from moto.server import ThreadedMotoServer
from prometheus_client import CollectorRegistry
from running import mounted, wait_for
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import nbprod
from nbprod.errors import StoreError
from nbprod.model.column import Column
from nbprod.model.contract import Contract
from nbprod.model.store import Model
from nbprod.remote import list_files
from nbprod.serve import stream_files
from nbprod.serve.answering import Answerer
from nbprod.serve.append_log import FLUSH_SECONDS, AppendLog, Columns
from nbprod.serve.bento import build
from nbprod.serve.compaction import compact, compact_place
from nbprod.serve.ids import new_ids
from nbprod.serve.log_parts import KINDS, LATEST, list_parts, local_parts, log_place, remote_parts
from nbprod.serve.log_reading import feedback, predictions
from nbprod.serve.log_table import Entry, to_table
from nbprod.serve.prediction_log import FeedbackLog, PredictionLog
from nbprod.serve.private_columns import KEY_FILE
from nbprod.serve.process import start_service
from nbprod.serve.stream_files import StreamFile, read_stream
from nbprod.settings import Settings, load_settings

NOW = datetime.now(UTC)
CONTRACT = Contract((Column("carrier", "string", "str"), Column("distance", "int", "int64")))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a store of the test's own, and no shared one."""
    return load_settings(tmp_path, required=False, environ={})


def entry(count: int, at: datetime = NOW) -> Entry:
    """An answered request of `count` rows."""
    return Entry(new_ids("delay", count), [["UA"] * count, [*range(count)]], [1] * count, None, 0.01, time=at)


def write_rows(settings: Settings, *entries: Entry, version: str = "v1") -> list[str]:
    """Write a stream file as a process does that has ended; the ids in it."""
    logged = [list(chain(*columns)) for columns in zip(*(each.logged() for each in entries), strict=True)]
    table = to_table(logged, f"delay:{version}", CONTRACT)
    file = StreamFile(log_place("delay", "predictions", settings).folder, table.schema)
    file.write(table)
    file.close()
    return [id for each in entries for id in each.ids]


def tell(settings: Settings, pairs: list[tuple[str, Any]], at: datetime) -> None:
    """Write outcomes that were told at a time."""
    times = pa.array([at] * len(pairs), pa.timestamp("us", tz="UTC"))
    told = {"time": times, "id": [id for id, _ in pairs], "actual": [json.dumps(value) for _, value in pairs]}
    table = pa.table(told)
    file = StreamFile(log_place("delay", "feedback", settings).folder, table.schema)
    file.write(table)
    file.close()


def logged_ids(settings: Settings) -> list[str]:
    """All logged ids, in order."""
    return sorted(predictions("delay", settings=settings)["id"])


# A service, its end and the end of one of its workers


@pytest.fixture
def model(store: Path) -> Model:
    """A model that compiles wholly, in a store of the test's own."""
    assert not store.exists()
    return logged(make_pipeline(encoder(), LogisticRegression()).fit(flights, late), flights, late)


@contextmanager
def load(url: str, rows: list[dict[str, Any]], clients: int) -> Iterator[list[str]]:
    """Ask a service from several threads while the context lasts; the ids of the rows that it answered."""
    answered: list[str] = []
    stopping = threading.Event()

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        while not stopping.is_set():
            try:
                with httpx.Client(timeout=60) as session:
                    while not stopping.is_set():
                        given = {"rows": chance.choices(rows, k=chance.randint(1, 20))}
                        answer = session.post(f"{url}/predict", json=given)
                        if answer.status_code == 200:
                            answered.extend(answer.json()["ids"])
            except httpx.TransportError:
                time.sleep(0.01)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def workers_of(url: str) -> list[psutil.Process]:
    """The worker processes that listen at `url`."""
    port = int(url.rpartition(":")[2])
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            listens = any(each.laddr.port == port for each in process.net_connections() if each.laddr)
            if listens and "_bentoml_impl.worker.service" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_every_answered_row_is_logged_once_after_a_graceful_stop(model: Model, settings: Settings) -> None:
    bento = build(model.tag, settings=settings).bento
    with ExitStack() as clients, start_service(bento, workers=2, settings=settings) as url:
        assert len(workers_of(url)) == 2
        answered = clients.enter_context(load(url, model.examples["rows"], clients=6))
        wait_for(lambda: len(answered) > 5000, "answers")
    found = Counter(predictions("delay", settings=settings)["id"])
    assert set(answered) <= set(found) and max(found.values()) == 1
    place = log_place("delay", "predictions", settings)
    assert list_parts(place).streams == (), "the service moved all into Parquet before it ended"
    facts = [pq.read_metadata(place.folder / name).num_rows for name in local_parts(place)]
    assert sum(facts) == len(found)


@pytest.mark.alone  # its bound is one of time
def test_a_killed_worker_takes_a_fifth_of_a_second_with_it(model: Model, settings: Settings) -> None:
    bento = build(model.tag, settings=settings).bento
    with start_service(bento, workers=2, settings=settings) as url:
        with load(url, model.examples["rows"], clients=4) as answered:
            wait_for(lambda: len(answered) > 3000, "answers")
            victim = workers_of(url)[0]
            killed = time.time()
            victim.kill()
            seen = len(answered)
            wait_for(lambda: len(answered) > seen + 3000, "answers of the other worker")
            wait_for(lambda: len(workers_of(url)) == 2, "another worker in the place of the killed one")
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200, "the service")
        assert len(logged_ids(settings)) > 3000, "also of files that are being written, or moved"
    found = Counter(predictions("delay", settings=settings)["id"])
    assert max(found.values()) == 1
    missing = sorted(set(answered) - set(found))
    ages = [killed - int(id[:12], 16) / 1000 for id in missing]
    print(f"{len(missing)} of {len(answered)} rows are missing, the oldest {max(ages, default=0):.3f} s old")
    assert max(ages, default=0.0) <= 0.2
    assert list_parts(log_place("delay", "predictions", settings)).streams == (), "the killed one's file too"


# Killed while it moves rows

# Compacts in one process after the other, each of which is killed before its n-th change of a file or folder.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import pyarrow.parquet
from fsspec.implementations import local
from nbprod.serve import compaction, log_parquet
from nbprod.settings import load_settings

made, store = Path(sys.argv[1]), sys.argv[2]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def compact(folder, step):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in CHANGES or (event == "open" and arguments[2] & WRITING):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    environ = {"NBPROD_STORE": store.format(folder=folder), "NBPROD_RETENTION": "never"}
    compaction.compact("delay", load_settings(folder, required=False, environ=environ))

step = 0
while True:
    step += 1
    folder = made.parent / f"killed-{step}"
    shutil.copytree(made, folder)
    child = os.fork()
    if child == 0:
        try:
            compact(folder, step)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        print(step)
        sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.parametrize("store", [".nbprod", "file://{folder}/shared"], ids=["here", "shared"])
def test_a_compaction_that_is_killed_at_any_step_loses_and_doubles_nothing(
    tmp_path: Path, store: str
) -> None:
    def of(folder: Path) -> Settings:
        return load_settings(folder, required=False, environ={"NBPROD_STORE": store.format(folder=folder)})

    made = of(tmp_path / "made")
    days = [NOW - timedelta(days=days) for days in (2, 1)]
    write_rows(made, *(entry(3, day) for day in days))
    compact("delay", made)
    ids = logged_ids(made)
    ids += write_rows(made, *(entry(3, day) for day in days)) + write_rows(made, entry(2), version="v2")
    tell(made, [(ids[0], 1), (ids[1], 0)], NOW)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(made.root), store], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 30
    for step in range(1, steps + 1):
        killed = of(tmp_path / f"killed-{step}")
        assert logged_ids(killed) == sorted(ids), f"after a kill before change {step}"
        assert compact("delay", killed)
        assert logged_ids(killed) == sorted(ids), f"finished after a kill before change {step}"
        assert len(feedback("delay", settings=killed)) == 2
        for kind in KINDS:
            place = log_place("delay", kind, killed)
            assert list_parts(place).streams == ()
            assert {path.name for path in place.moving.iterdir()} <= {LATEST}


def test_a_reader_sees_each_row_once_while_rows_are_written_and_moved(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_files, "ROTATE_BYTES", 2000)
    place = log_place("delay", "predictions", settings)
    log = PredictionLog(settings.predictions / "delay", "delay:v1", CONTRACT)
    stopping = threading.Event()
    failed: list[BaseException] = []
    appended: list[str] = []

    def repeat(work: Callable[[], Any]) -> None:
        try:
            while not stopping.is_set():
                work()
        except BaseException as error:
            failed.append(error)
            raise

    def write() -> None:
        # Yesterday's, so that small files are joined as well.
        each = entry(5, NOW - timedelta(days=1))
        assert log.append(each)
        appended.extend(each.ids)
        time.sleep(0.005)

    threads = [threading.Thread(target=repeat, args=[write])]
    threads += [threading.Thread(target=repeat, args=[lambda: compact_place(place)])]
    for thread in threads:
        thread.start()
    seen: set[str] = set()
    try:
        wait_for(lambda: local_parts(place), "the first Parquet file")
        for _ in range(40):
            known = [*appended]
            time.sleep(3 * FLUSH_SECONDS)
            ids = logged_ids(settings)
            assert len(ids) == len(set(ids)), "double"
            assert seen <= set(ids), "what was there is there"
            assert set(known) <= set(ids), "what was appended three flushes ago is there"
            seen = set(ids)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        log.close()
    assert not failed and logged_ids(settings) == sorted(appended)


# How long, and what of it


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_older_than_the_retention_is_removed_everywhere(settings: Settings, shared: bool) -> None:
    if shared:
        settings = replace(settings, remote=f"memory://retention-{os.getpid()}")
    forever = replace(settings, retention=None)
    ages = {days: entry(1, NOW - timedelta(days=days)) for days in (0, 89, 92, 400)}
    for each in ages.values():
        write_rows(forever, each)
        tell(forever, [(each.ids[0], 1)], each.time)
    compact("delay", forever)
    assert len(feedback("delay", settings=forever)) == 4
    write_rows(settings, entry(1, NOW - timedelta(days=300)))
    compact("delay", settings)
    kept = sorted(ages[0].ids + ages[89].ids)
    assert logged_ids(settings) == sorted(feedback("delay", settings=settings)["id"]) == kept
    for kind in KINDS:
        place = log_place("delay", kind, settings)
        assert len(local_parts(place)) + len(remote_parts(place)) == 2
        assert len(list(place.folder.rglob("*.parquet"))) == 2, "no copy of what was removed"


def readable_text(folder: Path) -> str:
    """All that the files below `folder` hold, unpacked."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            found.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet":
            table = pq.ParquetFile(path).read()
            facts = pq.read_metadata(path).to_dict()
            found += [str(table.to_pydict()), str(table.schema.metadata), str(facts)]
        if path.suffix == ".arrows":
            for batch in read_stream(path):
                found += [str(batch.to_pydict()), str(batch.schema.metadata)]
    return "\n".join(found)


def passengers_model() -> Model:
    """A model of passengers, whose names and accounts are nobody's business."""
    people = flights.assign(passenger=["Ada Lovelace", "Mary Shelley"] * 100, account=4_711_000_815)
    said = {"passenger": Column(private=True), "account": Column(private="hash")}
    estimator = make_pipeline(encoder(), LogisticRegression()).fit(people, late)
    return logged(estimator, people, late, columns=said)


@pytest.mark.usefixtures("store")
def test_what_is_private_is_nowhere_in_the_store(settings: Settings) -> None:
    private = passengers_model()
    assert {each.concealment for each in private.contract.columns} == {"", "drop", "hash"}
    answerer = Answerer(private, settings, CollectorRegistry())
    rows = [
        {**private.examples["rows"][0], "passenger": "Grace Hopper", "account": 4_711_000_816 + n}
        for n in (0, 1, 0)
    ]
    answer = answerer.predict(rows)
    wait_for(lambda: len(predictions("delay", settings=settings)) == 3, "the log")
    for _ in range(2):  # as a stream, and as Parquet
        text = readable_text(settings.store)
        assert answer.ids[0] in text
        for secret in ("Grace", "Ada", "Mary", "4711000816", "4711000815"):
            assert secret not in text
        answerer.close()
    kept = predictions("delay", settings=settings)
    assert "passenger" not in kept and {"carrier", "wind", "distance"} <= set(kept)
    one, other, same = kept["account"]
    assert one == same != other and len(one) == 32
    key = settings.predictions / KEY_FILE
    assert key.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(settings.predictions / "delay")
    key.unlink()
    again = Answerer(private, settings, CollectorRegistry())
    again.predict(rows)
    again.close()
    assert predictions("delay", settings=settings)["account"][0] != one, "another key, other hashes"


@pytest.mark.usefixtures("store")
def test_what_is_private_is_shown_to_nobody(settings: Settings) -> None:
    private = passengers_model()
    with start_service(build(private.tag, settings=settings).bento, settings=settings) as url:
        paths = ("/model", "/docs.json", "/schema.json", "/metrics", "/notebook", "/v2/models/delay", "/docs")
        told = {path: httpx.get(f"{url}{path}").text for path in paths}
        operation = json.loads(told["/docs.json"])["paths"]["/predict"]["post"]
        example = operation["requestBody"]["content"]["application/json"]["example"]
        assert httpx.post(f"{url}/predict", json=example).status_code == 200
    told |= {"card": repr(private), "card in Jupyter": private._repr_html_()}
    for place, text in told.items():
        assert [secret for secret in ("Ada", "Mary", "4711000815") if secret in text] == [], place
    assert "passenger" in told["/model"] and '"UA"' in told["/model"], "what is not private is told"


# A store on the network


def test_machines_share_a_log(settings: Settings, tmp_path: Path) -> None:
    remote = f"memory://machines-{os.getpid()}"
    one = replace(settings, remote=remote)
    two, reader = (replace(one, store=tmp_path / name) for name in ("two", "reader"))
    ids = write_rows(one, entry(3, NOW - timedelta(days=1)), entry(2))
    ids += write_rows(two, entry(4))
    tell(two, [(ids[0], 1)], NOW)
    compact("delay", one)
    compact("delay", two)
    assert len(list_files(log_place("delay", "predictions", one).remote, "predictions/delay")) == 4
    assert local_parts(log_place("delay", "predictions", one)) == []
    for machine in (one, two, reader):
        assert logged_ids(machine) == sorted(ids)
        assert feedback("delay", settings=machine)["id"].tolist() == ids[:1]
    midnight = NOW.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(microseconds=1)
    yesterday = predictions("delay", until=midnight, settings=replace(one, store=tmp_path / "new"))
    assert sorted(yesterday["id"]) == sorted(ids[:3])
    fetched = list((tmp_path / "new").rglob("*.parquet"))
    assert len(fetched) == 1, "only the days that were asked for"
    with pytest.raises(nbprod.errors.NotFoundError, match=r"Did you mean 'delay'\?"):
        predictions("delays", settings=reader)


def test_a_store_that_is_away_costs_nothing_but_time(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file where the store should be")
    shared = replace(settings, remote=f"file://{tmp_path}/occupied/store")
    ids = write_rows(shared, entry(3))
    with pytest.raises(StoreError):
        compact("delay", shared)
    with pytest.raises(StoreError):
        compact("delay", shared)
    assert logged_ids(settings) == sorted(ids), "it is all here meanwhile"
    (tmp_path / "occupied").unlink()
    ids += write_rows(shared, entry(1))
    assert compact("delay", shared) and logged_ids(shared) == sorted(ids)
    assert logged_ids(replace(shared, store=tmp_path / "elsewhere")) == sorted(ids)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket in an S3 of this machine."""
    served = ThreadedMotoServer(port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="logs")
    yield "s3://logs/flights"
    served.stop()


def test_a_service_keeps_its_log_in_s3(model: Model, settings: Settings, bucket: str, tmp_path: Path) -> None:
    shared = replace(settings, remote=bucket)
    built = build(model.tag, force=True, settings=shared)
    wanted = (built.path / "env" / "python" / "requirements.txt").read_text()
    assert "\ns3fs==" in wanted, "an environment of its own reaches the bucket as well"
    with start_service(built.bento, workers=2, settings=shared) as url:
        answers = [httpx.post(f"{url}/predict", json={"rows": model.examples["rows"]}) for _ in range(10)]
        ids = [id for answer in answers for id in answer.json()["ids"]]
        told = {"feedback": [{"id": ids[0], "actual": 1}]}
        assert httpx.post(f"{url}/feedback", json=told).json() == {"accepted": 1, "unknown": []}
    elsewhere = replace(shared, store=tmp_path / "elsewhere")
    assert logged_ids(elsewhere) == sorted(ids)
    assert feedback("delay", settings=elsewhere)["id"].tolist() == ids[:1]


# No room


def test_a_full_disk_costs_rows_that_are_counted(settings: Settings) -> None:
    with mounted(settings.predictions, "size=400k"):
        dropped: list[int] = []
        log = PredictionLog(settings.predictions / "delay", "delay:v1", CONTRACT, on_dropped=dropped.append)
        ids: list[str] = []

        def append() -> int:
            each = entry(200)
            assert log.append(each)
            ids.extend(each.ids)
            return sum(dropped)

        wait_for(append, "a full disk")
        room = settings.predictions / "delay" / "predictions"
        stored = logged_ids(settings)
        assert stored and set(stored) < set(ids)
        for path in sorted(room.glob("*.arrows"))[:1]:
            path.unlink()
        before = set(logged_ids(settings))
        time.sleep(2 * FLUSH_SECONDS)
        lost = sum(dropped)
        append()
        log.close()
        after = set(logged_ids(settings))
        assert sum(dropped) == lost and len(after - before) >= 200, "the log goes on when there is room"


def test_a_full_queue_refuses_rows_and_counts_them(tmp_path: Path) -> None:
    writing, dropped = threading.Event(), list[int]()

    def slow(columns: Columns) -> pa.Table:
        writing.wait()
        return pa.table({"distance": columns[0]})

    log = AppendLog(tmp_path / "log", lambda: [[]], slow, on_dropped=dropped.append, capacity=100)
    columns = [[1400] * 40]
    assert [log.append(columns) for _ in range(4)] == [True, True, False, False]
    assert dropped == [40, 40]
    writing.set()
    wait_for(lambda: log.append(columns), "room")
    log.close()
    batches = [batch for path in (tmp_path / "log").iterdir() for batch in read_stream(path)]
    assert sum(batch.num_rows for batch in batches) + sum(dropped) == 40 * (2 + len(dropped) + 1)


# What comes back is what went in

VALUES: dict[str, tuple[Column, st.SearchStrategy[Any]]] = {
    "whole": (Column("whole", "int", "Int64", nullable=True), st.integers(-(2**63), 2**63 - 1)),
    "huge": (Column("huge", "int", "UInt64", nullable=True), st.integers(0, 2**64 - 1)),
    "number": (
        Column("number", "float", "float64", nullable=True),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    "truth": (Column("truth", "bool", "boolean", nullable=True), st.booleans()),
    "text": (Column("text", "string", "str", nullable=True), st.text()),
    "day": (Column("day", "date", "object", nullable=True), st.dates(date(1700, 1, 1), date(2200, 1, 1))),
    "moment": (
        Column("moment", "datetime", "datetime64[ns, UTC]", nullable=True),
        st.integers(-(2**62), 2**62),
    ),
    "size": (
        Column("size", "category", "category", nullable=True, categories=("small", "large")),
        st.sampled_from(["small", "large"]),
    ),
    "time": (Column("time", "datetime", "datetime64[s]", nullable=True), st.integers(0, 2**32)),
}


@hypothesis_settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), moved=st.booleans())
def test_every_kind_of_value_comes_back(settings: Settings, data: st.DataObject, moved: bool) -> None:
    shutil.rmtree(settings.store, ignore_errors=True)
    contract = Contract(tuple(column for column, _ in VALUES.values()))
    rows = data.draw(st.integers(1, 5))
    columns = [
        data.draw(st.lists(st.none() | values, min_size=rows, max_size=rows)) for _, values in VALUES.values()
    ]
    predicted = data.draw(
        st.sampled_from([[1] * rows, [0.5] * rows, ["late"] * rows, [True] * rows, [[1, 2]] * rows])
    )
    asked = Entry(new_ids("delay", rows), columns, predicted, [[0.25, 0.75]] * rows, 0.5, "request", "key")
    log = PredictionLog(settings.predictions / "delay", "delay:v1", contract)
    assert log.append(asked)
    log.close()
    if moved:
        compact("delay", settings)
    found = predictions("delay", settings=settings)
    assert found["id"].tolist() == asked.ids and set(found["key"]) == {"key"}
    read_back = found["prediction"].tolist()
    assert (list(map(list, read_back)) if isinstance(predicted[0], list) else read_back) == predicted
    assert [list(each) for each in found["probability"]] == asked.probabilities
    for (name, (column, _)), values in zip(VALUES.items(), columns, strict=True):
        read = found["feature.time" if name == "time" else name]
        assert read.dtype == column.training_dtype
        for value, was in zip(read, values, strict=True):
            if was is None:
                assert pd.isna(value)
            elif column.type == "datetime":
                unit = 1 if column.resolution == "ns" else 10**9
                assert value.as_unit("ns").value == was * unit if abs(was * unit) < 2**63 else True
            elif column.type == "float":
                assert math.isclose(value, was, rel_tol=0)
            else:
                assert value == was


@hypothesis_settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_of_all_outcomes_the_one_told_last_counts(settings: Settings, data: st.DataObject) -> None:
    """Late, out of order, repeated, for rows that were never logged; in any number of files."""
    shutil.rmtree(settings.store, ignore_errors=True)
    asked = entry(4)
    ids = write_rows(settings, asked)
    unknown = new_ids("delay", 2)
    told: dict[str, tuple[int, Any]] = {}
    moments = data.draw(st.lists(st.integers(0, 10**6), unique=True, max_size=6))
    for moment in moments:
        outcome = st.integers(0, 3) | st.text(max_size=2)
        pairs = data.draw(st.lists(st.tuples(st.sampled_from(ids + unknown), outcome), max_size=4))
        if pairs:
            tell(settings, pairs, NOW + timedelta(seconds=moment))
        for id, actual in pairs:
            if id not in told or told[id][0] <= moment:
                told[id] = (moment, actual)
        if data.draw(st.booleans()):
            compact("delay", settings)
    known = feedback("delay", settings=settings)
    assert known["id"].tolist() == [id for id in ids if id in told]
    assert known["actual"].tolist() == [told[id][1] for id in ids if id in told]
    assert {"carrier", "distance", "prediction"} <= set(known)


def test_outcomes_that_come_late_belong_to_their_rows(settings: Settings) -> None:
    """What is asked for is a window of predictions; their outcomes may be told long after it."""
    old, new = entry(2, NOW - timedelta(days=30)), entry(2, NOW - timedelta(days=1))
    write_rows(settings, old, new)
    log = FeedbackLog(settings.predictions / "delay")
    assert log.append([(old.ids[0], 1), (new.ids[0], 0)])
    log.close()
    assert feedback("delay", since="7d", settings=settings)["id"].tolist() == new.ids[:1]
    until = feedback("delay", until="7d", settings=settings)
    assert until[["id", "actual"]].values.tolist() == [[old.ids[0], 1]]
    assert len(feedback("delay", settings=settings)) == 2


def test_reading_leaves_other_days_closed(settings: Settings) -> None:
    ids = write_rows(settings, entry(3, NOW - timedelta(days=3)), entry(2))
    compact("delay", settings)
    place = log_place("delay", "predictions", settings)
    old = min(local_parts(place))
    (place.folder / old).write_bytes(b"nobody opens this")
    assert predictions("delay", since="1d", settings=settings)["id"].tolist() == ids[3:]
