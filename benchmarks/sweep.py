"""How long do 20 short training notebooks take? By papermill, by `nbprod.sweep`, and as plain functions.

The four ways take turns, so that a machine that is slow for a moment is slow for all. The last line is JSON:
`vs_papermill` and `vs_papermill_2` say how many times faster than papermill in sequence and in two processes
the sweep is, `vs_plain` how many times slower than the same code as functions in two processes.

    python benchmarks/sweep.py [rounds]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

RUNS, JOBS = 20, 2
GOALS = {"vs_papermill": 12.0, "vs_papermill_2": 6.0, "vs_plain": 4.0}

PARAMETERS = "seed: int = 0\nstrength: float = 1.0"
IMPORTS = """import pandas as pd
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from nbprod.experiment.recording import log_metrics"""
TRAIN = """inputs, late = make_classification(2000, 15, random_state=seed)
flights = pd.DataFrame(inputs).assign(late=late)
train, test = train_test_split(flights, random_state=seed)
model = LogisticRegression(C=strength).fit(train.drop(columns="late"), train.late)"""
SCORE = """auc = roc_auc_score(test.late, model.predict_proba(test.drop(columns="late"))[:, 1])
log_metrics(auc=auc)
auc"""

PLAIN = f"""
import json, sys
from multiprocessing import Pool
{IMPORTS.replace("from nbprod.experiment.recording import log_metrics", "")}

def train_one(seed, strength=1.0):
{"".join(f"    {line}{chr(10)}" for line in (TRAIN + chr(10) + SCORE.splitlines()[0]).splitlines())}
    return auc

if __name__ == "__main__":
    with Pool({JOBS}) as pool:
        print(json.dumps(pool.map(train_one, range({RUNS}), chunksize=1)))
"""
SWEEP = f"""
import json
from nbprod.experiment.sweeps import sweep
runs = sweep("train.ipynb", {{"seed": list(range({RUNS}))}}, jobs={JOBS}, progress=False)
print(json.dumps([run.metrics["auc"] for run in runs]))
"""


def write_project(folder: Path) -> None:
    """A project of one notebook, and the same code as a script."""
    (folder / "settings.ini").write_text("[nbprod]\n")
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for source in (PARAMETERS, IMPORTS, TRAIN, SCORE)
    ]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    (folder / "train.ipynb").write_text(json.dumps(notebook))
    (folder / "plain.py").write_text(PLAIN)
    (folder / "sweep.py").write_text(SWEEP)


def execute(folder: Path, *command: str) -> str:
    """What a Python process in `folder` prints; it has to succeed. Each has one thread for numerics."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | single,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def by_papermill(folder: Path, jobs: int) -> list[float]:
    """The 20 notebooks by the command line of papermill, `jobs` at a time; their AUCs."""

    def one(seed: int) -> float:
        output = f"out-{seed}.ipynb"
        execute(
            folder, "-m", "papermill", "train.ipynb", output, "-p", "seed", str(seed), "--no-progress-bar"
        )
        outputs = json.loads((folder / output).read_text())["cells"][-1]["outputs"]
        return float(outputs[-1]["data"]["text/plain"][0].removeprefix("np.float64(").removesuffix(")"))

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(RUNS)))


def main() -> None:
    """Measure, print one line a round, then the result."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_project(folder)
        ways = {
            "papermill": lambda: by_papermill(folder, 1),
            "papermill_2": lambda: by_papermill(folder, JOBS),
            "sweep": lambda: json.loads(execute(folder, "sweep.py")),
            "plain": lambda: json.loads(execute(folder, "plain.py")),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(1, rounds + 1):
            answers = {}
            for way, call in ways.items():
                start = perf_counter()
                answers[way] = [round(auc, 12) for auc in call()]
                seconds[way].append(perf_counter() - start)
            assert len({json.dumps(answer) for answer in answers.values()}) == 1, "the ways do not agree"
            print(f"round {number}:", "  ".join(f"{way} {took[-1]:.2f} s" for way, took in seconds.items()))
    middle = {way: statistics.median(took) for way, took in seconds.items()}
    result = {
        "benchmark": "sweep",
        "vs_papermill": round(middle["papermill"] / middle["sweep"], 2),
        "vs_papermill_2": round(middle["papermill_2"] / middle["sweep"], 2),
        "vs_plain": round(middle["sweep"] / middle["plain"], 2),
        "goals": GOALS,
        "seconds": {way: round(value, 2) for way, value in middle.items()},
        "runs": RUNS,
        "rounds": rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
