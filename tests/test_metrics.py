"""The metrics of a service: exact with several workers and after a kill, bounded, documented."""

import json
import math
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest
from conftest import require_debian
from modelling import encoder, late, make_flights
from prometheus_client.parser import text_string_to_metric_families
from running import wait_for
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import nbprod
from nbprod.model.baseline import histogram, profile
from nbprod.model.contract import infer_contract, plain_rows
from nbprod.model.observed import Observed
from nbprod.model.store import Model, load
from nbprod.model.validation import Usual, unusual
from nbprod.monitor.metrics import Scrape, read_metrics
from nbprod.serve.bento import BuiltBento, build
from nbprod.serve.bins import SMALLEST_SHARE, feature_psi, prediction_psi
from nbprod.serve.endpoints import OTHER_PATH
from nbprod.serve.log_table import Entry, logged_name, to_table
from nbprod.serve.metric_names import METRICS
from nbprod.serve.process import start_service
from nbprod.settings import Settings, load_settings

# Bins and unusual values, of Arrow as of pandas


def days(*texts: str | None) -> pd.Series:
    """A column of days."""
    return pd.Series([text and date.fromisoformat(text) for text in texts], dtype=object)


def moments(*texts: str | None, unit: str = "us", zone: str | None = None) -> pd.Series:
    """A column of moments, which are told in UTC."""
    read = pd.Series(pd.to_datetime(list(texts), utc=True, format="ISO8601")).dt.as_unit(unit)
    return read.dt.tz_localize(None) if zone is None else read.dt.tz_convert(zone)


