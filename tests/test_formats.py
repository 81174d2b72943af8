"""Every form in which rows are sent gives the same answers, also for 50,000 flights by 16 clients at once."""

import gzip
import io
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest
from late_flights import Served
from running import wait_for
from test_contract_served import FLIGHTS

from nbprod.client_tables import as_table
from nbprod.model.arrow_decoder import ArrowDecoder
from nbprod.model.column_decoder import ColumnDecoder
from nbprod.model.contract import infer_contract, plain_rows
from nbprod.serve.prediction_log import predictions

ARROW = "application/vnd.apache.arrow.stream"
Answer = tuple[list[Any], list[list[float]], list[str]]  # predictions, probabilities, ids
Send = Callable[[httpx.Client, Served, pd.DataFrame], Answer]


def json_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return orjson.loads(orjson.dumps(frame.to_dict("records")))  # type: ignore[no-any-return]


def json_columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    return orjson.loads(orjson.dumps({str(name): values.tolist() for name, values in frame.items()}))  # type: ignore[no-any-return]


def stream(frame: pd.DataFrame, chunk: int | None = None, **options: Any) -> bytes:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return sink.getvalue()


def answer_of(response: httpx.Response) -> Answer:
    assert response.status_code == 200, response.text[:500]
    given = response.json()
    return given["predictions"], given["probabilities"], given["ids"]


def post(session: httpx.Client, served: Served, body: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return session.post(
        f"{served.url}/predict", content=body, headers={"content-type": "application/json"} | named
    )


def by_rows(session: httpx.Client, served: Served, frame: pd.DataFrame) -> Answer:
    return answer_of(post(session, served, orjson.dumps({"rows": json_rows(frame)})))


def by_columns(session: httpx.Client, served: Served, frame: pd.DataFrame) -> Answer:
    return answer_of(post(session, served, orjson.dumps({"columns": json_columns(frame)})))


def by_gzip(session: httpx.Client, served: Served, frame: pd.DataFrame) -> Answer:
    body = gzip.compress(orjson.dumps({"rows": json_rows(frame)}), 1)
    return answer_of(post(session, served, body, content_encoding="gzip"))


def by_arrow(session: httpx.Client, served: Served, frame: pd.DataFrame) -> Answer:
    response = post(session, served, stream(frame), content_type=ARROW, accept=ARROW)
    assert response.status_code == 200, response.text[:500]
    assert response.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(response.content).read_all()
    assert table.schema.metadata[b"model"].decode() == served.model.tag
    return table["prediction"].to_pylist(), table["probability"].to_pylist(), table["id"].to_pylist()


def tensors(served: Served, frame: pd.DataFrame) -> list[dict[str, Any]]:
    types = {"string": "BYTES", "int": "INT64", "float": "FP64"}
    columns = json_columns(frame)
    return [
        {"name": each.name, "datatype": types[each.type], "shape": [len(frame)], "data": columns[each.name]}
        for each in served.model.contract.columns
    ]


def by_tensors(session: httpx.Client, served: Served, frame: pd.DataFrame) -> Answer:
    body = orjson.dumps({"inputs": tensors(served, frame)})
    response = session.post(f"{served.url}/v2/models/late_flights/infer", content=body)
    assert response.status_code == 200, response.text[:500]
    given = {output["name"]: output for output in response.json()["outputs"]}
    probabilities = np.array(given["predict_proba"]["data"]).reshape(given["predict_proba"]["shape"])
    return given["predict"]["data"], probabilities.tolist(), given["id"]["data"]


FORMS: list[Send] = [by_rows, by_columns, by_gzip, by_arrow, by_tensors]


@pytest.fixture(scope="module")
def session() -> Any:
    with httpx.Client(timeout=60) as client:
        yield client


@pytest.mark.parametrize("send", FORMS)
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_each_form_gives_the_pipelines_answers(
    late_flights: Served, session: httpx.Client, send: Send, rows: int
) -> None:
    frame = late_flights.flights[:rows]
    given, probabilities, ids = send(session, late_flights, frame)
    assert given == late_flights.model.pipeline.predict(frame).tolist()
    expected = late_flights.model.pipeline.predict_proba(frame)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=late_flights.model.tolerance)
    assert len(set(ids)) == rows


def shares(chance: random.Random, total: int) -> list[int]:
    """Sizes of requests from 1 to 10,000 rows that make `total`; 400 are of one row."""
    sizes = [10_000, 9999, 5000, 5000] + [1] * 400
    while (left := total - sum(sizes)) > 0:
        sizes.append(min(left, chance.choice([2, 10, 33, 100, 1000, 2500])))
    chance.shuffle(sizes)
    return sizes


