"""The service of a model over HTTP: answers, refusals, logs, metrics; and what a kill leaves behind."""

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from nbprod.errors import ServeError, UsageError
from nbprod.files import is_held
from nbprod.model.artifact import stage
from nbprod.model.contract import plain_rows
from nbprod.model.store import Model, commit, load
from nbprod.serve.bento import BuiltBento, build, find_bento, serve
from nbprod.serve.image import containerize
from nbprod.serve.prediction_log import feedback, predictions
from nbprod.serve.process import start_bentoml, start_service
from nbprod.settings import Settings, load_settings

FEATURES = '''"""Features of the tests' model."""

import pandas as pd


def fill(frame: pd.DataFrame) -> pd.DataFrame:
    """Missing numbers are zero."""
    return frame.fillna(0.0)
'''


def make_flights(rows: int, seed: int) -> pd.DataFrame:
    """Flights with a text, a whole number, a number with nulls, a truth value and a time."""
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "carrier": generator.choice(["AA", "B6", "UA"], rows),
            "distance": generator.integers(80, 5000, rows),
            "wind_speed": np.where(generator.random(rows) < 0.1, np.nan, generator.gamma(4, 2.5, rows)),
            "weekend": generator.random(rows) < 2 / 7,
            "scheduled": pd.Timestamp("2013-01-01", tz="UTC")
            + pd.to_timedelta(generator.integers(0, 90, rows), "D"),
        }
    )


@pytest.fixture(scope="session")
def flights_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A project with an exported library that the model uses; importable while the session lasts."""
    root = tmp_path_factory.mktemp("flights_project")
    (root / "settings.ini").write_text("[DEFAULT]\nlib_name = delays_library\n\n[nbprod]\n", encoding="utf-8")
    (root / "delays_library").mkdir()
    (root / "delays_library" / "__init__.py").touch()
    (root / "delays_library" / "features.py").write_text(FEATURES, encoding="utf-8")
    sys.path.insert(0, str(root))
    yield load_settings(root)
    sys.path.remove(str(root))


def make_pipeline_of_library() -> Any:
    """A pipeline with a step from the project's library."""
    from delays_library.features import fill

    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["carrier"]),
        (FunctionTransformer(fill), ["distance", "wind_speed"]),
        ("passthrough", ["weekend"]),
    )
    return make_pipeline(columns, LogisticRegression(max_iter=2000))


def log_version(version: str, settings: Settings, folder: Path) -> Model:
    """A version of the model `delays` as a succeeded run leaves it: with notebook, run and lineage."""
    flights = make_flights(400, seed=0)
    late = (flights["wind_speed"].fillna(0) + np.random.default_rng(1).normal(0, 4, 400) > 13).astype(int)
    tag = f"delays:{version}"
    folder.mkdir()
    stage(folder, tag, make_pipeline_of_library().fit(flights, late), flights, late, settings=settings)
    facts = json.loads((folder / "facts.json").read_text())
    run = {"run": version, "metrics": {"auc": 0.77}, "lineage": {"commit": "4be1c0ffee", "dirty": False}}
    (folder / "facts.json").write_text(json.dumps(facts | run))
    outputs = [
        new_output("display_data", data={"text/html": "<b onclick='x()'>0.77</b><script>x()</script>"})
    ]
    cells = [new_markdown_cell("# Training of delays"), new_code_cell("auc", outputs=outputs)]
    (folder / "notebook.ipynb").write_text(json.dumps(new_notebook(cells=cells)))
    commit(folder, tag, labels={"run": version})
    return load(tag)


