"""What strangers, broken clients and attackers send: refused in words, forgotten, nobody else's trouble."""

from __future__ import annotations

import gzip
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest
from operating import (
    BODY,
    ROW,
    Served,
    connect,
    exchange,
    head,
    receive_all,
    served,
    status,
    statuses,
)
from running import wait_for

JSON = {"content_type": "application/json"}
MEGABYTE = 1024 * 1024
SLOW = 3  # seconds in which a body must have arrived

pytestmark = pytest.mark.alone  # neighbours' latency is compared


@pytest.fixture(scope="module")
def service(
    bento: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Served]:
    """A service of two workers that has answered so often that its memory has settled."""
    folder = tmp_path_factory.mktemp("hostile")
    environ = {"NBPROD_RECEIVE_TIMEOUT": str(SLOW), "NBPROD_ACCESS_LOG": "0"}
    with served(bento, folder, free_port(), workers=2, **environ) as service:
        with httpx.Client() as client:
            for _ in range(500):
                client.post(f"{service.url}/predict", content=BODY)
        yield service


@dataclass
class Neighbour:
    """A client that goes on asking as one should: seconds of each answer, and what went wrong."""

    port: int
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def ask(self, ended: threading.Event) -> None:
        """Ask, on a connection of its own for each request, until it ended."""
        while not ended.is_set():
            start = time.perf_counter()
            answer = exchange(
                self.port, head("POST", "/predict", connection="close", content_length=len(BODY)) + BODY
            )
            self.seconds.append(time.perf_counter() - start)
            if statuses(answer) != [200] or b'"predictions"' not in answer:
                self.wrong.append(repr(answer[:200]))


@contextmanager
def neighbours(service: Served) -> Iterator[None]:
    """Two clients ask meanwhile; all their requests are answered, and as fast as before within a wide bound.

    Afterwards the service is ready, its workers are the same processes, and they have not grown.
    """

    def ask_for(seconds: float | None) -> list[Neighbour]:
        ended = threading.Event()
        clients = [Neighbour(service.port) for _ in range(2)]
        threads = [threading.Thread(target=client.ask, args=(ended,)) for client in clients]
        for thread in threads:
            thread.start()
        stack.callback(lambda: [thread.join(60) for thread in threads])
        stack.callback(ended.set)
        if seconds is not None:
            time.sleep(seconds)
            stack.close()
        return clients

    with ExitStack() as stack:
        before = ask_for(1.0)
        workers = service.workers()
        memory = sum(each.memory_info().rss for each in workers)
        meanwhile = ask_for(None)
        yield
    assert [answer for client in (*before, *meanwhile) for answer in client.wrong] == []
    quiet, loud = (
        statistics.median(t for each in some for t in each.seconds) for some in (before, meanwhile)
    )
    # An attack may take its share of two cores, and no more than that.
    assert loud < 10 * quiet + 0.05, (quiet, loud)
    assert status(service.port) == 200
    assert service.workers() == workers, "no worker died and was replaced"
    grown = sum(each.memory_info().rss for each in workers) - memory
    assert grown < 2 * 40 * MEGABYTE, f"two workers grew by {grown / MEGABYTE:.0f} MB"
    assert "Traceback" not in service.printed()


def refuse(service: Served, body: bytes, *expected: int, path: str = "/predict", **headers: object) -> None:
    """`body` gets one of the `expected` statuses, and a reply that is JSON with an error in it."""
    given = {**JSON, "content_length": len(body), "connection": "close", **headers}
    answer = exchange(service.port, head("POST", path, **given) + body)
    assert statuses(answer)[:1] and statuses(answer)[0] in expected, (answer[:300], body[:60])
    value = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert sorted(value) == ["detail", "error"] and len(answer) < 20_000