def test_50_000_flights_by_16_clients_in_every_form(late_flights: Served) -> None:
    """Each client gets the answers to what it sent itself, and each row is logged once."""
    flights, chance = late_flights.flights, random.Random(0)
    assert len(flights) == 50_000
    sizes = shares(chance, len(flights))
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    work = [
        (start, size, FORMS[place % len(FORMS)])
        for place, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    predicted = np.full(len(flights), -1)
    probable = np.full((len(flights), 2), np.nan)
    issued: list[str] = []
    own = threading.local()
    sessions: list[httpx.Client] = []

    def ask(task: tuple[int, int, Send]) -> None:
        start, size, send = task
        if not hasattr(own, "session"):
            own.session = httpx.Client(timeout=60)
            sessions.append(own.session)
        given, probabilities, ids = send(own.session, late_flights, flights[start : start + size])
        predicted[start : start + size] = given
        probable[start : start + size] = probabilities
        issued.extend(ids)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, work))
    for each in sessions:
        each.close()
    assert {send for *_, send in work} == set(FORMS) and {1, 10_000} <= set(sizes)
    pipeline = late_flights.model.pipeline
    np.testing.assert_allclose(
        probable, pipeline.predict_proba(flights), rtol=0, atol=late_flights.model.tolerance
    )
    assert (predicted == pipeline.predict(flights)).all()
    assert len(set(issued)) == 50_000


# What cannot be answered


def refusal(response: httpx.Response) -> tuple[int, str]:
    assert sorted(response.json()) == ["detail", "error"]
    return response.status_code, response.json()["error"]


def test_rows_or_columns_and_columns_of_one_length(late_flights: Served, session: httpx.Client) -> None:
    columns = json_columns(late_flights.flights[:3])
    wrong: list[tuple[Any, str]] = [
        ({"columns": columns, "rows": []}, "either rows or columns"),
        ({"columns": columns | {"distance": [1]}}, "column 'distance': has 1 values"),
        ({"columns": {}}, "is missing"),
        ({"columns": columns | {"colour": [1, 2, 3]}}, "column 'colour': is not a column"),
        ({"columns": columns | {"distance": [1, "far", 3]}}, "row 1, column 'distance'"),
        ({"columns": {name: [] for name in columns}}, "at least one row"),
        ({"columns": [columns]}, "an object with a list for each column"),
        ({"columns": columns | {"carrier": "UA"}}, "must be a list of values"),
    ]
    for body, words in wrong:
        status, error = refusal(post(session, late_flights, json.dumps(body).encode()))
        assert status == 400 and words in error, (body, error)
    nan = json.dumps({"columns": columns | {"dep_delay": [1.0, float("nan"), 2.0]}}).encode()
    assert "row 1, column 'dep_delay': NaN" in refusal(post(session, late_flights, nan))[1]


@pytest.mark.parametrize("form", ["rows", "columns", "arrow", "tensors"])
def test_more_rows_than_the_limit_are_refused(late_flights: Served, session: httpx.Client, form: str) -> None:
    frame = late_flights.flights[:10_001]
    if form == "arrow":
        response = post(session, late_flights, stream(frame, chunk=3000), content_type=ARROW)
    elif form == "tensors":
        body = orjson.dumps({"inputs": tensors(late_flights, frame)})
        response = session.post(f"{late_flights.url}/v2/models/late_flights/infer", content=body)
    else:
        given = json_rows(frame) if form == "rows" else json_columns(frame)
        response = post(session, late_flights, orjson.dumps({form: given}))
    status, error = refusal(response)
    assert status == 413 and "10001 rows; send at most 10000" in error


def test_gzip_that_is_damaged_or_a_bomb(late_flights: Served, session: httpx.Client) -> None:
    packed = gzip.compress(orjson.dumps({"rows": json_rows(late_flights.flights[:3])}))
    bodies = {
        "whole": (packed, 200),
        "cut off": (packed[:-5], 400),
        "followed": (packed + b"more", 400),
        "not packed": (b'{"rows": []}', 400),
        "nothing": (b"", 400),
        "bomb": (gzip.compress(bytes(200_000_000)), 413),
    }
    for name, (body, status) in bodies.items():
        response = post(session, late_flights, body, content_encoding="gzip")
        assert response.status_code == status, (name, response.text[:200])
    for encoding in ("br", "deflate", "gzip, gzip"):
        assert post(session, late_flights, packed, content_encoding=encoding).status_code == 415
    told = gzip.compress(b'{"feedback": [{"id": "a", "actual": 1}]}')
    response = session.post(
        f"{late_flights.url}/feedback", content=told, headers={"content-encoding": "gzip"}
    )
    assert response.json() == {"accepted": 0, "unknown": ["a"]}