@pytest.fixture(scope="session")
def model(flights_project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return log_version("20261122-090312-3f9a", flights_project, tmp_path_factory.mktemp("model") / "staged")


@pytest.fixture(scope="session")
def built(model: Model, flights_project: Settings) -> BuiltBento:
    return build(model.tag, settings=flights_project)


@pytest.fixture(scope="session")
def url(built: BuiltBento, flights_project: Settings) -> Iterator[str]:
    """A service with two workers that most tests share."""
    with start_service(built.bento, workers=2, settings=flights_project) as url:
        yield url


@pytest.fixture(scope="session")
def rows(model: Model) -> list[dict[str, Any]]:
    """Rows that the model has not seen, as JSON."""
    return plain_rows(model.contract, make_flights(200, seed=7))


@pytest.fixture
def own_store(flights_project: Settings, tmp_path: Path) -> Settings:
    """The project's settings with a store of the test's own."""
    return replace(flights_project, store=tmp_path / "store")


# One client for all requests, since making one takes longer than most answers; each has its own connection.
web = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


@pytest.fixture(scope="session", autouse=True)
def close_client() -> Iterator[None]:
    yield
    web.close()


def ask(url: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    response = web.post(f"{url}/predict", json={"rows": rows})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def samples(url: str) -> dict[str, float]:
    """The scraped samples: name with labels → value."""
    lines = web.get(f"{url}/metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


def workers_of(url: str) -> list[psutil.Process]:
    """The worker processes that listen at `url`."""
    port = int(url.rpartition(":")[2])
    listening = [
        process
        for process in psutil.Process().children(recursive=True)
        if any(each.laddr.port == port for each in process.net_connections() if each.laddr)
    ]
    return [process for process in listening if "_bentoml_impl.worker.service" in process.cmdline()]


# Answers


def test_answers_are_the_pipelines(url: str, model: Model, rows: list[dict[str, Any]]) -> None:
    answer = ask(url, rows)
    frame = model.contract.frame(rows)
    assert answer["predictions"] == model.pipeline.predict(frame).tolist()
    np.testing.assert_allclose(
        answer["probabilities"], model.pipeline.predict_proba(frame), rtol=0, atol=model.tolerance
    )
    assert len(set(answer["ids"])) == len(rows) and answer["model"] == model.tag


def test_every_caller_gets_its_own_answer(url: str, rows: list[dict[str, Any]]) -> None:
    alone = {json.dumps(row): ask(url, [row])["probabilities"][0] for row in rows[:20]}
    shuffled = random.Random(0).choices(rows[:20], k=200)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda row: ask(url, [row]), shuffled))
    given = np.array([answer["probabilities"][0] for answer in answers])
    # Rows that are computed together may differ in the last digit from a row that is computed alone.
    np.testing.assert_allclose(given, [alone[json.dumps(row)] for row in shuffled], rtol=1e-12)
    assert len({answer["ids"][0] for answer in answers}) == 200


CLIENT = """
import json, sys, bentoml
with bentoml.SyncHTTPClient(sys.argv[1]) as client:
    answer = client.predict(rows=json.loads(sys.argv[2]))
    told = client.feedback(feedback=[{"id": answer["ids"][0], "actual": 1}])
print(json.dumps([answer, told]))
"""


def test_bentoml_client_speaks_with_it(url: str, model: Model, rows: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-c", CLIENT, url, json.dumps(rows[:3])]
    answer, told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["predictions"] == model.pipeline.predict(model.contract.frame(rows[:3])).tolist()
    assert told == {"accepted": 1, "unknown": []}


def test_plain_bentoml_serve_answers_the_same(
    built: BuiltBento, url: str, rows: list[dict[str, Any]], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """From any folder, without a project, without nbprod's command line."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("NBPROD_")}
    command = [
        sys.executable,
        "-m",
        "bentoml",
        "serve",
        built.bento,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=log, stderr=log)
    try:
        wait_until(lambda: reachable(address))
        answer = ask(address, rows)
    finally:
        process.terminate()
        process.wait(60)
    expected = ask(url, rows)
    assert answer["predictions"] == expected["predictions"]
    assert answer["probabilities"] == expected["probabilities"]
    store = load_settings(tmp_path, required=False)
    assert predictions("delays", settings=store)["id"].tolist() == answer["ids"]


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def reachable(url: str) -> bool:
    try:
        return web.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


# Refusals

GOOD = {
    "carrier": "UA",
    "distance": 1400,
    "wind_speed": 3.5,
    "weekend": False,
    "scheduled": "2013-02-01T00:00:00+00:00",
}


def without(column: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != column}


@pytest.mark.parametrize(
    ("second", "column"),
    [
        (without("distance"), "distance"),
        (GOOD | {"colour": "red"}, "colour"),
        (GOOD | {"distance": "far"}, "distance"),
        (GOOD | {"distance": 1.5}, "distance"),
        (GOOD | {"distance": True}, "distance"),
        (GOOD | {"distance": None}, "distance"),
        (GOOD | {"distance": 2**63}, "distance"),
        (GOOD | {"wind_speed": "3.5"}, "wind_speed"),
        (GOOD | {"wind_speed": float("nan")}, "wind_speed"),
        (GOOD | {"wind_speed": float("-inf")}, "wind_speed"),
        (GOOD | {"weekend": 1}, "weekend"),
        (GOOD | {"carrier": 7}, "carrier"),
        (GOOD | {"carrier": ["UA"]}, "carrier"),
        (GOOD | {"scheduled": "tomorrow"}, "scheduled"),
        (7, None),
    ],
)
def test_a_wrong_row_is_refused_with_row_and_column(url: str, second: Any, column: str | None) -> None:
    body = json.dumps({"rows": [GOOD, second]})
    response = web.post(f"{url}/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    (finding,) = response.json()["detail"]
    assert (finding["row"], finding["column"]) == (1, column)
    assert "row 1" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{rows}",
        b'{"rows": [',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"null",
        b"[]",
        b"{}",
        b'{"rows": []}',
        b'{"rows": {}}',
        b'{"rows": null}',
        b'{"row": [{}]}',
        b'{"rows": [{}], "more": 1}',
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/feedback"])
def test_what_is_no_request_is_refused_in_json(url: str, path: str, body: bytes) -> None:
    response = web.post(f"{url}{path}", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"] and isinstance(response.json()["detail"], list)
    assert len(response.content) < 5000


def test_a_number_too_large_for_a_float_is_named(url: str) -> None:
    body = json.dumps({"rows": [GOOD]}).replace("3.5", "1e999")
    response = web.post(f"{url}/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["detail"][0]["column"] == "wind_speed"


def test_headers_methods_and_paths(url: str) -> None:
    json_type = {"content-type": "application/json"}
    form = web.post(f"{url}/predict", data={"rows": "1"})
    packed = web.post(f"{url}/predict", content=b"x", headers=json_type | {"content-encoding": "br"})
    wrong_method = web.get(f"{url}/predict")
    wrong_method_of_bentoml = web.post(f"{url}/livez")
    unknown = web.post(f"{url}/prediction", json={})
    assert (form.status_code, packed.status_code, unknown.status_code) == (415, 415, 404)
    assert wrong_method.status_code == 405 and wrong_method.headers["allow"] == "POST"
    assert wrong_method_of_bentoml.status_code == 405 and "GET" in wrong_method_of_bentoml.headers["allow"]
    for response in (form, packed, wrong_method, wrong_method_of_bentoml, unknown):
        assert response.headers["content-type"] == "application/json"
        assert sorted(response.json()) == ["detail", "error"]


def test_a_body_without_a_type_is_taken_as_json(url: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("POST", "/predict", body=json.dumps({"rows": [GOOD]}))
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(url: str, chunked: bool) -> None:
    """The client, which sends all of it before it reads, gets the answer."""
    chunk = b" " * 1024 * 1024
    body = (chunk for _ in range(12)) if chunked else chunk * 12
    response = web.post(f"{url}/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert "10485760" in response.json()["error"]
    assert ask(url, [GOOD])["predictions"], "and the service goes on"


def test_a_body_just_below_the_limit_is_read(url: str) -> None:
    body = json.dumps({"rows": [GOOD]}).encode()
    padded = body + b" " * (10 * 1024 * 1024 - len(body))
    response = web.post(f"{url}/predict", content=padded, headers={"content-type": "application/json"})
    assert response.status_code == 200


# Outcomes


def test_feedback(url: str, rows: list[dict[str, Any]]) -> None:
    ids = ask(url, rows[:2])["ids"]
    told = [{"id": ids[0], "actual": True}, {"id": "0" * 32, "actual": 1}, {"id": ids[1], "actual": 0}]
    response = web.post(f"{url}/feedback", json={"feedback": told})
    assert response.json() == {"accepted": 2, "unknown": ["0" * 32]}


@pytest.mark.parametrize(
    ("outcome", "column"),
    [
        ({"id": "a", "actual": 2}, "actual"),
        ({"id": "a", "actual": None}, "actual"),
        ({"id": "a", "actual": "1"}, "actual"),
        ({"id": 7, "actual": 1}, "id"),
        ({"id": "a"}, None),
        ("a", None),
    ],
)
def test_a_wrong_outcome_is_refused_with_its_place(url: str, outcome: Any, column: str | None) -> None:
    response = web.post(f"{url}/feedback", json={"feedback": [outcome]})
    assert response.status_code == 400
    assert (response.json()["detail"][0]["row"], response.json()["detail"][0]["column"]) == (0, column)


# What is known about the model


def test_model_and_its_notebook(url: str, model: Model) -> None:
    facts = web.get(f"{url}/model").json()
    assert facts["model"] == model.tag and facts["run"] == "20261122-090312-3f9a"
    assert facts["metrics"] == {"auc": 0.77} and facts["lineage"]["commit"] == "4be1c0ffee"
    assert facts["baseline"]["prediction"]["labels"] and facts["classes"] == [0, 1]
    assert [column["name"] for column in facts["contract"]["columns"]] == list(GOOD)
    page = web.get(f"{url}/notebook")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "Training of delays" in page.text and "<script" not in page.text and "onclick" not in page.text


def test_openapi_describes_every_route(url: str) -> None:
    document = web.get(f"{url}/docs.json").json()
    routes = {"/predict", "/feedback", "/model", "/notebook", "/docs.json", "/docs", "/schema.json"}
    ours = {path for path in document["paths"] if not path.startswith("/v2")}
    assert ours == routes | {"/livez", "/readyz", "/healthz", "/metrics"}
    assert len(document["paths"]) - len(ours) == 9, "those of the Open Inference Protocol"
    for path, item in document["paths"].items():
        if "get" in item:
            assert web.get(f"{url}{path}").status_code == 200, path
        else:
            content = item["post"]["requestBody"]["content"]["application/json"]
            assert web.post(f"{url}{path}", json=content["example"]).status_code == 200, path


# Logs


def test_after_a_graceful_stop_every_answered_row_is_logged_once(
    built: BuiltBento, own_store: Settings, rows: list[dict[str, Any]]
) -> None:
    """Requests are in flight when the service is stopped; what was answered is in the log, exactly once."""
    answered: list[tuple[str, Any]] = []
    stopping = threading.Event()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(timeout=60) as session:
            while not stopping.is_set():
                sample = chance.sample(rows, chance.randint(1, 20))
                try:
                    answer = session.post(f"{url}/predict", json={"rows": sample}).json()
                except httpx.TransportError:
                    return
                answered.extend(zip(answer["ids"], answer["predictions"], strict=True))

    with start_service(built.bento, workers=2, settings=own_store) as url:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) >= 1000)
        told = [{"id": id, "actual": prediction} for id, prediction in answered[:50]]
        assert web.post(f"{url}/feedback", json={"feedback": told}).json()["accepted"] == 50
        counted = sum(value for name, value in samples(url).items() if name.startswith("nbprod_rows_total"))
        assert counted <= len(answered) + 8 * 20
    stopping.set()
    for thread in threads:
        thread.join()
    logged = predictions("delays", settings=own_store)
    ids = Counter(logged["id"])
    assert len(answered) > 100
    assert {id for id, _ in answered} - set(ids) == set() and max(ids.values()) == 1
    assert dict(zip(logged["id"], logged["prediction"], strict=True)) | dict(answered) == dict(
        zip(logged["id"], logged["prediction"], strict=True)
    )
    assert len(feedback("delays", settings=own_store)) == 50


def test_a_killed_worker_is_replaced_and_its_log_stays_readable(
    built: BuiltBento, own_store: Settings, rows: list[dict[str, Any]]
) -> None:
    with start_service(built.bento, settings=own_store) as url:
        early = ask(url, rows)["ids"]
        time.sleep(0.5)
        (worker,) = workers_of(url)
        worker.kill()
        wait_until(lambda: reachable(url))
        late = ask(url, rows)["ids"]
    logged = set(predictions("delays", settings=own_store)["id"])
    assert logged == {*early, *late}, "what was answered more than 0.2 s before the kill is there"


# Metrics


def total(url: str, metric: str) -> float:
    """The sum of all series of a metric."""
    return sum(value for name, value in samples(url).items() if name.startswith(metric + "{"))


def test_metrics_of_two_workers_add_up(
    built: BuiltBento, model: Model, own_store: Settings, rows: list[dict[str, Any]]
) -> None:
    with start_service(built.bento, workers=2, settings=own_store) as url:
        before = samples(url)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda row: ask(url, [row]), rows))
        web.post(f"{url}/predict", content=b"{")
        web.post(f"{url}/feedback", json={"feedback": [{"id": answers[0]["ids"][0], "actual": 1}]})
        columns = len(model.contract.columns)  # rows and bins are counted off the request's path
        wait_until(
            lambda: (
                total(url, "nbprod_rows_total") == total(url, "nbprod_predictions_total") == len(rows)
                and total(url, "nbprod_feature_total") == len(rows) * columns
            )
        )
        after = samples(url)
        processes = {process.pid for process in workers_of(url)}
    label = f'model="{model.tag}"'
    assert before[f"nbprod_rows_total{{{label}}}"] == 0 and len(processes) == 2
    assert after[f"nbprod_rows_total{{{label}}}"] == len(rows)
    assert after[f"nbprod_feedback_total{{{label}}}"] == 1
    assert after[f'nbprod_rejected_total{{{label},reason="json"}}'] == 1
    assert after[f"nbprod_log_dropped_total{{{label}}}"] == 0
    (info,) = (name for name in after if name.startswith("nbprod_model_info{"))
    assert after[info] == 1 and all(
        each in info for each in ('commit="4be1c0ffee"', label, f'run="{model.version}"')
    )
    for column, histogram in model.baseline.features.items():
        expected = histogram.count(model.contract.frame(rows)[column])
        pattern = re.compile(rf'nbprod_feature_total{{bin="(\d+)",column="{column}",{label}}}')
        assert counts(after, pattern, len(expected)) == expected.tolist(), column
    pattern = re.compile(rf'nbprod_predictions_total{{bin="(\d+)",{label}}}')
    probabilities = [answer["probabilities"][0] for answer in answers]
    values = model.baseline.prediction_values([0] * len(rows), probabilities)
    expected = model.baseline.prediction.count(values)
    assert counts(after, pattern, len(expected)) == expected.tolist()


def counts(scraped: dict[str, float], pattern: re.Pattern[str], bins: int) -> list[int]:
    found = {
        int(match[1]): int(value) for name, value in scraped.items() if (match := pattern.fullmatch(name))
    }
    return [found.get(index, 0) for index in range(bins)]


def test_two_services_of_one_home_keep_their_own_metrics(
    built: BuiltBento, url: str, own_store: Settings, rows: list[dict[str, Any]]
) -> None:
    ask(url, rows)
    before = {name: value for name, value in samples(url).items() if name.startswith("nbprod_rows")}
    with start_service(built.bento, settings=own_store) as other:
        assert all(value == 0 for name, value in samples(other).items() if name.startswith("nbprod_rows"))
        assert {
            name: value for name, value in samples(url).items() if name.startswith("nbprod_rows")
        } == before


# Building


def test_a_bento_is_built_once_and_again_by_force(
    built: BuiltBento, model: Model, flights_project: Settings
) -> None:
    assert built.parity["equal"] and built.parity["rows"] == len(model.examples["rows"])
    made = (built.path / "bento.yaml").stat().st_mtime_ns
    assert build("delays:latest", settings=flights_project) == built
    assert (built.path / "bento.yaml").stat().st_mtime_ns == made
    assert build(model.tag, force=True, settings=flights_project).parity["equal"]
    assert (built.path / "bento.yaml").stat().st_mtime_ns > made
    assert listed() == [model.tag] and leftovers() == []


def listed() -> list[str]:
    """The Bentos of this file's model that BentoML's own command lists; others share the session's store."""
    command = [sys.executable, "-c", "import bentoml; print(*[each.tag for each in bentoml.bentos.list()])"]
    tags = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [tag for tag in tags if tag.startswith("delays:")]


def private_homes() -> list[Path]:
    return list((Path(os.environ["BENTOML_HOME"]) / "tmp").glob("nbprod-*"))


def leftovers() -> list[Path]:
    """The folders of builds and services whose process is gone."""
    return [folder for folder in private_homes() if not is_held(folder)]


def test_the_bento_brings_its_code_and_exact_versions(built: BuiltBento) -> None:
    source = built.path / "src"
    assert (source / "delays_library" / "features.py").read_text() == FEATURES
    assert (source / "nbprod" / "serve" / "service.py").exists() and not (
        source / "nbprod" / "templates"
    ).exists()
    wanted = (built.path / "env" / "python" / "requirements.txt").read_text().split()
    assert all("==" in requirement for requirement in wanted)
    names = {requirement.split("==")[0].lower() for requirement in wanted}
    assert {"bentoml", "scikit-learn", "skops", "pandas"} <= names
    assert names.isdisjoint({"papermill", "nbconvert", "jupyterlab", "nbprod"})


def test_a_served_process_imports_no_notebook_library(built: BuiltBento) -> None:
    notebook_libraries = {
        "papermill",
        "nbconvert",
        "nbclient",
        "nbformat",
        "IPython",
        "ipykernel",
        "matplotlib",
    }
    code = "import sys; sys.path.insert(0, '.'); import service; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built.path / "src", capture_output=True, text=True, check=True
    )
    assert {name.split(".")[0] for name in done.stdout.split()}.isdisjoint(notebook_libraries)


@pytest.mark.parametrize("moment", ["context/service.py", "bentos/*/*/bento.yaml", "store"])
def test_a_build_killed_at_any_moment_leaves_nothing_half_made(
    flights_project: Settings, tmp_path: Path, moment: str
) -> None:
    """Killed when a file of its next step appears: the context is written, built, checked."""
    version = f"killed-{moment.split('/')[0]}"
    model = log_version(version, flights_project, tmp_path / "staged")
    code = f"from nbprod.serve.bento import build; build('{model.tag}')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=flights_project.root, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: any(folder for parent in private_homes() for folder in parent.glob(moment)))
        process.kill()
    assert find_bento(model) is None and model.tag not in listed()
    wait_until(lambda: not orphans(version), seconds=90)
    for folder in leftovers():
        os.utime(folder, (0, 0))
    built = build(model.tag, settings=flights_project)
    assert built.parity["equal"] and model.tag in listed() and leftovers() == []
    shutil.rmtree(built.path)


def orphans(version: str) -> list[psutil.Process]:
    """Processes that serve or build a version."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(f"delays:{version}" in word for word in process.info["cmdline"] or [])
    ]


def test_a_bento_that_answers_wrongly_is_not_kept(flights_project: Settings, tmp_path: Path) -> None:
    model = log_version("wrong", flights_project, tmp_path / "staged")
    examples = json.loads((model.folder / "examples.json").read_text())
    examples["probabilities"][3] = [0.123, 0.877]
    (model.folder / "examples.json").write_text(json.dumps(examples))
    with pytest.raises(ServeError, match="golden examples"):
        build(model.tag, settings=flights_project)
    assert model.tag not in listed() and leftovers() == []
    shutil.rmtree(model.folder)


# Starting and ending


def test_a_port_in_use_is_one_clear_line(url: str, built: BuiltBento, own_store: Settings) -> None:
    port = int(url.rpartition(":")[2])
    for start in (
        lambda: serve(built.bento, port, settings=own_store),
        lambda: start_service(built.bento, port=port, settings=own_store).__enter__(),
    ):
        with pytest.raises(ServeError, match=rf"^Port {port} of 127.0.0.1 cannot be used: .*--port\.$"):
            start()


def test_a_service_that_loses_a_port_of_its_supervisor_is_started_again(
    built: BuiltBento, own_store: Settings, tmp_path: Path
) -> None:
    """BentoML lets its own two ports go before it uses them; here the first start finds one taken."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"started = {str(tmp_path / 'started')!r}\n"
        "if not os.path.exists(started):\n"
        "    open(started, 'x').close()\n"
        "    print('zmq.error.ZMQError: Address already in use (addr=...)', flush=True)\n"
        "    os._exit(1)\n"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    with start_service(built.bento, settings=own_store, environ=environ) as url:
        assert (tmp_path / "started").exists() and reachable(url)


def test_a_store_that_cannot_be_written_is_one_clear_line(built: BuiltBento, tmp_path: Path) -> None:
    (tmp_path / "occupied").touch()
    environ = os.environ | {"NBPROD_STORE": str(tmp_path / "occupied")}
    command = [sys.executable, "-m", "bentoml", "serve", built.bento, "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "NBPROD_STORE" in line]
    assert len(errors) == 1 and "Traceback" not in done.stdout + done.stderr


def test_a_service_ends_with_the_process_that_started_it(built: BuiltBento, own_store: Settings) -> None:
    code = (
        "import sys, time; from nbprod.serve.process import start_service\n"
        f"with start_service('{built.bento}') as url: print(url, flush=True); time.sleep(600)"
    )
    environ = os.environ | {"NBPROD_STORE": str(own_store.store)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        assert reachable(address)
        process.kill()
    wait_until(lambda: not reachable(address))


def test_serve_in_the_foreground_ends_on_sigterm_and_logs_all(
    built: BuiltBento, own_store: Settings, rows: list[dict[str, Any]], free_port: Callable[[], int]
) -> None:
    port = free_port()
    code = f"from nbprod.serve.bento import serve; serve('{built.bento}', {port}, 2); print('ended well')"
    environ = os.environ | {"NBPROD_STORE": str(own_store.store)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until(lambda: reachable(f"http://127.0.0.1:{port}"))
    ids = ask(f"http://127.0.0.1:{port}", rows)["ids"]
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"ended well" in printed
    assert predictions("delays", settings=own_store)["id"].tolist() == ids
    assert not reachable(f"http://127.0.0.1:{port}")


def test_a_request_in_flight_is_answered_when_the_service_stops(
    built: BuiltBento, own_store: Settings, rows: list[dict[str, Any]]
) -> None:
    many = rows * 50
    answers: list[dict[str, Any]] = []
    with start_service(built.bento, settings=own_store) as url:
        ask(url, rows)
        thread = threading.Thread(target=lambda: answers.append(ask(url, many)))
        thread.start()
        time.sleep(0.15)
    thread.join()
    assert len(answers) == 1 and len(answers[0]["ids"]) == len(many)


# Images

ENGINE = """#!{python}
import json, pathlib, shutil, sys
arguments = sys.argv[1:]
if "build" in arguments:
    pathlib.Path("{folder}/arguments.json").write_text(json.dumps(arguments))
    shutil.copytree(arguments[-1], "{folder}/context")
    pathlib.Path(arguments[arguments.index("--iidfile") + 1]).write_text("sha256:4be1c0")
elif arguments[:2] == ["image", "inspect"]:
    print(json.dumps([{{"Id": "4be1c0", "Size": 1240, "RootFS": {{"Layers": ["sha256:1", "sha256:2"]}}}}]))
"""


@pytest.mark.usefixtures("built")
def test_containerize_hands_the_bento_to_the_engine(
    model: Model,
    flights_project: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that records what BentoML asks of it: the context, the name, where the identity goes."""
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "podman"
    engine.write_text(ENGINE.format(python=sys.executable, folder=tmp_path))
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{engine.parent}{os.pathsep}{os.environ['PATH']}")
    image = containerize(model.tag, tag="localhost:5000/delays:1", engine="podman", settings=flights_project)
    assert (image.image, image.digest, image.bytes, image.layers) == (
        "localhost:5000/delays:1",
        "sha256:4be1c0",
        1240,
        2,
    )
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments[arguments.index("--tag") + 1] == "localhost:5000/delays:1"
    context = tmp_path / "context"
    assert (context / "env" / "docker" / "Dockerfile").exists() and (context / "src" / "service.py").exists()
    assert (context / "models" / "delays" / model.version / "pipeline.skops").exists()


def test_containerize_without_an_engine_says_what_to_do(
    model: Model, flights_project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServeError, match="Install podman, or start the daemon of docker"):
        containerize(model.tag, settings=flights_project)
    with pytest.raises(UsageError, match="cannot name an image"):
        containerize(model.tag, tag="Not A Name", settings=flights_project)


@pytest.mark.usefixtures("built")
def test_an_image_that_is_not_built_is_an_error(
    model: Model,
    flights_project: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "podman").write_text(
        "#!/bin/sh\ncase $1 in info) exit 0;; esac\necho 'no space left' >&2\nexit 1\n"
    )
    (tmp_path / "podman").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ServeError, match="podman could not build"):
        containerize(model.tag, engine="podman", settings=flights_project)


def test_the_guard_needs_no_service(tmp_path: Path) -> None:
    """A command that ends by itself ends as such."""
    with (tmp_path / "log").open("wb") as log:
        process = start_bentoml(["--version"], tmp_path, os.environ, log)
        assert process.wait(60) == 0
    assert process.stdin is not None
    process.stdin.close()
