"""The short way from bytes to bytes: the same answers as the long one, and nothing imported for it."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from modelling import encoder, flights, late, logged
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

from nbprod.model.contract import plain_rows
from nbprod.model.store import Model
from nbprod.serve.bento import build
from nbprod.serve.process import start_service
from nbprod.serve.requirements import requirements
from nbprod.settings import load_settings

# Sees what a service has imported after it was asked, and what it says to a request; without nbprod's routes
# if the last argument says so.
ASK = """
import asyncio, json, sys
from nbprod.serve.service import create_service

tag, body, way = sys.argv[1], sys.argv[2].encode(), sys.argv[3]
service = create_service(tag)
if way == "ordinary":
    service.middlewares.clear()
application = service.to_asgi()
scope = {
    "type": "http", "asgi": {}, "http_version": "1.1", "method": "POST", "scheme": "http", "root_path": "",
    "path": "/predict", "raw_path": b"/predict", "query_string": b"",
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
    "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
}

async def main():
    async with application.router.lifespan_context(application):
        told = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            told.append(message)

        await application(scope, receive, send)
        await asyncio.sleep(0.5)  # the log writes
        return told[0]["status"], json.loads(told[1]["body"])

status, answer = asyncio.run(main())
print(json.dumps([status, answer, sorted(sys.modules)]))
"""

# A plain BentoML service of the same model, as its documentation writes one.
PLAIN = """
import bentoml
import pandas as pd
from nbprod.model.store import load

@bentoml.service
class Plain:
    def __init__(self) -> None:
        self.pipeline = load({tag!r}).pipeline

    @bentoml.api
    def predict(self, rows: list[dict]) -> list[float]:
        return self.pipeline.predict_proba(pd.DataFrame(rows))[:, 1].tolist()
