"""How many times as long as `python -c pass` does `nbprod --help` take? The limit is 5.

Both run in turns, so that a machine that is slow for a moment is slow for both. The last line is JSON.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

ROUNDS = 15
LIMIT = 5.0
NOTHING = [sys.executable, "-c", "pass"]
HELP = [str(Path(sys.executable).with_name("nbprod")), "--help"]


def seconds(command: list[str]) -> float:
    """The time from start to end of a command that has to succeed."""
    start = perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return perf_counter() - start


def main() -> None:
    """Measure, print one line a round, then the result."""
    seconds(HELP)  # The first start compiles what changed.
    nothing, help_ = [], []
    for number in range(1, ROUNDS + 1):
        nothing.append(seconds(NOTHING))
        help_.append(seconds(HELP))
        print(f"round {number:2}: {nothing[-1] * 1e3:6.1f} ms  {help_[-1] * 1e3:6.1f} ms", end="  ")
        print(f"ratio {help_[-1] / nothing[-1]:.2f}")
    ratios = [long / short for long, short in zip(help_, nothing, strict=True)]
    result = {
        "benchmark": "help",
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "limit": LIMIT,
        "help_ms": round(statistics.median(help_) * 1e3, 1),
        "python_ms": round(statistics.median(nothing) * 1e3, 1),
        "rounds": ROUNDS,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
