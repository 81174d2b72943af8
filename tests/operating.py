"""What the tests of a running service share: a small model, its Bento, keys, and bytes sent by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from modelling import encoder, flights, late, logged
from running import wait_for
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from nbprod.serve.bento import build
from nbprod.serve.process import PORT_LOST, STARTS

SECRET, OTHER = "kX2v-9sQ4nB7wL1dT6hJ", "pR8c-3mF5yU0aZ7eG2iN"
ROW = {"carrier": "UA", "wind": 3.5, "distance": 1400}
BODY = json.dumps({"rows": [ROW]}).encode()


def build_delay() -> str:
    """A Bento of a model that compiles wholly, in the current BentoML store."""
    pipeline = make_pipeline(encoder(), LogisticRegression(max_iter=1000)).fit(flights, late)
    return build(logged(pipeline).tag).bento


@dataclass(frozen=True)
class Served:
    """A service as `bentoml serve` runs it: its process, its port, and the file of all that it prints."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self.port}"

    def printed(self) -> str:
        """All that it printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> list[psutil.Process]:
        """The processes that answer."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if "_bentoml_impl.worker.service" in each.cmdline():
                    found.append(each)
        return found


def connect(port: int, timeout: float = 30) -> socket.socket:
    """A connection to a service of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout)


def head(method: str, path: str, **headers: object) -> bytes:
    """The first part of a request, up to its body."""
    given = {"host": "test"} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def exchange(port: int, data: bytes, timeout: float = 30) -> bytes:
    """What is answered to `data` until the service closes the connection."""
    with connect(port, timeout) as connection:
        with suppress(OSError):  # it was closed before all was sent; the answer may be there
            connection.sendall(data)
        return receive_all(connection)


def receive_all(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    """The status of each response in what a connection gave."""
    lines = [line for line in answer.split(b"\n") if b"HTTP/1.1 " in line]
    return [int(line.partition(b"HTTP/1.1 ")[2][:3]) for line in lines]


def status(
    port: int, path: str = "/readyz", method: str = "GET", body: bytes = b"", **headers: object
) -> int:
    """The status of one request over a connection of its own; 0 if nobody answers."""
    given = {"connection": "close", **({"content-length": len(body)} if body else {}), **headers}
    try:
        found = statuses(exchange(port, head(method, path, **given) + body))
    except OSError:
        return 0
    return found[0] if found else 0


def _start(
    command: list[str], folder: Path, port: int, environ: Mapping[str, str], times: int = STARTS
) -> Served:
    """Start `command`, which serves on `port`, until it is ready or ends; it prints into `folder`."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--timeout-graceful-shutdown", "20"],
            cwd=folder,
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    service = Served(process, port, folder / "output")
    try:
        wait_for(lambda: process.poll() is not None or status(port) == 200, "the service to be ready", 120)
    except BaseException:
        stop(service)
        raise
    if times > 1 and process.poll() is not None and PORT_LOST in service.printed():
        return _start(command, folder, port, environ, times - 1)
    return service


@contextmanager
def served(
    bento: str,
    folder: Path,
    port: int,
    workers: int = 1,
    host: str = "127.0.0.1",
    python: str = sys.executable,
    **environ: str,
) -> Iterator[Served]:
    """`bentoml serve BENTO` with a store in `folder`, until the context ends."""
    folder.mkdir(exist_ok=True)
    overrides = {"services": {bento.split(":")[0]: {"workers": workers}}}
    variables = {"NBPROD_STORE": str(folder / "store"), "BENTOML_CONFIG_OVERRIDES": json.dumps(overrides)}
    command = [python, "-m", "bentoml", "serve", bento, "--host", host, "--port", str(port)]
    service = _start(command, folder, port, variables | environ)
    process = service.process
    try:
        wait_for(lambda: process.poll() is not None or len(service.workers()) == workers, "all workers")
        if workers > 1:  # one may be ready before the others
            ready = f"Service {bento.split(':')[0]} initialized"
            wait_for(lambda: service.printed().count(ready) >= workers, "all workers to be ready", 120)
        yield service
    finally:
        stop(service)


def stop(service: Served, seconds: float = 60) -> int:
    """End a service as a platform does; its exit status."""
    workers = service.workers() if service.process.poll() is None else []
    deadline = time.monotonic() + seconds
    while service.process.poll() is None and time.monotonic() < deadline:
        service.process.terminate()
        try:
            service.process.wait(3)
        except subprocess.TimeoutExpired:
            continue
    if service.process.poll() is None:
        service.process.kill()
        for each in workers:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    return service.process.wait()


def json_lines(text: str) -> list[Mapping[str, Any]]:
    """The lines of an access log in what a service printed."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
