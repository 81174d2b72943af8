"""How many requests a second does a service answer? nbprod's, with all that it does, beside four others.

Two models: a logistic regression that compiles wholly, and the flights of the template, whose first step is a
feature function in Python. Each is served by one process of

    bentoml       a plain BentoML service that makes a DataFrame of the rows and asks the pipeline
    fastapi       FastAPI with a class for a row, a DataFrame and the pipeline
    fastapi_fast  the same with nbprod's predictor in the place of the pipeline
    raw           uvicorn with that predictor and nothing else: no checks, no log, no metrics
    nbprod        the service of `nbprod build`: validation, prediction log, metrics, ids

All run at once, and wrk asks one after the other in each round, with 1, 16 and 64 connections, for 1 and for
100 rows. The last line is JSON: for each model and number of connections, how many times as many requests of
one row nbprod answers (the median of the rounds).

    python benchmarks/serving.py [rounds] [seconds of one measurement]
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from predict import trained_project

CLIENTS = (1, 16, 64)
SIZES = (1, 100)
OTHERS = ("bentoml", "fastapi", "fastapi_fast", "raw")
GOALS = {
    ("logistic", "vs_bentoml"): 25.0,
    ("logistic", "vs_fastapi_fast"): 2.0,
    ("logistic", "vs_raw"): 0.5,
    ("flights", "vs_bentoml"): 5.0,
}

BENTOML = """
import os
import bentoml
import pandas as pd
from nbprod.model.store import load

@bentoml.service
class Plain:
    def __init__(self) -> None:
        self.pipeline = load(os.environ["MODEL"]).pipeline

    @bentoml.api
    def predict(self, rows: list[dict]) -> dict:
        found = self.pipeline.predict_proba(pd.DataFrame(rows))
        return {"predictions": found.argmax(axis=1).tolist(), "probabilities": found.tolist()}
"""

FASTAPI = """
import os
from typing import Any
import pandas as pd
from fastapi import FastAPI
from pydantic import create_model
from nbprod.model.store import load

model = load(os.environ["MODEL"])
kinds = {"int": int, "float": float, "string": str, "bool": bool}
fields = {each.name: (kinds[each.type] | None if each.nullable else kinds[each.type], ...)
          for each in model.contract.columns}
Row = create_model("Row", **fields)
Request = create_model("Request", rows=(list[Row], ...))
app = FastAPI()
"""

FASTAPI_PANDAS = f"""{FASTAPI}
pipeline = model.pipeline

@app.post("/predict")
def predict(request: Request) -> dict[str, Any]:
    found = pipeline.predict_proba(pd.DataFrame([row.model_dump() for row in request.rows]))
    return {{"predictions": found.argmax(axis=1).tolist(), "probabilities": found.tolist()}}
"""

FASTAPI_FAST = f"""{FASTAPI}
predictor = model.predictor

@app.post("/predict")
def predict(request: Request) -> dict[str, Any]:
    found = predictor.compute_rows([row.model_dump() for row in request.rows])
    return {{"predictions": found.predictions.tolist(), "probabilities": found.probabilities.tolist()}}
"""

RAW = """
import os
import orjson
from nbprod.model.store import load

predictor = load(os.environ["MODEL"]).predictor
KIND = (b"content-type", b"application/json")

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            message = await receive()
            await send({"type": message["type"] + ".complete"})
        return
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    found = predictor.compute_rows(orjson.loads(b"".join(chunks))["rows"])
    answer = {"predictions": found.predictions.tolist(), "probabilities": found.probabilities.tolist()}
    body = orjson.dumps(answer)
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [KIND, length]})
    await send({"type": "http.response.body", "body": body})
