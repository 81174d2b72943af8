"""The client against a real service: what it returns, how it splits and repeats, and what its errors say."""

import json
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from late_flights import Served

import nbprod
from nbprod.client import Client
from nbprod.errors import ContractError, ServiceError, UsageError
from nbprod.model.contract import plain_rows

pytestmark = pytest.mark.filterwarnings("ignore::nbprod.errors.UnusualValueWarning")
Fault = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(scope="module")
def service(late_flights: Served) -> Iterator[Client]:
    with nbprod.connect(late_flights.url) as client:
        yield client


# Answers


@pytest.mark.parametrize("rows", [1, 50, 51, 3000, 25_000])
def test_predictions_are_those_of_the_model(late_flights: Served, service: Client, rows: int) -> None:
    frame = late_flights.flights[:rows].assign(tailnum="N1")
    expected = late_flights.model.predict(frame)
    given = service.predict(frame)
    assert given.dtype == expected.dtype and (given == expected).all()
    probabilities = service.predict_proba(frame)
    np.testing.assert_allclose(
        probabilities, late_flights.model.predict_proba(frame), rtol=0, atol=late_flights.model.tolerance
    )


def test_rows_and_tables_of_other_libraries(late_flights: Served, service: Client) -> None:
    frame = late_flights.flights[:200]
    expected = late_flights.model.predict(frame).tolist()
    rows = plain_rows(late_flights.model.contract, frame)
    table = pa.Table.from_pandas(frame, preserve_index=False).append_column("tailnum", pa.array(["N1"] * 200))
    for inputs in (rows, tuple(rows), table, table.to_batches()[0], frame.astype({"carrier": "category"})):
        assert service.predict(inputs).tolist() == expected
    odd = pd.DataFrame(rows, index=[7] * 200)[::-1]
    assert service.predict(odd).tolist() == expected[::-1]


def test_an_answer_has_ids_for_outcomes(late_flights: Served, service: Client) -> None:
    answer = service.answer(late_flights.flights[:12_000])
    assert answer.model == late_flights.model.tag and len(set(answer.ids)) == 12_000
    told = service.feedback([*answer.ids, "0" * 32], np.append(answer.predictions, 1))
    assert told == {"accepted": 12_000, "unknown": ["0" * 32]}
    with pytest.raises(ContractError, match="row 1, column 'actual': must be one of 0, 1, got 7"):
        service.feedback(answer.ids[:2], [1, 7])
    with pytest.raises(UsageError, match="2 ids and 1 outcomes"):
        service.feedback(answer.ids[:2], [1])


def test_facts_of_the_model(late_flights: Served, service: Client) -> None:
    assert service.model["model"] == late_flights.model.tag and service.model["classes"] == [0, 1]
    assert repr(service) == f"<Client of late_flights:v1 at {late_flights.url}>"


def test_threads_share_a_client(late_flights: Served, service: Client) -> None:
    """Each gets its own answers, over connections that are kept."""
    expected = late_flights.model.predict_proba(late_flights.flights[:400])[:, 1]

    def ask(place: int) -> float:
        return float(service.predict_proba(late_flights.flights[place : place + 1])[0, 1])

    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(ask, range(400)))
    np.testing.assert_allclose(given, expected, rtol=0, atol=late_flights.model.tolerance)


def test_broken_rows_are_named_by_their_place_in_the_table(late_flights: Served, service: Client) -> None:
    frame = late_flights.flights[:12_000]
    for row in (3, 11_000):
        broken = frame.assign(distance=frame["distance"].astype(object))
        broken.loc[row, "distance"] = "far"
        with pytest.raises(ContractError) as caught:
            service.predict(broken)
        assert caught.value.detail[0]["row"] == row
        assert f"row {row}, column 'distance': must be a whole number, got 'far'" in str(caught.value)
    with pytest.raises(ContractError, match="column 'distance': is missing"):
        service.predict(frame.drop(columns="distance"))
    with pytest.raises(ContractError, match="row 0, column 'origin': is missing"):
        service.predict([{"carrier": "UA"}])


