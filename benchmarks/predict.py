"""What does a prediction cost? By the pandas pipeline, by nbprod's predictor, and by ONNX Runtime alone.

Two models: the flights of the template, whose first step is a feature function in Python, and a logistic
regression that compiles wholly. All start from the same decoded JSON rows and end with arrays of
probabilities; ONNX alone starts from arrays that are ready. The ways take turns in each round. The last line
is JSON: for each model and number of rows, how many times as fast as the pandas pipeline nbprod is (the
median of the rounds).

    python benchmarks/predict.py [rounds]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

SIZES = {1: 40, 100: 20, 10_000: 1}  # calls in a round, by the number of rows
GOALS = {("flights", 1): 5.0, ("logistic", 1): 50.0, ("flights", 10_000): 1.0, ("logistic", 10_000): 1.0}

LOGISTIC = """
import sys; sys.path.insert(0, ".")
import nbprod
from flights.features import CATEGORIES, INPUTS, flights, late
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
table = flights([1])
numbers = [name for name in INPUTS if name not in CATEGORIES]
scaled = make_pipeline(SimpleImputer(), StandardScaler())
known = OneHotEncoder(handle_unknown="ignore")
inputs = make_column_transformer((known, CATEGORIES), (scaled, numbers))
model = make_pipeline(inputs, LogisticRegression(max_iter=500)).fit(table[INPUTS], late(table))
nbprod.log_model(model, "logistic", inputs=table[INPUTS])
"""


@contextmanager
def trained_project() -> Iterator[Path]:
    """A new project from the template, in which both models were trained; the current folder meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["BENTOML_HOME"] = str(Path(scratch) / "bentoml")
        command = Path(sys.executable).with_name("nbprod")
        quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
        project = Path(scratch) / "flights"
        subprocess.run([command, "new", project], **quiet)
        subprocess.run([command, "run", "nbs/10_train.ipynb"], cwd=project, **quiet)
        subprocess.run([sys.executable, "-c", LOGISTIC], cwd=project, **quiet)
        os.chdir(project)
        sys.path.insert(0, str(project))
        try:
            yield project
        finally:
            os.chdir(before)


def microseconds(call: Callable[[Any], object], inputs: list[Any]) -> float:
    """The mean time of `call` on each of `inputs`, in µs."""
    start = perf_counter()
    for each in inputs:
        call(each)
    return (perf_counter() - start) / len(inputs) * 1e6


def ways(model: Any) -> dict[str, Callable[[Any], object]]:
    """How rows are answered, by name; each takes decoded rows, and `onnx` what the graph takes."""
    import pandas as pd

    pipeline, predictor = model.pipeline, model.predictor
    return {
        "pandas": lambda rows: pipeline.predict_proba(pd.DataFrame(rows)),
        "nbprod": predictor.compute_rows,
        "onnx": predictor.run,
    }


def graph_inputs(model: Any, rows: list[dict[str, Any]]) -> Any:
    """What the graph of a model takes for some rows."""
    from nbprod.model.graph import feed

    predictor, frame = model.predictor, model.contract.frame(rows)
    table = frame if predictor.before is None else predictor.before.transform(frame)
    return feed(table, predictor.plan.inputs, predictor.plan.width, predictor.plan.packed)


def measure(name: str, tag: str, rows: list[dict[str, Any]], rounds: int) -> dict[int, float]:
    """The ratios of one model by the number of rows; prints a line for each."""
    import numpy as np

    from nbprod.release.ledger import load_model

    model, result = load_model(tag), {}
    how = ways(model)
    one = model.predictor.compute_rows(rows).probabilities
    off = float(np.abs(one - model.pipeline.predict_proba(model.contract.frame(rows))).max())
    print(f"{name}: compiled {model.verdict['compiled']}, {off:.1e} off at most on {len(rows)} rows")
    for size, calls in SIZES.items():
        parts = [rows[start : start + size] for start in range(0, calls * size, size)]
        given = dict.fromkeys(how, parts) | {"onnx": [graph_inputs(model, part) for part in parts]}
        took: dict[str, list[float]] = {each: [] for each in how}
        for number in range(rounds + 1):
            for each, call in how.items():
                spent = microseconds(call, given[each])
                if number:  # the first round warms up
                    took[each].append(spent)
        ratios = [slow / fast for slow, fast in zip(took["pandas"], took["nbprod"], strict=True)]
        result[size] = round(statistics.median(ratios), 2)
        medians = "  ".join(f"{each} {statistics.median(took[each]):10.1f} µs" for each in how)
        print(
            f"  {size:6} rows  {medians}  ratio {result[size]:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    return result


def main(rounds: int = 9) -> None:
    """Train, measure, print."""
    with trained_project():
        from flights.features import INPUTS, flights

        from nbprod.model.contract import plain_rows
        from nbprod.release.ledger import load_model

        table = flights([2])[INPUTS].head(max(SIZES))
        result = {}
        for name, tag in (("flights", "arrival_delay:latest"), ("logistic", "logistic:latest")):
            # Through JSON, as a request brings them.
            rows = json.loads(json.dumps(plain_rows(load_model(tag).contract, table)))
            result[name] = measure(name, tag, rows, rounds)
    for (name, size), goal in GOALS.items():
        if result[name][size] < goal:
            print(f"missed: {name} at {size} rows is {result[name][size]} times as fast, not {goal}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