@pytest.mark.parametrize("path", ["/predict", "/feedback"])
def test_bodies_that_are_no_request(service: Served, path: str) -> None:
    row = json.dumps(ROW)
    wide = json.dumps({"rows": [{f"column{i}": i for i in range(100_000)}]}).encode()
    bodies = [
        b"[" * 100_000,
        b'{"rows":' * 100_000,
        b'{"rows": [' + b'{"carrier":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"rows": [{"distance": ' + b"9" * 1_000_000 + b"}]}",
        b'{"rows": [{"distance": 1e' + b"9" * 100_000 + b"}]}",
        b'{"rows": [{"distance": -' + b"0" * 100_000 + b"}]}",
        wide,
        wide.replace(b"column", b"\\u0000"),
        json.dumps({"rows": [ROW] * 20_000}).encode()[:-1],
        json.dumps({"rows": [ROW | {"carrier": "x" * 5_000_000, "distance": "x"}]}).encode(),
        ("{" + ",".join(f'"rows": [{row}]' for _ in range(50_000)) + ', "rows": 1}').encode(),
        BODY.decode().encode("utf-16"),
        BODY.decode().encode("utf-32"),
        BODY.replace(b"UA", b"\xe4\xf6\xfc"),
        BODY.replace(b"UA", b"\xed\xa0\x80"),
        BODY.replace(b"UA", b"\xc0\xaf"),
        b"\xef\xbb\xbf" + BODY[:-1],
        b"\x00" * 100_000,
        random.Random(0).randbytes(1_000_000),
    ]
    with neighbours(service):
        for body in bodies:
            refuse(service, body, 400, 413, path=path)


def test_rows_with_doubled_names_or_odd_texts_are_answered_or_refused(service: Served) -> None:
    """JSON allows what is odd; an answer is an answer, and nothing fails."""
    odd = [
        b"\xef\xbb\xbf" + BODY,
        BODY.replace(b'"distance"', b'"distance": 7, "distance"'),
        BODY.replace(b"UA", b"\\u0000"),
        BODY.replace(b"UA", b"\\ud800"),
        BODY.replace(b"UA", "\U0001f600".encode() * 100_000),
        BODY.replace(b"3.5", b"-0.0"),
        BODY.replace(b"3.5", b"5e-324"),
        BODY.replace(b"3.5", b"1.7976931348623157e308"),
        BODY.replace(b"1400", b"9223372036854775807"),
        BODY.replace(b"1400", b"-9223372036854775808"),
    ]
    with neighbours(service):
        for body in odd:
            length = len(body)
            data = head("POST", "/predict", content_length=length, connection="close", **JSON) + body
            (found,) = statuses(exchange(service.port, data))
            assert found in (200, 400), body[:100]


