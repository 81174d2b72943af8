"""A service for tests: the metrics and the model page of a served model, and what may go wrong with them."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nbprod.model.baseline import Baseline, profile

CALL = ("endpoint", "service_name", "service_version", "http_response_code", "runner_name")


def winter(rows: int = 2000, warmer: float = 0.0) -> pd.DataFrame:
    """Flights of a made-up winter; `warmer` in degrees."""
    rng = np.random.default_rng(rows)
    carriers = rng.choice(["UA", "B6", "EV"], rows)
    return pd.DataFrame({"temperature": rng.normal(38 + warmer, 9, rows), "carrier": carriers})


def scores(rows: int) -> np.ndarray:
    """Probabilities of a late arrival."""
    return np.random.default_rng(rows).beta(2, 7, rows)


def winter_baseline() -> Baseline:
    """The training profile of a model of that winter."""
    late = scores(2000)
    return profile(winter(), late > 0.5, np.column_stack([1 - late, late]), classes=[False, True])


class MetricsService:
    """Serves at `url`. To disturb it, set `delay` (seconds), `drip` (a byte at a time) or `body`."""

    def __init__(self, tag: str = "arrival_delay:1", port: int = 0) -> None:
        self.baseline, self.asked = winter_baseline(), 0
        self.delay, self.drip, self.body = 0.0, False, b""
        self.deploy(tag)
        service = self

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service._answer(self)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Pages)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> MetricsService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away; the port is free afterwards."""
        self._server.shutdown()
        self._server.server_close()

    def deploy(self, tag: str) -> None:
        """Start to serve a version; all counters are at zero."""
        self.tag, self.registry = tag, CollectorRegistry()
        info = Gauge("nbprod_model_info", "info", ("model", "run", "commit"), registry=self.registry)
        info.labels(tag, "run", "3f2a91c").set(1)
        self.rows = Counter("nbprod_rows", "rows", ("model",), registry=self.registry)
        self.predictions = Counter("nbprod_predictions", "bins", ("model", "bin"), registry=self.registry)
        self.features = Counter("nbprod_feature", "bins", ("model", "column", "bin"), registry=self.registry)
        name = "bentoml_service_request"
        self.requests = Counter(f"{name}_total", "requests", CALL, registry=self.registry)
        self.seconds = Histogram(f"{name}_duration_seconds", "latency", CALL, registry=self.registry)

    def predict(self, frame: pd.DataFrame, code: int = 200, seconds: float = 0.02, tag: str = "") -> None:
        """Count one request of these rows, as the service does."""
        call = ("/predict", "arrival_delay", "1", str(code), "service")
        self.requests.labels(*call).inc()
        self.seconds.labels(*call).observe(seconds)
        if code != 200:
            return
        tag = tag or self.tag
        self.rows.labels(tag).inc(len(frame))
        for i in self.baseline.prediction.count(scores(len(frame))).nonzero()[0]:
            self.predictions.labels(tag, str(i)).inc(len(frame) / 10)
        for column, histogram in self.baseline.features.items():
            for i, count in enumerate(histogram.count(frame[column])):
                self.features.labels(tag, column, str(i)).inc(int(count))

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked += request.path == "/metrics"
        model: dict[str, Any] = {"model": self.tag, "run": "run", "lineage": {"commit": "3f2a91c"}}
        if request.path == "/metrics":
            body = self.body or generate_latest(self.registry)
        else:
            body = json.dumps({**model, "baseline": self.baseline.as_dict()}).encode()
        time.sleep(self.delay)
        try:
            request.send_response(200)
            request.send_header("content-length", str(len(body)))
            request.end_headers()
            for i in range(0, len(body), 1 if self.drip else len(body)):
                request.wfile.write(body[i : i + (1 if self.drip else len(body))])
                time.sleep(0.05 if self.drip else 0)
        except OSError:
            pass  # the dashboard had waited long enough
