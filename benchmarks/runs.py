"""How long does `nbprod runs --where … --sort …` take over 10,000 runs? The limit is 1 second.

The first listing reads every notebook into the index; those that follow read what changed. The notebooks are
invented: as large as those of a small training job, with the lineage of a full environment. The last line is
JSON.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter

from nbprod.experiment.lineage import packages
from nbprod.experiment.recording import METADATA_KEY, NOTEBOOK_NAME

RUNS = 10_000
ROUNDS = 7
LIMIT = 1.0
NBPROD = str(Path(sys.executable).with_name("nbprod"))
LISTING = [NBPROD, "runs", "--where", "params.max_depth > 4 and metrics.auc >= 0.7", "--sort", "-auc"]
OUTPUT = {"output_type": "stream", "name": "stdout", "text": ["epoch 1\n" * 100]}


def make_runs(folder: Path, count: int) -> None:
    """Folders of invented runs."""
    choose = random.Random(0)
    cells = [{"cell_type": "code", "source": "fit()\n" * 20, "metadata": {}, "outputs": [OUTPUT]}] * 10
    for number in range(count):
        started = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
        run = f"{started:%Y%m%d-%H%M%S}-{number:04x}"
        params = {"max_depth": choose.choice([2, 4, 6, 8]), "learning_rate": 0.1, "seed": number}
        record = {"run": run, "status": "succeeded", "notebook": "nbs/10_train.ipynb", "params": params}
        record |= {"metrics": {"auc": choose.uniform(0.6, 0.8), "log_loss": 0.3}, "models": [f"delay:{run}"]}
        record |= {"data": {"train": {"rows": 1000, "columns": ["a", "b"], "sha256": "0" * 64}}}
        record |= {"cells": [{"index": index, "seconds": 0.5} for index in range(10)], "seconds": 5.0}
        record |= {"started": started.isoformat(), "lineage": {"commit": "0" * 40, "packages": packages()}}
        (folder / run).mkdir(parents=True)
        notebook = {"cells": cells, "metadata": {METADATA_KEY: record}, "nbformat": 4, "nbformat_minor": 5}
        (folder / run / NOTEBOOK_NAME).write_text(json.dumps(notebook))


def seconds(command: list[str], folder: str) -> tuple[float, int]:
    """The time that a command takes in a project, and the number of lines that it prints."""
    start = perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return perf_counter() - start, done.stdout.count("\n")


def main() -> None:
    """Make the runs, list them several times, print one line a round, then the result."""
    for name in [name for name in os.environ if name.startswith("NBPROD_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "settings.ini").write_text("[nbprod]\n")
        make_runs(Path(folder) / ".nbprod" / "runs", RUNS)
        first, lines = seconds(LISTING, folder)
        print(
            f"first listing, which reads {RUNS} notebooks: {first:.2f} s, {lines - 1} runs meet the condition"
        )
        times = []
        for number in range(1, ROUNDS + 1):
            times.append(seconds(LISTING, folder)[0])
            print(f"round {number:2}: {times[-1]:.3f} s")
        everything, _ = seconds([NBPROD, "runs"], folder)
        print(f"all of them in a table: {everything:.3f} s")
    result = {
        "benchmark": "runs",
        "runs": RUNS,
        "seconds": round(statistics.median(times), 3),
        "lowest": round(min(times), 3),
        "highest": round(max(times), 3),
        "limit": LIMIT,
        "first_seconds": round(first, 2),
        "all_seconds": round(everything, 3),
        "found": lines - 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