NINES = float(2**53)
# Training and production, by type.
COLUMNS: dict[str, tuple[Any, Any]] = {
    "int64": ([5, 5, 7, -3, 2**53 + 1], [5, -4, 2**53 + 2, 2**53 + 1, 2**53]),
    "int8": (pd.Series([1, 2, 3] * 9, dtype="int8"), pd.Series([1, -128, 127], dtype="int8")),
    "uint64": (pd.Series([0, 2**64 - 2], dtype="uint64"), pd.Series([2**64 - 1, 0], dtype="uint64")),
    "Int64": (pd.array([1, None, 2**60 + 1], dtype="Int64"), pd.array([None, 2**60 + 2, 0], dtype="Int64")),
    "float64": ([0.0, np.nan, 1.5, 0.1, NINES], [np.nan, -0.0, 5e-324, -1e300, 1e300, 0.1]),
    "float32": (
        pd.Series([0.1, 0.7, None], dtype="float32"),
        pd.Series([0.1, 0.70001, None], dtype="float32"),
    ),
    "Float64": (pd.array([0.5, None], dtype="Float64"), pd.array([None, 0.25, 0.75], dtype="Float64")),
    "many": (np.random.default_rng(0).gamma(2, 3, 500), np.random.default_rng(1).gamma(4, 3, 500)),
    "bool": ([True, False, True], [False, False, True]),
    "boolean": (pd.array([True, None], dtype="boolean"), pd.array([False, None, True], dtype="boolean")),
    "str": (["UA", None, "B6", ""], ["ZZ", None, "", "UA", "UA"]),
    "object": (pd.Series(["UA", None], dtype=object), pd.Series([None, "é", "UA"], dtype=object)),
    "string": (pd.array(["UA", None], dtype="string"), pd.array(["B6", None], dtype="string")),
    "category": (
        pd.Categorical(["UA", None, "B6"], categories=["UA", "B6", "never"]),
        pd.Categorical(["XX", None, "never"], categories=["UA", "B6", "never", "XX"]),
    ),
    "category of int": (pd.Categorical([2, 4, None]), pd.Categorical([2, 8, None], categories=[2, 4, 8])),
    "category of float": (pd.Categorical([0.5, 1.0]), pd.Categorical([1.0, 2.0], categories=[0.5, 1.0, 2.0])),
    "category of bool": (
        pd.Categorical([True, False]),
        pd.Categorical([True, True], categories=[False, True]),
    ),
    "date": (days("1969-12-31", None, "2013-03-10"), days("1969-12-30", "2013-03-11", None, "2000-01-01")),
    "datetime s": (moments("2013-01-01", None, unit="s"), moments("2012-12-31T23:59:59", None, unit="s")),
    "datetime ms": (
        moments("2013-01-01T00:00:00.5", "1960-01-01T00:00:00.001", unit="ms"),
        moments("1960-01-01T00:00:00.000", "2013-01-01T00:00:00.501", unit="ms"),
    ),
    "datetime us": (moments("2013-01-01", "2013-06-01"), moments(None, "2013-06-01T00:00:00.000001")),
    "datetime ns": (
        moments("1960-01-01T00:00:00.000000001", "2013-01-01T00:00:00.123456789", unit="ns"),
        moments("1960-01-01", "2013-01-01T00:00:00.123456790", None, unit="ns"),
    ),
    "zoned": (
        # The hour of the second is there twice on that day.
        moments("2013-03-10T06:59:59", "2013-11-03T06:30:00", None, zone="America/New_York"),
        moments("2013-11-03T05:30:00", "2013-11-03T06:30:01", None, zone="America/New_York"),
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_arrow_is_counted_as_pandas_for_every_type(name: str) -> None:
    training, production = (pd.DataFrame({"time": values}) for values in COLUMNS[name])
    nullable = bool(pd.concat([training, production])["time"].isna().any())
    contract = infer_contract(training, {"time": nbprod.Column(nullable=nullable)})
    (column,) = contract.columns
    reference = histogram(training["time"])
    for frame in (training, production, production.iloc[:0]):
        rows = contract.reader.check(plain_rows(contract, frame))
        in_pandas = contract.check_frame(frame)
        entry = Entry([""] * len(frame), rows.columns, [0] * len(frame), None, 0.0)
        table = to_table(entry.logged(), "m:1", contract)
        logged = table[logged_name("time")]
        expected = reference.count(in_pandas["time"])
        assert reference.count(logged).tolist() == expected.tolist() and expected.sum() == len(frame)
        found = Usual.of(column).unusual(Observed(logged))
        assert found == unusual(contract.columns, in_pandas).get("time", {})
    if name not in ("many", "bool", "boolean", "category of bool", "int8"):
        assert Usual.of(column).unusual(Observed(production["time"])), "something is unusual in each"


@pytest.mark.parametrize(
    ("predictions", "probabilities", "classes"),
    [
        ([0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.45, 0.55]], [0, 1]),
        ([1, -1], None, [-1, 1]),
        (["UA", "B6"], [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], ["UA", "B6", "AA"]),
        ([True, False], None, [False, True]),
        ([1.0, 2.0], [[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]], [1.0, 2.0, 3.0]),
        ([1.5, -7.25, 1e9], None, None),
        ([[1.0, 3.5], [0.1, 0.2]], None, None),
        ([[0, 1], [1, 1]], None, None),
        ([["a", "b"], ["a", "c"]], None, None),
    ],
)
def test_logged_predictions_are_counted_as_answered_ones(
    predictions: list[Any], probabilities: list[list[float]] | None, classes: list[Any] | None
) -> None:
    frame = pd.DataFrame({"x": range(len(predictions))})
    table_of = np.array(probabilities) if probabilities else None
    baseline = profile(frame, np.array(predictions), table_of, classes)
    lists = pa.array(probabilities or [None] * len(predictions), pa.list_(pa.float64()))
    logged = pa.array(predictions), lists
    for chunks in (logged, [pa.chunked_array([each[:1], each[1:]]) for each in logged]):
        counts = baseline.prediction.count(baseline.prediction_values(*chunks))
        answered = baseline.prediction.count(baseline.prediction_values(predictions, probabilities))
        assert counts.tolist() == answered.tolist() == list(baseline.prediction.counts)


# A service


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A project, which is the current folder."""
    root = tmp_path_factory.mktemp("metrics_project")
    (root / "settings.ini").write_text("[DEFAULT]\nlib_name = small\n\n[nbprod]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield load_settings(root)


@pytest.fixture(scope="module")
def model(project: Settings) -> Model:
    """A compiled model of flights."""
    assert project.store
    flights = make_flights()
    pipeline = make_pipeline(encoder(), LogisticRegression(max_iter=1000)).fit(flights, late)
    said = {"distance": nbprod.Column(private=True)}
    return load(nbprod.log_model(pipeline, "watched", flights, late, columns=said))


@pytest.fixture(scope="module")
def built(model: Model, project: Settings) -> BuiltBento:
    return build(model.tag, settings=project)


@pytest.fixture
def serve(built: BuiltBento, project: Settings, tmp_path: Path) -> Callable[[int], Any]:
    """A function that starts a service with so many workers, whose store is the test's own."""
    settings = replace(project, store=tmp_path / "store")
    return lambda workers: start_service(built.bento, workers=workers, settings=settings)


web = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


@pytest.fixture(scope="module", autouse=True)
def close_client() -> Iterator[None]:
    yield
    web.close()


def some_rows(model: Model, count: int, seed: int = 5) -> list[dict[str, Any]]:
    """Rows as clients send them."""
    return random.Random(seed).choices(plain_rows(model.contract, make_flights()), k=count)


def ask(url: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    response = web.post(f"{url}/predict", json={"rows": rows})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def scrape(url: str) -> Scrape:
    """What the service says now; each call is a connection of its own, to any of the workers."""
    return read_metrics(web.get(f"{url}/metrics").text, time.time())


def counted(url: str, rows: int) -> Scrape | None:
    """A reading once so many rows have passed the log."""
    reading = scrape(url)
    return reading if reading.total("nbprod_log_rows_total") == rows else None


def workers_of(url: str) -> list[psutil.Process]:
    """The living worker processes of the service that listen."""
    port, found = int(url.rpartition(":")[2]), []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # of which a process that nobody has waited for is one
            connections = process.net_connections()
            if "_bentoml_impl.worker.service" in process.cmdline() and port in map(local_port, connections):
                found.append(process)
    return found


def local_port(connection: Any) -> int | None:
    """The port at this end of a connection."""
    return connection.laddr.port if connection.laddr else None


def check_totals(reading: Scrape, model: Model, rows: list[dict[str, Any]]) -> None:
    """That all counters tell exactly these rows."""
    assert reading.total("nbprod_rows_total", model=model.tag) == len(rows)
    assert reading.total("nbprod_predictions_total", model=model.tag) == len(rows)
    frame = model.contract.frame(model.contract.reader.check(rows))
    for column, reference in model.baseline.features.items():
        found = reading.by("bin", "nbprod_feature_total", model=model.tag, column=column)
        expected = reference.count(frame[column]).tolist()
        assert [found[str(position)] for position in range(len(expected))] == expected, column
    assert reading.total("nbprod_log_dropped_total") == 0


def ours(reading: Scrape) -> dict[str, Any]:
    """What nbprod itself counts."""
    return {name: series for name, series in reading.values.items() if name.startswith("nbprod_")}


# Several workers


def test_three_workers_add_up_and_each_tells_the_same(serve: Callable[[int], Any], model: Model) -> None:
    rows = some_rows(model, 600)
    parts = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    with serve(3) as url:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: ask(url, part), parts))
        reading = wait_for(lambda: counted(url, len(rows)), "all rows to be counted")
        check_totals(reading, model, rows)
        assert reading.by("format", "nbprod_requests_total", key="") == {"rows": len(parts)}
        answered = {"endpoint": "/predict", "http_response_code": "200"}
        assert reading.total("bentoml_service_request_total", **answered) == len(parts)
        assert reading.total("bentoml_service_request_duration_seconds_count", **answered) == len(parts)
        delays = reading.total("nbprod_log_delay_seconds_count")
        assert 3 <= delays <= len(parts), "at least one batch of each worker"
        # With connections of its own to workers that are idle, the kernel lets any of them answer.
        readings = [scrape(url) for _ in range(12)]
        assert all(ours(each) == ours(readings[0]) for each in readings)
        assert readings[0].total("nbprod_model_info") == 1
        shares = readings[0].by("column", "nbprod_feature_reference")
        assert shares == pytest.approx(dict.fromkeys(model.contract.names, 1.0))
        assert len(workers_of(url)) == 3