# Arrow


def test_arrow_of_other_types_orders_and_compressions(late_flights: Served, session: httpx.Client) -> None:
    frame = late_flights.flights[:500]
    expected = by_rows(session, late_flights, frame)[0]
    narrow = frame.astype(
        {"month": "int8", "distance": "uint16", "carrier": "category", "dep_delay": "float32"}
    )
    streams = [
        stream(frame[sorted(frame.columns)]),
        stream(narrow, chunk=7),
        stream(frame, compression="zstd"),
        stream(frame, compression="lz4", chunk=100),
        stream(frame.astype({"month": float})),
    ]
    for body in streams:
        assert answer_of(post(session, late_flights, body, content_type=ARROW))[0] == expected
    packed = gzip.compress(streams[0])
    response = post(session, late_flights, packed, content_type=ARROW, content_encoding="gzip")
    assert answer_of(response)[0] == expected


def test_arrow_that_does_not_fit(late_flights: Served, session: httpx.Client) -> None:
    frame = late_flights.flights[:3]
    wrong: list[tuple[pd.DataFrame, str]] = [
        (frame.drop(columns="distance"), "column 'distance': is missing"),
        (frame.assign(colour=1), "column 'colour': is not a column of this model"),
        (frame.assign(distance="far"), "column 'distance': must be int, got"),
        (frame.assign(distance=[1.0, 2.5, 3.0]), "row 1, column 'distance': must be a whole number"),
        (frame.assign(distance=[1.0, None, 3.0]), "row 1, column 'distance': must not be null"),
        (frame.assign(dep_delay=[1.0, 2.0, float("inf")]), "row 2, column 'dep_delay': must be a finite"),
        (frame[:0], "at least one row"),
    ]
    for each, words in wrong:
        status, error = refusal(post(session, late_flights, stream(each), content_type=ARROW))
        assert status == 400 and words in error, error
    body = stream(frame)
    for damaged in (b"", body[:-8], body[: len(body) // 2], b"ARROW1" + body, b"{}", body[:400] + bytes(9)):
        status, error = refusal(post(session, late_flights, damaged, content_type=ARROW))
        assert status == 400 and "no Arrow IPC stream" in error
    zeros = pa.table({"distance": pa.array(np.zeros(5_000_000))})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, zeros.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(zeros)
    assert len(sink.getvalue()) < 100_000
    assert refusal(post(session, late_flights, sink.getvalue(), content_type=ARROW))[0] == 413
    for path in ("/feedback", "/v2/models/late_flights/infer"):
        response = session.post(late_flights.url + path, content=body, headers={"content-type": ARROW})
        assert refusal(response)[0] == 415


# The Open Inference Protocol


def test_metadata_and_health(late_flights: Served, session: httpx.Client) -> None:
    ask = lambda path: session.get(late_flights.url + path)  # noqa: E731
    assert ask("/v2").json()["name"] == "nbprod" and ask("/v2").json()["extensions"] == []
    assert ask("/v2/health/live").json() == {"live": True}
    assert ask("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/late_flights", "/v2/models/late_flights/versions/v1"):
        told = ask(path).json()
        assert told["name"] == "late_flights" and told["versions"] == ["v1"]
        assert [each["name"] for each in told["inputs"]] == late_flights.model.contract.names
        assert [each["name"] for each in told["outputs"]] == ["predict", "predict_proba", "id"]
        assert ask(f"{path}/ready").json() == {"name": "late_flights", "ready": True}
        assert ask(f"{path}/infer").status_code == 405
    for path in ("/v2/models/others", "/v2/models/late_flights/versions/v2", "/v2/models/late_flights/x"):
        assert refusal(ask(path))[0] == 404


def test_tensors_as_kserves_and_mlservers_clients_send_them(
    late_flights: Served, session: httpx.Client
) -> None:
    """MLServer's codec for pandas sends [n, 1] with content types, KServe's [n]; values may be nested."""
    frame = late_flights.flights[:2]
    flat = tensors(late_flights, frame)
    expected = by_rows(session, late_flights, frame)[0]
    columns = [
        each
        | {
            "shape": [2, 1],
            "data": [[value] for value in each["data"]],
            "parameters": {"content_type": "str"},
        }
        for each in flat
    ]
    for inputs in (flat, columns, flat[::-1]):
        request = {
            "id": "42",
            "parameters": {"content_type": "pd"},
            "inputs": inputs,
            "outputs": [{"name": "predict"}],
        }
        url = f"{late_flights.url}/v2/models/late_flights/versions/v1/infer"
        answer = session.post(url, json=request).json()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("late_flights", "v1", "42")
        (output,) = answer["outputs"]
        assert output == {"name": "predict", "datatype": "INT64", "shape": [2], "data": expected}


def test_tensors_that_do_not_fit(late_flights: Served, session: httpx.Client) -> None:
    good = tensors(late_flights, late_flights.flights[:2])
    changed = lambda **changes: [good[0] | changes, *good[1:]]  # noqa: E731
    wrong: list[tuple[Any, str]] = [
        ({}, "inputs"),
        ({"inputs": good[1:]}, "is missing"),
        ({"inputs": [*good, good[0]]}, "more than once"),
        ({"inputs": [*good, good[0] | {"name": "colour"}]}, "column 'colour'"),
        ({"inputs": changed(shape=[3])}, "its shape says 3"),
        ({"inputs": changed(shape=[1, 2])}, "must have the shape [n] or [n, 1]"),
        ({"inputs": changed(shape=[])}, "must have the shape"),
        ({"inputs": changed(datatype="FP64")}, "must be BYTES, got FP64"),
        ({"inputs": changed(data=["UA", None])}, "row 1, column 'carrier': must not be null"),
        ({"inputs": good, "outputs": [{"name": "scores"}]}, "no output 'scores'"),
        ([], "no inference request"),
    ]
    for body, words in wrong:
        response = session.post(f"{late_flights.url}/v2/models/late_flights/infer", json=body)
        status, error = refusal(response)
        assert status == 400 and words in error, error


def test_every_form_is_logged_with_the_callers_own_id(late_flights: Served, session: httpx.Client) -> None:
    """Of a request of the protocol it is the one in its body, unless the header has one."""
    frame = late_flights.flights[:1]
    url = f"{late_flights.url}/v2/models/late_flights/infer"
    request = {"id": "in-the-body", "inputs": tensors(late_flights, frame)}
    session.post(url, json=request)
    session.post(url, json=request, headers={"x-request-id": "in-the-header"})
    post(session, late_flights, stream(frame), content_type=ARROW, x_request_id="of-arrow")

    expected = {"in-the-body": 1, "in-the-header": 1, "of-arrow": 1}

    def logged() -> bool:
        found = Counter(predictions("late_flights", settings=late_flights.settings)["request"].dropna())
        return {name: found[name] for name in expected} == expected

    wait_for(logged, "the three rows to be in the log")


# Every type of column


def test_columns_of_every_type_are_read_as_rows_are() -> None:
    contract = infer_contract(FLIGHTS)
    rows = plain_rows(contract, FLIGHTS)
    expected = contract.reader.check(rows).columns
    columns = {name: [row[name] for row in rows] for name in contract.names}
    decoder = ColumnDecoder(contract.reader)
    at_once = decoder.columns(orjson.dumps({"columns": columns}))
    assert at_once is not None and at_once.columns == expected
    assert decoder.check(columns).columns == expected
    whole = as_table(FLIGHTS, contract.names).table
    assert whole is not None
    views = whole.set_column(9, "gate", whole["gate"].cast(pa.string_view()))
    texts = pa.Table.from_pylist(rows)
    for table in (whole, views, texts):
        batches = table.to_batches(max_chunksize=3)
        assert ArrowDecoder(contract.reader).check(table.schema, batches).columns == expected


LEAN = """
import sys
from nbprod.model.arrow_decoder import ArrowDecoder
from nbprod.model.contract import Contract
from nbprod.serve.answering import Answered
from nbprod.serve.arrow_stream import read_batches, write_answer
contract = Contract.from_dict(eval(sys.argv[1]))
checked = ArrowDecoder(contract.reader).check(*read_batches(sys.stdin.buffer.read(), 100, 100_000))
write_answer(Answered(["late"] * len(checked), [[0.5, 0.5]] * len(checked), ["0193"] * len(checked), "m:v1"))
print(len(checked), {"pandas", "scipy", "sklearn"} & set(sys.modules))
"""


def test_arrow_is_read_and_written_without_pandas() -> None:
    """A wholly compiled model's service has none; pyarrow would import it for many of its functions."""
    contract = infer_contract(FLIGHTS)
    table = as_table(FLIGHTS, contract.names).table
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:  # type: ignore[union-attr]
        writer.write_table(table)
    command = [sys.executable, "-c", LEAN, repr(contract.as_dict())]
    done = subprocess.run(command, input=sink.getvalue(), capture_output=True)
    assert (done.stdout, done.stderr) == (b"4 set()\n", b"")