"""

SOURCES = {"bentoml": BENTOML, "fastapi": FASTAPI_PANDAS, "fastapi_fast": FASTAPI_FAST, "raw": RAW}


class Figures(NamedTuple):
    """What wrk saw in one measurement."""

    rate: float  # requests a second
    p99: float  # milliseconds


def commands(folder: Path, tag: str, port: int, name: str) -> list[str]:
    """The command that serves `tag` in the way `name`."""
    programs, place = Path(sys.executable).parent, ["--host", "127.0.0.1", "--port", str(port)]
    if name == "nbprod":
        return [str(programs / "bentoml"), "serve", tag, *place]
    (folder / f"{name}_app.py").write_text(SOURCES[name])
    if name == "bentoml":
        return [str(programs / "bentoml"), "serve", "bentoml_app:Plain", *place]
    quiet = ["--no-access-log"] if name == "raw" else []
    return [str(programs / "uvicorn"), f"{name}_app:app", *quiet, *place]


@contextmanager
def served(folder: Path, tag: str, name: str, example: bytes) -> Iterator[str]:
    """The URL of a running service, which has answered."""
    from nbprod.serve.process import free_port

    port = free_port()
    environ = os.environ | {
        "MODEL": tag,
        "BENTOML_DO_NOT_TRACK": "True",
        "NBPROD_STORE": str(folder / "store"),
    }
    environ["PYTHONPATH"] = f"{folder}{os.pathsep}{Path.cwd()}"
    with (folder / f"{name}.log").open("wb") as log:
        command = commands(folder, tag, port, name)
        process = psutil.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/predict"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(
                    urllib.request.Request(url, example, {"Content-Type": "application/json"})
                )
                break
            except OSError as error:
                if hasattr(error, "read"):
                    raise SystemExit(f"{name}: {error} {error.read()[:500]!r}") from error
                time.sleep(0.1)
        else:
            raise SystemExit(f"{name} did not start: {(folder / f'{name}.log').read_text()[-2000:]}")
        yield url
    finally:
        for each in [*process.children(recursive=True), process]:
            each.kill()
        process.wait()


def ask(url: str, script: Path, clients: int, seconds: float) -> Figures:
    """What wrk measures."""
    options = ["-t1", f"-c{clients}", f"-d{seconds:g}s", "--latency", "-s", str(script)]
    done = subprocess.run(["wrk", *options, url], capture_output=True, text=True, check=True)
    # Where many wait for a slow service, some wait longer than wrk does; they are in its 99th percentile.
    if "Non-2xx" in done.stdout or re.search("Socket errors: connect [1-9]", done.stdout):
        raise SystemExit(f"{url} with {clients} clients: {done.stdout}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    last = re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout)
    assert rate and last, done.stdout
    return Figures(float(rate[1]), float(last[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[last[2]])


def write_script(folder: Path, rows: list[dict[str, Any]], size: int) -> Path:
    """A script for wrk that posts `size` rows."""
    path = folder / f"rows-{size}.lua"
    body = json.dumps({"rows": rows[:size]})
    path.write_text(
        f'wrk.method = "POST"\nwrk.body = [==[{body}]==]\nwrk.headers["Content-Type"] = "application/json"\n'
    )
    return path


def measure(name: str, tag: str, rows: list[dict[str, Any]], rounds: int, seconds: float) -> dict[str, Any]:
    """The ratios of one model by the number of clients; prints a line for each measurement."""
    folder = Path(f"serving-{name}").resolve()
    folder.mkdir()
    result: dict[str, Any] = {}
    with ExitStack() as stack:
        first = json.dumps({"rows": rows[:1]}).encode()
        urls = {each: stack.enter_context(served(folder, tag, each, first)) for each in (*OTHERS, "nbprod")}
        for size in SIZES:
            script = write_script(folder, rows, size)
            for url in urls.values():
                ask(url, script, 4, 1)  # warms up
            for clients in CLIENTS:
                found: dict[str, list[Figures]] = {each: [] for each in urls}
                for _ in range(rounds if size == 1 else 1):
                    for each, url in urls.items():
                        found[each].append(ask(url, script, clients, seconds))
                rates = {each: statistics.median(one.rate for one in found[each]) for each in urls}
                late = {each: statistics.median(one.p99 for one in found[each]) for each in urls}
                shown = "  ".join(f"{each} {rates[each]:.0f}/s p99 {late[each]:.2f} ms" for each in urls)
                print(f"{name} {size:3} rows {clients:2} clients: {shown}", flush=True)
                if size == 1:
                    ratios = {
                        f"vs_{each}": statistics.median(
                            ours.rate / theirs.rate
                            for ours, theirs in zip(found["nbprod"], found[each], strict=True)
                        )
                        for each in OTHERS
                    }
                    result[str(clients)] = {key: round(value, 2) for key, value in ratios.items()}
                    for other in ("fastapi", "fastapi_fast"):
                        if late["nbprod"] > late[other]:
                            print(
                                f"  p99 {late['nbprod']:.2f} ms, {other}'s {late[other]:.2f} ms", flush=True
                            )
    return result


def main(rounds: int = 3, seconds: float = 4) -> None:
    """Train, build, serve, measure, print."""
    if shutil.which("wrk") is None:
        raise SystemExit("This needs wrk: apt-get install wrk.")
    with trained_project():
        from flights.features import INPUTS, flights

        from nbprod.model.contract import plain_rows
        from nbprod.model.store import load
        from nbprod.serve.bento import build

        table = flights([2])[INPUTS].head(max(SIZES))
        result = {}
        for name, model in (("logistic", "logistic:latest"), ("flights", "arrival_delay:latest")):
            tag = build(model).bento
            result[name] = measure(name, tag, plain_rows(load(tag).contract, table), rounds, seconds)
    for (name, key), goal in GOALS.items():
        for clients, found in result[name].items():
            if found[key] < goal:
                print(f"missed: {name} with {clients} clients, {key} is {found[key]}, not {goal}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:]))