"""
NEVER = {"papermill", "nbconvert", "nbclient", "nbformat", "IPython", "ipykernel", "matplotlib", "skl2onnx"}
PYTHON = {"pandas", "scipy", "sklearn", "skops"}


def logistic() -> Model:
    """A model that compiles wholly."""
    model = logged(make_pipeline(encoder(), LogisticRegression()).fit(flights, late), flights, late)
    assert model.verdict["compiled"] == "whole"
    return model


def in_python() -> Model:
    """A regression that does not compile, with answers that tell rows apart."""
    miles = flights["distance"].astype(float)
    letters = make_column_transformer(
        (CountVectorizer(analyzer="char"), "carrier"), (SimpleImputer(), ["wind", "distance"])
    )
    model = logged(make_pipeline(letters, LinearRegression()).fit(flights, miles))
    assert model.predictor is None or not model.predictor.takes_rows
    return model


def asked(model: Model, way: str = "short") -> tuple[int, dict[str, Any], set[str]]:
    """The status, the answer and the modules of a process that serves `model` and was asked its examples."""
    program = [sys.executable, "-c", ASK, model.tag, json.dumps({"rows": model.examples["rows"]}), way]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status, answer, modules = json.loads(done.stdout.splitlines()[-1])
    return status, answer, {name.partition(".")[0] for name in modules}


@pytest.mark.usefixtures("store")
def test_a_compiled_model_is_served_without_pandas_and_scikit_learn() -> None:
    model = logistic()
    status, answer, modules = asked(model)
    assert status == 200 and answer["predictions"] == model.examples["predictions"]
    assert modules.isdisjoint(NEVER | PYTHON), sorted(modules & (NEVER | PYTHON))
    names = {each.split("==")[0] for each in requirements(model)}
    assert names.isdisjoint({"pandas", "scipy", "scikit-learn", "skops"}) and "onnxruntime" in names


@pytest.mark.usefixtures("store")
def test_a_model_in_python_is_served_without_notebook_libraries() -> None:
    model = in_python()
    status, answer, modules = asked(model)
    assert status == 200 and answer["predictions"] == pytest.approx(model.examples["predictions"])
    assert modules.isdisjoint(NEVER)


def _worker(process: psutil.Process) -> psutil.Process:
    """The process that answers: the one of the family with most memory."""
    family = [process, *process.children(recursive=True)]
    return max(family, key=lambda each: each.memory_info().rss)


@pytest.mark.usefixtures("store")
def test_start_and_memory_beside_plain_bentoml(tmp_path: Path, free_port: Any) -> None:
    """Prints the figures; asserts only which one is larger in memory, by far."""
    model = logistic()
    tag = build(model.tag).bento
    (tmp_path / "plain.py").write_text(PLAIN.format(tag=model.tag))
    found: dict[str, tuple[float, float]] = {}
    for name, bento in (("plain BentoML", "plain:Plain"), ("nbprod", tag)):
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "bentoml",
            "serve",
            bento,
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        environ = os.environ | {"NBPROD_STORE": str(tmp_path / "store")}
        start = time.perf_counter()
        process = psutil.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                while True:
                    try:
                        if client.post("/predict", json={"rows": model.examples["rows"]}).status_code == 200:
                            break
                    except httpx.TransportError:
                        assert process.poll() is None
                        time.sleep(0.02)
            seconds = time.perf_counter() - start
            found[name] = seconds, _worker(process).memory_info().rss / 1e6
        finally:
            for each in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):  # gone with the one before
                    each.kill()
            process.wait()
    for name, (seconds, megabytes) in found.items():
        print(f"{name}: {seconds:.1f} s to the first answer, {megabytes:.0f} MB")
    assert found["nbprod"][1] < found["plain BentoML"][1]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("kind", ["compiled", "python"])
def test_both_ways_answer_the_same(kind: str) -> None:
    """The middleware, and the method that BentoML calls where there is none."""
    model = logistic() if kind == "compiled" else in_python()
    answers = []
    for way in ("short", "ordinary"):
        status, answer, _ = asked(model, way)
        assert status == 200, answer
        answers.append({name: value for name, value in answer.items() if name != "ids" and value is not None})
    assert answers[0] == answers[1]
    assert answers[0]["predictions"] == pytest.approx(model.examples["predictions"])


@pytest.mark.usefixtures("store")
def test_batched_callers_get_their_own_answers(tmp_path: Path) -> None:
    """16 at once, of a model in Python, with rows that tell them apart."""
    model = in_python()
    expected = model.pipeline.predict(flights)
    rows = plain_rows(model.contract, flights)
    settings = replace(load_settings(), store=tmp_path / "store")
    with start_service(build(model.tag).bento, settings=settings) as url:

        def ask(caller: int) -> None:
            generator = np.random.default_rng(caller)
            with httpx.Client(base_url=url, timeout=30) as client:
                for _ in range(25):
                    picked = generator.integers(0, len(rows), generator.integers(1, 40)).tolist()
                    answer = client.post("/predict", json={"rows": [rows[each] for each in picked]})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["predictions"] == pytest.approx(expected[picked])

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(16)))
        metrics = httpx.get(f"{url}/metrics").text
        print(*[each for each in metrics.splitlines() if "adaptive" in each][:5], sep="\n")
        assert httpx.post(f"{url}/compute_held", json={"places": [[0, 0]]}).status_code == 404
    sizes = {
        line.split(" ")[0].partition("{")[0]: float(line.split(" ")[1])
        for line in metrics.splitlines()
        if line.startswith("bentoml_service_adaptive_batch_size_") and "_bucket" not in line
    }
    batches, requests = sizes["bentoml_service_adaptive_batch_size_count"], 16 * 25
    assert sizes["bentoml_service_adaptive_batch_size_sum"] == requests and batches < requests, sizes


@pytest.mark.usefixtures("store")
def test_too_many_rows_are_refused(tmp_path: Path) -> None:
    model = logistic()
    settings = replace(load_settings(), store=tmp_path / "store", max_rows=5)
    with start_service(build(model.tag).bento, settings=settings) as url:
        (row,) = model.examples["rows"][:1]
        assert httpx.post(f"{url}/predict", json={"rows": [row] * 5}).status_code == 200
        refused = httpx.post(f"{url}/predict", json={"rows": [row] * 6})
        metrics = httpx.get(f"{url}/metrics").text
    assert refused.status_code == 413
    assert refused.json()["error"] == "The request has 6 rows; send at most 5 at once."
    (counted,) = [
        line
        for line in metrics.splitlines()
        if line.startswith("bentoml_service_request_total") and "413" in line
    ]
    assert 'endpoint="/predict"' in counted and counted.endswith(" 1.0"), "BentoML measures it"