def test_a_killed_worker_takes_no_counts_along_and_leaves_no_request_in_progress(
    serve: Callable[[int], Any], model: Model
) -> None:
    rows = some_rows(model, 400)
    with serve(2) as url:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda row: ask(url, [row]), rows[:200]))
        wait_for(lambda: counted(url, 200), "the first rows to be counted")
        before = {process.pid for process in workers_of(url)}
        with unfinished_request(url) as ours:
            wait_for(lambda: in_progress(url) == 1, "the request to begin")
            (killed,) = (process for process in workers_of(url) if speaks_with(process, ours))
            killed.kill()
        wait_for(lambda: len({each.pid for each in workers_of(url)} - before) == 1, "a new worker")
        wait_for(lambda: in_progress(url) == 0, "the gauge to forget the dead")
        check_totals(scrape(url), model, rows[:200])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda row: ask(url, [row]), rows[200:]))
        check_totals(wait_for(lambda: counted(url, 400), "all rows to be counted"), model, rows)


def unfinished_request(url: str) -> socket.socket:
    """A connection on which half a request was sent."""
    port = int(url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    return connection


def in_progress(url: str) -> float:
    return scrape(url).total("bentoml_service_request_in_progress", endpoint="/predict")


def speaks_with(process: psutil.Process, connection: socket.socket) -> bool:
    """Whether `process` is at the other end."""
    mine = connection.getsockname()[1]
    return any(each.raddr and each.raddr.port == mine for each in process.net_connections())


# Bounded


def test_a_scanner_makes_no_series(serve: Callable[[int], Any], model: Model) -> None:
    chance = random.Random(3)
    with serve(1) as url:
        ask(url, some_rows(model, 1))
        for page in ("/model", "/docs.json", "/static_content/index.css", "/livez"):
            web.get(url + page)
        wait_for(lambda: counted(url, 1), "the row to be counted")
        before = scrape(url)
        for _ in range(300):
            path = f"/{chance.choice(['', 'predict/', 'static_content/', 'v2/models/'])}{chance.random()}"
            answer = web.request(chance.choice(["GET", "POST", "PUT"]), f"{url}{path}")
            assert answer.status_code in (404, 405), path
            if answer.status_code == 404:
                assert path in answer.json()["error"], "it is answered by its true path"
        assert web.get(f"{url}/static_content/x/../index.css").status_code in (200, 404)
        after = scrape(url)
        names = set(before.by("endpoint", "bentoml_service_request_total"))
        assert set(after.by("endpoint", "bentoml_service_request_total")) == {*names, OTHER_PATH}
        assert set(after.by("endpoint", "bentoml_service_request_in_progress")) <= {*names, OTHER_PATH}
        assert {"/predict", "/model", "/docs.json", "/static_content"} <= names
        scanned = after.total("bentoml_service_request_total", http_response_code="404")
        assert 250 < scanned <= 301, "they are counted, together"


# Documented


def test_every_metric_is_documented_and_every_documented_one_is_there(
    serve: Callable[[int], Any], model: Model
) -> None:
    with serve(2) as url:
        known, odd = some_rows(model, 2), some_rows(model, 1)[0] | {"carrier": "ZZ", "wind": 1e6}
        answer = ask(url, [*known, odd])
        told = {"feedback": [{"id": answer["ids"][0], "actual": 1}, {"id": "nobody's", "actual": 0}]}
        assert web.post(f"{url}/feedback", json=told).json()["accepted"] == 1
        for body in (b"{", b'{"rows": []}', b'{"rows": [{}]}'):
            assert web.post(f"{url}/predict", content=body).status_code in (400, 422)
        assert web.get(f"{url}/predict").status_code == 405
        send_otherwise(url, model)
        wait_for(lambda: counted(url, 6), "the rows to be counted")
        text = web.get(f"{url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {name: family for name, family in families.items() if name.startswith("nbprod_")}
    names = {f"{name}_total" if each.type == "counter" else name for name, each in found.items()}
    assert names == METRICS.keys()
    for name, metric in METRICS.items():
        family = found[name.removesuffix("_total")]
        assert family.documentation == metric.meaning
        assert family.type == ("gauge" if metric.kind == "constant" else metric.kind)
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
            assert sample.labels["model"] == model.tag and "pid" not in sample.labels
    reading = read_metrics(text, 0.0)
    assert reading.by("format", "nbprod_requests_total", key="") == {"rows": 1, "arrow": 1, "tensors": 1}
    endpoints = reading.by("endpoint", "bentoml_service_request_total", http_response_code="200")
    assert endpoints[f"/v2/models/{model.name}/infer"] == 1
    assert reading.by("kind", "nbprod_unusual_values_total", column="carrier") == {"unseen": 1}
    assert reading.by("kind", "nbprod_unusual_values_total", column="wind") == {"below": 0, "above": 1}
    reasons = reading.by("reason", "nbprod_rejected_total")
    assert reasons == {"json": 1, "shape": 1, "contract": 1, "method": 1}
    ranges = reading.by("range", "nbprod_feature_reference", column="carrier")
    assert ranges.keys() == {"AA", "B6", "UA", "(other)", "(missing)"}
    assert reading.by("range", "nbprod_feature_reference", column="distance").keys() == {""}, "it is private"
    (info,) = (dict(labels) for labels in reading.values["nbprod_model_info"])
    assert info["compiled"] == "whole" and info["rows"] == "200" and info["estimator"]


def send_otherwise(url: str, model: Model) -> None:
    """Two flights as an Arrow stream, and one as tensors."""
    flights = pa.Table.from_pandas(make_flights(2), preserve_index=False)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, flights.schema) as stream:
        stream.write_table(flights)
    kind = {"content-type": "application/vnd.apache.arrow.stream"}
    body = sink.getvalue().to_pybytes()
    assert web.post(f"{url}/predict", content=body, headers=kind).status_code == 200
    (row,) = plain_rows(model.contract, make_flights(1))
    types = {"carrier": "BYTES", "wind": "FP64", "distance": "INT64"}
    tensors = [
        {"name": name, "shape": [1], "datatype": types[name], "data": [value]} for name, value in row.items()
    ]
    answer = web.post(f"{url}/v2/models/{model.name}/infer", json={"inputs": tensors})
    assert answer.status_code == 200, answer.text


def test_requests_are_counted_by_the_name_of_their_key(
    built: BuiltBento, project: Settings, tmp_path: Path, model: Model
) -> None:
    secrets = {"billing": "b" * 40, "planning": "p" * 40}
    keys = {"NBPROD_KEYS": ",".join(f"{name}:{secret}" for name, secret in secrets.items())}
    settings = replace(project, store=tmp_path / "store")
    with start_service(built.bento, workers=2, settings=settings, environ=os.environ | keys) as url:
        for secret, times in (
            (secrets["billing"], 3),
            (secrets["planning"], 1),
            ("x" * 40, 2),
            ("y" * 40, 2),
        ):
            for _ in range(times):
                body = {"rows": some_rows(model, 1)}
                web.post(f"{url}/predict", json=body, headers={"x-api-key": secret})
        text = web.get(f"{url}/metrics", headers={"x-api-key": secrets["billing"]}).text
    reading = read_metrics(text, 0.0)
    assert reading.by("key", "nbprod_requests_total") == {"billing": 3, "planning": 1}
    assert reading.by("reason", "nbprod_rejected_total") == {"key": 4}
    assert not any(secret in text for secret in (*secrets.values(), "x" * 40, "y" * 40))


# Drift by anything that reads Prometheus


def psi(reference: Any, counts: Any) -> float:
    """The population stability index of counts (bins,) against those at training, by its definition."""
    p, q = (np.maximum(np.array(each) / sum(each), SMALLEST_SHARE) for each in (reference, counts))
    return float(((q - p) * np.log(q / p)).sum())


def test_prometheus_alone_computes_drift(
    serve: Callable[[int], Any], model: Model, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """A real Prometheus server scrapes two workers and evaluates the PromQL of the documentation."""
    program = require_debian("prometheus", "/usr/bin/prometheus")
    far = {"carrier": "UA", "distance": 9000}
    shifted = [row | far for row in some_rows(model, 90)] + some_rows(model, 10)
    with serve(2) as url:
        job = {"job_name": "watched", "static_configs": [{"targets": [url.removeprefix("http://")]}]}
        config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": [job]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        address = f"127.0.0.1:{free_port()}"
        arguments = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "log").open("wb") as log:
            prometheus = subprocess.Popen(
                [program, *arguments, f"--web.listen-address={address}"], stdout=log, stderr=log
            )
        try:
            wait_for(lambda: query(address, "nbprod_rows_total"), "the first scrape")
            for start in range(0, 100, 10):
                ask(url, shifted[start : start + 10])
            wait_for(lambda: value(query(address, "sum(nbprod_log_rows_total)")) == 100, "the rows")
            grown = "sum(increase(nbprod_predictions_total[1m]))"
            wait_for(lambda: value(query(address, grown)) > 99, "both")
            by_column = query(address, feature_psi("1m"))
            (of_predictions,) = query(address, prediction_psi("1m"))
            waiting = "sum(nbprod_rows_total) - sum(nbprod_log_rows_total)"
            assert value(query(address, waiting)) == 0
        finally:
            prometheus.terminate()
            prometheus.wait(30)
    found = {each["metric"]["column"]: float(each["value"][1]) for each in by_column}
    frame = model.contract.frame(model.contract.reader.check(shifted))
    for column, reference in model.baseline.features.items():
        expected = psi(reference.counts, reference.count(frame[column]))
        assert found[column] == pytest.approx(expected, rel=1e-6), column
    assert found["distance"] > 1 > 0.25 > found["wind"] >= 0
    probabilities = model.compute_rows(model.contract.reader.check(shifted)).answer().probabilities
    values = model.baseline.prediction_values([0] * 100, probabilities)
    expected = psi(model.baseline.prediction.counts, model.baseline.prediction.count(values))
    assert of_predictions["metric"] == {"model": model.tag}
    assert float(of_predictions["value"][1]) == pytest.approx(expected, rel=1e-6)


def query(address: str, expression: str) -> list[dict[str, Any]]:
    """The instant vector of a PromQL expression; empty while nobody answers."""
    try:
        answer = web.post(f"http://{address}/api/v1/query", data={"query": expression})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []  # it is starting
    assert answer.status_code == 200, answer.text
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result


def value(vector: list[dict[str, Any]]) -> float:
    return float(vector[0]["value"][1]) if vector else math.nan