@pytest.mark.parametrize("inputs", [[], {}, "UA", pd.DataFrame(), [{"distance": object()}]])
def test_what_is_no_table_is_not_sent(service: Client, inputs: Any) -> None:
    with pytest.raises(UsageError):
        service.predict(inputs)


# Faults on the way


class Between(BaseHTTPRequestHandler):
    """Stands between client and service, and does to each request the next of `faults`, or passes it on."""

    protocol_version = "HTTP/1.1"
    target: str
    faults: list[Fault | None]
    seen: Counter[str]
    pages: list[bytes]
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.pages:
            self.reply(200, self.pages.pop(0), {"content-type": "application/json"})
        else:
            self.pass_on()

    def do_POST(self) -> None:
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
            self.seen[self.path] += 1
        if fault is None:
            self.pass_on()
        else:
            self.rfile.read(int(self.headers["content-length"]))
            fault(self)

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name: self.headers[name] for name in ("content-type", "accept") if name in self.headers}
        answer = httpx.request(self.command, self.target + self.path, content=body, headers=headers)
        self.reply(answer.status_code, answer.content, {"content-type": answer.headers["content-type"]})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection in the middle of an answer."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
    handler.close_connection = True


def status(number: int, **headers: str) -> Fault:
    """Answer with a status."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": f"status {number} on purpose", "detail": []}).encode()
    return lambda handler: handler.reply(number, body, named)  # type: ignore[attr-defined, no-any-return]


@contextmanager
def between(
    target: str, *faults: Fault | None, tls: ssl.SSLContext | None = None, pages: list[bytes] | None = None
) -> Iterator[tuple[str, Counter[str]]]:
    """The URL of a server that passes requests on to `target` but for `faults`; and what was asked."""
    seen: Counter[str] = Counter()
    handler = type(
        "Handler", (Between,), {"target": target, "faults": [*faults], "seen": seen, "pages": pages or []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "faults",
    [[drop], [status(503), drop, status(502)], [status(429, retry_after="1")], [status(504), status(503)]],
)
def test_what_passes_is_tried_again(late_flights: Served, faults: list[Fault]) -> None:
    frame = late_flights.flights[:100]
    with between(late_flights.url, *faults) as (url, seen), nbprod.connect(url) as client:
        assert (client.predict(frame) == late_flights.model.predict(frame)).all()
    assert seen["/predict"] == len(faults) + 1


@pytest.mark.parametrize("number", [500, 404, 403, 401, 415])
def test_what_does_not_pass_is_not_tried_again(late_flights: Served, number: int) -> None:
    with between(late_flights.url, status(number)) as (url, seen), nbprod.connect(url) as client:
        with pytest.raises(ServiceError) as caught:
            client.predict(late_flights.flights[:1])
        assert caught.value.status == number and seen["/predict"] == 1


def test_a_service_that_stays_busy_is_given_up_within_the_time(late_flights: Served) -> None:
    busy = [status(503, retry_after="100")] * 20
    with between(late_flights.url, *busy) as (url, seen), nbprod.connect(url, timeout=5) as client:
        with pytest.raises(ServiceError, match="status 503: status 503 on purpose"):
            client.predict(late_flights.flights[:1])
        assert seen["/predict"] == 1, "to come back is later than it waits"
    with between(late_flights.url, *[drop] * 20) as (url, seen), nbprod.connect(url) as client:
        with pytest.raises(ServiceError, match="cannot be reached"):
            client.predict(late_flights.flights[:1])
        assert seen["/predict"] == 5


def test_an_answer_that_does_not_come(late_flights: Served) -> None:
    stop = threading.Event()
    with between(late_flights.url, lambda _: stop.wait(60) and None) as (url, _):
        with (
            nbprod.connect(url, timeout=1) as client,
            pytest.raises(ServiceError, match="did not answer in time"),
        ):
            client.predict(late_flights.flights[:1])
        stop.set()


def test_tables_that_a_service_finds_too_large_are_sent_in_halves(late_flights: Served) -> None:
    frame = late_flights.flights[:101]
    large = status(413)
    with (
        between(late_flights.url, large, None, large, None, None) as (url, seen),
        nbprod.connect(url) as client,
    ):
        assert (client.predict(frame) == late_flights.model.predict(frame)).all()
    assert seen["/predict"] == 5


def test_another_version_with_more_columns_is_noticed(late_flights: Served, service: Client) -> None:
    """A client that lives for months outlives the version that it connected to."""
    earlier = json.loads(json.dumps(service.model)) | {"model": "late_flights:v0"}
    earlier["contract"]["columns"].pop()
    frame = late_flights.flights[:100]
    pages = [json.dumps(earlier).encode()]
    with between(late_flights.url, pages=pages) as (url, seen), nbprod.connect(url) as client:
        assert client.model["model"] == "late_flights:v0"
        assert (client.predict(frame) == late_flights.model.predict(frame)).all()
        assert client.model["model"] == "late_flights:v1"
    assert seen["/predict"] == 2


# Nobody there


def refusal(url: str, **options: Any) -> str:
    with pytest.raises((ServiceError, UsageError)) as caught:
        nbprod.connect(url, **{"timeout": 3} | options)
    return str(caught.value)


def test_who_is_not_there(late_flights: Served, free_port: Callable[[], int]) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert f"{nobody} cannot be reached" in refusal(nobody) and "Is it running" in refusal(nobody)
    assert "begins with http://" in refusal("127.0.0.1:3000")
    assert "cannot be reached" in refusal("http://nobody.invalid")
    assert "status 404" in refusal(f"{late_flights.url}/v1")
    assert "is it http:// and not https://?" in refusal(late_flights.url.replace("http:", "https:"))


class Other(BaseHTTPRequestHandler):
    """Some other web server."""

    body = b"<h1>It works!</h1>"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("body", [b"<h1>It works!</h1>", b"[]", b'{"model": "other"}'])
def test_a_server_that_is_no_nbprod_service(body: bytes) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Other,), {"body": body}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        assert "is no nbprod service" in refusal(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certificate(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that its owner signed, and the key to it, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(encoding) + private)
    return path


def test_an_encrypted_connection_and_whom_to_trust(late_flights: Served, tmp_path: Path) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with between(late_flights.url, tls=context) as (url, _):
        assert "certificate is not trusted" in refusal(url)
        trusted = ssl.create_default_context(cafile=str(path))
        with nbprod.connect(url, verify=trusted) as client:
            assert client.predict(late_flights.flights[:1]).shape == (1,)


def test_the_key_is_sent_and_never_shown(late_flights: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    wanted = status(401)

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        sent.append(handler.headers["authorization"])
        wanted(handler)

    with between(late_flights.url, refuse, refuse, refuse) as (url, _):
        monkeypatch.setenv("NBPROD_KEY", "of-the-environment")
        for key, expected in (("a-secret", "Bearer a-secret"), (None, "Bearer of-the-environment")):
            with (
                nbprod.connect(url, key) as client,
                pytest.raises(ServiceError, match="was refused") as caught,
            ):
                client.predict(late_flights.flights[:1])
            assert sent.pop() == expected
            assert "secret" not in str(caught.value) and "environment" not in repr(vars(caught.value))
        monkeypatch.delenv("NBPROD_KEY")
        with nbprod.connect(url) as client, pytest.raises(ServiceError, match="or set NBPROD_KEY"):
            client.predict(late_flights.flights[:1])
        assert sent == [None]


def test_the_client_is_light() -> None:
    heavy = "{'pandas', 'numpy', 'pyarrow', 'bentoml', 'httpx'}"
    code = f"import nbprod, sys; nbprod.connect; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
