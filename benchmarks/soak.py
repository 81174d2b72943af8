"""Does a service stay as it is under load? Memory, open files, errors and latency over ten minutes.

The flights of the template are served by two processes with all that nbprod does. First its capacity is
measured with wrk; then requests of one row, and now and then of 100, come at half of that rate, from 32
connections. Every 30 seconds a line tells the memory and the open files of the workers and the latency since
the line before. The last line is JSON: requests, errors, the growth of memory from the end of the second
minute to the end, in MB and relative, and that of open files.

    python benchmarks/soak.py [minutes]
"""

import asyncio
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from predict import trained_project
from serving import ask, write_script

CONNECTIONS = 32
SETTLED = 120  # seconds, after which nothing should grow any more


class Load:
    """Requests at a steady rate over connections that are kept, each of which waits for its answers."""

    def __init__(self, port: int, bodies: list[bytes], rate: float) -> None:
        self.port, self.bodies, self.interval = port, bodies, CONNECTIONS / rate
        self.requests, self.errors, self.milliseconds = 0, 0, list[float]()

    async def run(self, until: float) -> None:
        """Ask until the time `until`."""
        await asyncio.gather(*(self._one(until) for _ in range(CONNECTIONS)))

    async def _one(self, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        at = time.monotonic() + random.random() * self.interval
        while at < until:
            await asyncio.sleep(at - time.monotonic())
            start = time.perf_counter()
            body = self.bodies[random.random() < 0.01]
            head = f"POST /predict HTTP/1.1\r\nHost: soak\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            head_of_answer = await reader.readuntil(b"\r\n\r\n")
            length = int(head_of_answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            self.requests += 1
            self.errors += not head_of_answer.startswith(b"HTTP/1.1 200")
            self.milliseconds.append((time.perf_counter() - start) * 1000)
            at = max(at + self.interval, time.monotonic() - 1)
        writer.close()


def state(workers: list[Any]) -> tuple[float, int]:
    """Memory in MB and the number of open files of all workers."""
    return sum(each.memory_info().rss for each in workers) / 1e6, sum(each.num_fds() for each in workers)


async def watch(load: Load, workers: list[Any], until: float) -> list[tuple[float, float, int]]:
    """The state every 30 seconds: seconds since the start, memory, files; prints a line for each."""
    found, start = [], time.monotonic()
    while time.monotonic() < until - 1:
        await asyncio.sleep(min(30, until - time.monotonic()))
        spent, load.milliseconds = sorted(load.milliseconds), []
        memory, files = state(workers)
        found.append((time.monotonic() - start, memory, files))
        middle, late = statistics.median(spent), spent[int(len(spent) * 0.99)]
        print(
            f"{found[-1][0]:4.0f} s  {load.requests} requests  {load.errors} errors  {memory:.1f} MB  "
            f"{files} files  median {middle:.2f} ms  p99 {late:.2f} ms",
            flush=True,
        )
    return found


def main(minutes: float = 10) -> None:
    """Train, build, serve, load, watch, print."""
    if shutil.which("wrk") is None:
        raise SystemExit("This needs wrk: apt-get install wrk.")
    with trained_project() as project:
        from flights.features import INPUTS, flights

        from nbprod.model.contract import plain_rows
        from nbprod.model.store import load as load_model
        from nbprod.serve.bento import build
        from nbprod.serve.process import free_port, start_service

        tag = build("arrival_delay:latest").bento
        rows = plain_rows(load_model(tag).contract, flights([2])[INPUTS].head(100))
        port = free_port()
        with start_service(tag, port=port, workers=2) as url:
            script = write_script(Path(project), rows, 1)
            capacity = ask(f"{url}/predict", script, CONNECTIONS, 5).rate
            bodies = [json.dumps({"rows": rows[:size]}).encode() for size in (1, 100)]
            load = Load(port, bodies, capacity / 2)
            workers = [
                each
                for each in psutil.Process().children(recursive=True)
                if "_bentoml_impl.worker.service" in " ".join(each.cmdline())
            ]
            print(
                f"capacity {capacity:.0f}/s, asking {capacity / 2:.0f}/s of {len(workers)} workers",
                flush=True,
            )
            until = time.monotonic() + minutes * 60

            async def both() -> list[tuple[float, float, int]]:
                return (await asyncio.gather(watch(load, workers, until), load.run(until)))[0]

            found = asyncio.run(both())
    settled = next((each for each in found if each[0] >= min(SETTLED, minutes * 30)), found[0])
    last = found[-1]
    result = {
        "requests": load.requests,
        "errors": load.errors,
        "memory_growth_mb": round(last[1] - settled[1], 1),
        "memory_growth": round(last[1] / settled[1] - 1, 3),
        "file_growth": last[2] - settled[2],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