def test_bombs(service: Served) -> None:
    """A small body that becomes a large one: refused for its size, or for being compressed at all."""
    bomb = gzip.compress(b"[" + b" " * (200 * MEGABYTE), 9)
    nested = gzip.compress(bomb)
    rows = gzip.compress(json.dumps({"rows": [ROW] * 300_000}).encode())
    with neighbours(service):
        for body in (bomb, nested, rows, bomb[: len(bomb) // 2], b"\x1f\x8b" + b"\xff" * 1000, b"", b"{}"):
            for _ in range(3):
                refuse(service, body, 400, 413, 415, content_encoding="gzip")
        for encoding in ("deflate", "br", "zstd", "gzip, gzip", "x" * 1000):
            refuse(service, BODY, 400, 413, 415, content_encoding=encoding)


def chunked(*chunks: bytes) -> bytes:
    """`chunks` as the body of a request without a length."""
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def test_lengths_and_chunks(service: Served) -> None:
    """Bodies in chunks are bodies. A length that is wrong, doubled or contradicted gets one refusal."""
    with neighbours(service):
        closing = head("POST", "/predict", transfer_encoding="chunked", connection="close", **JSON)
        assert statuses(exchange(service.port, closing + chunked(*(bytes([each]) for each in BODY)))) == [200]
        wrong = [
            closing + b"zz\r\n" + BODY,
            closing + b"-1\r\n",
            closing + b"f" * 40 + b"\r\n",
            closing + b"5\r\n{rows\r\r\n0\r\n\r\n",
            head("POST", "/predict", content_length="-5") + BODY,
            head("POST", "/predict", content_length="0x40") + BODY,
            head("POST", "/predict", content_length="9" * 30) + BODY,
            head("POST", "/predict", content_length=10**12, connection="close") + BODY,
            head("POST", "/predict", content_length=f"{len(BODY)}, {len(BODY)}") + BODY,
        ]
        for data in wrong:
            found = statuses(exchange(service.port, data))
            assert found and 400 <= found[0] < 500, (data[:200], found)
        endless = chunked(*[b" " * MEGABYTE] * 12)
        assert statuses(exchange(service.port, closing + endless))[0] == 413


def test_no_request_is_smuggled_in_another(service: Served) -> None:
    """Where a length and chunks, or two lengths, disagree, no second request is seen by the service."""
    hidden = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
    both = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: %s\r\n\r\n0\r\n\r\n"
    shapes = [
        both % name for name in (b"chunked", b" chunked", b"xchunked", b"chunked, identity", b"CHUNKED\t")
    ]
    twice = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\ncontent-length: 0\r\n\r\n"
    shapes += [
        twice % len(hidden),
        b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length : 0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\nx: y\rcontent-length: 0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nhost: x\r\n content-length: 0\r\n\r\n",
        b"POST /predict HTTP/1.1\nhost: x\ncontent-length: 0\n\n",
        b"GET /model HTTP/1.1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /model HTTP/9.9\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.Random(1).randbytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    with neighbours(service):
        for shape in shapes:
            with connect(service.port, 10) as connection:
                connection.sendall(shape + hidden)
                answer = receive_all(connection)
            found = statuses(answer)
            assert found and all(400 <= each < 500 for each in found), (shape, found)
            assert len(found) == 1, (shape, answer)


def test_paths_that_lead_elsewhere(service: Served) -> None:
    """No path shows a file of the machine, and none of them fails."""
    steps = ["../", "..%2f", "%2e%2e/", "..%5c", "....//", "%252e%252e%252f", "..%c0%af", "..;/"]
    paths = [
        f"/{base}{step * 8}etc/passwd"
        for base in ("", "static_content/", "docs/", "model/")
        for step in steps
    ]
    paths += ["//etc/passwd", "/static_content//etc/passwd", "/static_content/%00", "/%00", "/%ff%fe", "/*"]
    paths += ["/predict/../model", "/" + "a" * 60_000, "/model?" + "a=b&" * 10_000, "http://other/model", "*"]
    with neighbours(service):
        for path in paths:
            answer = exchange(service.port, head("GET", path, connection="close"))
            assert b"root:" not in answer
            assert statuses(answer) and statuses(answer)[0] < 500, (path[:80], answer[:200])
        assert status(service.port, "/compute_held", "POST", b'{"places": [[0, 0]]}') == 404


def test_headers(service: Served) -> None:
    """Many, long, doubled and binary ones; nothing of them is kept."""
    with neighbours(service):
        for count, size in ((10_000, 10), (50, 100_000), (1, 20 * MEGABYTE)):
            many = b"".join(b"x-%d: %s\r\n" % (each, b"y" * size) for each in range(count))
            data = head("GET", "/readyz", connection="close")[:-2] + many + b"\r\n"
            assert statuses(exchange(service.port, data))[:1] in ([], [200], [400], [431])
        for value in ("\x00", "\x7f", "a\x0bb", "ü"):
            data = head("POST", "/predict", x_request_id=value, content_length=len(BODY), connection="close")
            assert statuses(exchange(service.port, data + BODY))[:1] in ([200], [400])
        for name in ("content_type", "content_encoding", "accept", "x_request_id", "authorization", "expect"):
            given = {"content_length": len(BODY), "connection": "close", name: "y" * 8000}
            data = head("POST", "/predict", **given).replace(b"y", b"\xff") + BODY
            assert statuses(exchange(service.port, data))[0] < 500


def test_a_header_without_an_end(service: Served) -> None:
    """Joining what came of it would keep a process busy for minutes; its connection is closed instead."""
    with neighbours(service), connect(service.port, 60) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\nx-long: ")
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(1000):
                connection.sendall(b"y" * MEGABYTE)


def test_requests_that_end_too_early(service: Served) -> None:
    """300 clients that go away in the middle of a header or a body."""
    chance = random.Random(2)
    request = head("POST", "/predict", content_length=len(BODY), **JSON) + BODY
    with neighbours(service):
        for _ in range(300):
            with connect(service.port) as connection:
                connection.sendall(request[: chance.randrange(1, len(request))])
                if chance.random() < 0.5:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def test_bytes_drawn_at_random(service: Served) -> None:
    """Requests with a few bytes changed: an answer, a refusal or a closed connection, and no failure."""
    chance = random.Random(3)
    request = head("POST", "/predict", content_length=len(BODY), connection="close", **JSON) + BODY
    with neighbours(service):
        for _ in range(400):
            changed = bytearray(request)
            for _ in range(chance.randint(1, 6)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            with connect(service.port, 0.2) as connection:
                connection.sendall(changed)
                try:
                    found = statuses(receive_all(connection))
                except TimeoutError:
                    continue  # its length says that more is to come
            assert not [each for each in found if each >= 500 and each != 505], bytes(changed)


def test_slow_clients_hold_no_place(service: Served) -> None:
    """400 bodies and 200 headers that come a byte at a time: the bodies get 408, and nobody else notices."""
    with ExitStack() as stack, neighbours(service):
        bodies = [stack.enter_context(connect(service.port, 60)) for _ in range(400)]
        headers = [stack.enter_context(connect(service.port, 60)) for _ in range(200)]
        for connection in bodies:
            connection.sendall(head("POST", "/predict", content_length=1000, **JSON))
        for connection in headers:
            connection.sendall(b"POST /predict HTTP/1.1\r\nx-slow: ")
        deadline = time.monotonic() + SLOW + 3
        while time.monotonic() < deadline:
            for connection in (*bodies, *headers):
                with suppress(OSError):  # it has been sent away
                    connection.send(b" ")
            time.sleep(0.3)
        answers = [receive_all(connection) for connection in bodies]
        assert {each for answer in answers for each in statuses(answer)} == {408}
        assert all(answers[:300]), "each was told, and closed"


def test_more_connections_than_anybody_needs(service: Served) -> None:
    """1500 idle connections, and then a request on each of a few hundred of them at once."""
    with ExitStack() as stack, neighbours(service):
        idle = [stack.enter_context(connect(service.port, 60)) for _ in range(1500)]
        for connection in idle[::5]:
            connection.sendall(head("POST", "/predict", content_length=len(BODY), connection="close"))
            connection.sendall(BODY)
        answers = [receive_all(connection) for connection in idle[::5]]
        assert {each for answer in answers for each in statuses(answer)} <= {200, 429}
        assert sum(statuses(answer) == [200] for answer in answers) > 200


def test_its_log_tells_and_its_files_stay_few(service: Served) -> None:
    """After all that: the refused requests are in the access log, as JSON, and no file was left open."""
    lines = [line for line in service.printed().splitlines() if line.startswith("{")]
    values = [json.loads(line) for line in lines]
    assert {value["status"] for value in values if "status" in value} >= {400, 404, 408, 413}
    assert not [value for value in values if value.get("status", 0) >= 500]
    assert all(len(line.encode()) < 4096 for line in lines)
    wait_for(lambda: all(each.num_fds() < 100 for each in service.workers()), "the connections to be closed")
