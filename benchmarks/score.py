"""How long does it take to score 1,000,000 flights, and how much memory? By pandas, and by `nbprod score`.

The model is the template's, trained here; the flights are those of a year, repeated. `nbprod score` is
compared with the straightforward script: it reads the table, calls `predict` and `predict_proba`, and writes
the same columns, Parquet in and Parquet out, with all cores for scikit-learn. The two take turns, each in
processes of its own, and must agree. Memory is the largest sum of the proportional set sizes (PSS) of all
processes of a side, sampled: memory that they share is counted once.

The last line is JSON: `speed` is pandas' time by ours, `memory` our peak by pandas', and `memory_10x` our
peak on 10,000,000 flights by that on 1,000,000.

    python benchmarks/score.py [rounds]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter

import psutil

ROWS = 1_000_000
GOALS = {"speed": 1.5, "memory": 0.5, "memory_10x": 1.1}
NBPROD = str(Path(sys.executable).with_name("nbprod"))

PREPARE = f"""
import joblib, nbprod
import pandas as pd, pyarrow as pa, pyarrow.parquet as pq
from flights.features import flights

joblib.dump(nbprod.load_model("arrival_delay:latest").pipeline, "model.joblib")
year = flights(range(1, 13))
table = pd.concat([year] * ({ROWS} // len(year) + 1), ignore_index=True).head({ROWS})
table.insert(0, "flight_id", range({ROWS}))
table.to_parquet("in.parquet", index=False)
arrow = pa.Table.from_pandas(table, preserve_index=False)
with pq.ParquetWriter("in_10x.parquet", arrow.schema) as writer:
    for _ in range(10):
        writer.write_table(arrow)
"""
BY_PANDAS = """
import joblib
import pandas as pd

pipeline = joblib.load("model.joblib")
flights = pd.read_parquet("in.parquet")
kept = ["flight_id", "arr_delay"]
inputs = flights.drop(columns=kept)
output = flights[kept].copy()
output["prediction"] = pipeline.predict(inputs)
chances = pipeline.predict_proba(inputs)
for position, label in enumerate(pipeline.classes_):
    output[f"probability_{label}"] = chances[:, position]
output.to_parquet("by_pandas.parquet", index=False)
"""
COMPARE = """
import pandas as pd

one, other = pd.read_parquet("by_pandas.parquet"), pd.read_parquet("by_nbprod.parquet")
assert list(one.columns) == list(other.columns), (one.columns, other.columns)
assert (one[["flight_id", "prediction"]] == other[["flight_id", "prediction"]]).all(axis=None)
assert (one - other)[["probability_0", "probability_1"]].abs().max(axis=None) < 1e-6
"""


def pss(process: psutil.Process) -> int:
    """The proportional set size of a process and all below it, in bytes."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
    return total


def measured(folder: Path, *command: str) -> tuple[float, float]:
    """The seconds that a command takes in `folder`, and its peak of memory in MB."""
    start = perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ended, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.03):
            try:
                peak = max(peak, pss(psutil.Process(process.pid)))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    took = perf_counter() - start
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    return took, peak / 1e6


def execute(folder: Path, *command: str) -> None:
    """Execute a command in `folder`; it has to succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def main() -> None:
    """Make model and tables, measure, print one line a round, then the result."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for name in [name for name in os.environ if name.startswith("NBPROD_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as name:
        project = Path(name) / "flights"
        os.environ |= {
            "BENTOML_HOME": f"{name}/bentoml",
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONPATH": str(project),
        }
        execute(Path(name), NBPROD, "new", "flights")
        execute(project, NBPROD, "run", "nbs/10_train.ipynb")
        execute(project, sys.executable, "-c", PREPARE)
        score = [NBPROD, "score", "arrival_delay:latest", "in.parquet", "by_nbprod.parquet", "--force"]
        ways = {"pandas": [sys.executable, "-c", BY_PANDAS], "nbprod": score}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1, rounds + 1):
            for way, command in ways.items():
                took, peak = measured(project, *command)
                seconds[way].append(took)
                peaks[way].append(peak)
            told = (f"{way} {seconds[way][-1]:.2f} s, {peaks[way][-1]:.0f} MB" for way in ways)
            print(f"round {number}:", "; ".join(told), flush=True)
        execute(project, sys.executable, "-c", COMPARE)
        took, largest = measured(project, *score[:3], "in_10x.parquet", "by_nbprod_10x.parquet")
        print(f"ten times as many by nbprod: {took:.2f} s, {largest:.0f} MB")
    result = {
        "speed": round(statistics.median(seconds["pandas"]) / statistics.median(seconds["nbprod"]), 2),
        "memory": round(statistics.median(peaks["nbprod"]) / statistics.median(peaks["pandas"]), 2),
        "memory_10x": round(largest / statistics.median(peaks["nbprod"]), 2),
        "goals": GOALS,
        "seconds": {way: round(statistics.median(took), 2) for way, took in seconds.items()},
        "seconds_10x": round(took, 2),
        "megabytes": {way: round(statistics.median(peak)) for way, peak in peaks.items()},
        "rows_a_second": round(ROWS / statistics.median(seconds["nbprod"])),
        "rounds": rounds,
    }
    print(json.dumps({"benchmark": "score", **result}))


if __name__ == "__main__":
    main()
