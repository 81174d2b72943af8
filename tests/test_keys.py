"""API keys: who is let in, who is told why not and how fast, and where no key is ever to be seen."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from operating import BODY, OTHER, SECRET, Served, json_lines, served, status, stop
from running import wait_for

from nbprod.errors import UsageError
from nbprod.serve.bento import serve
from nbprod.settings import load_settings

KEPT = "The API keys stay as they were"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def locked(
    bento: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Served]:
    """A service with one key from the environment and one from a file, which logs all requests."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys.txt").write_text(f"# who may ask\ncrew:{OTHER}\n")
    (folder / "keys.txt").chmod(0o600)
    environ = {"NBPROD_KEYS": f"billing:{SECRET}", "NBPROD_KEYS_FILE": str(folder / "keys.txt")}
    with served(bento, folder, free_port(), NBPROD_ACCESS_LOG="all", **environ) as service:
        yield service


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as client:
        yield client


PATHS = [
    "/model",
    "/metrics",
    "/docs",
    "/docs.json",
    "/",
    "/notebook",
    "/schema.json",
    "/static_content/index.css",
]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_shown_without_a_key(locked: Served, web: httpx.Client, path: str) -> None:
    for headers in ({}, {"x-api-key": SECRET[:-1]}, {"authorization": f"Basic {SECRET}"}):
        response = web.get(locked.url + path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Bearer")
        assert sorted(response.json()) == ["detail", "error"]
    assert web.get(locked.url + path, headers={"x-api-key": SECRET}).status_code in (200, 404)


def test_each_key_opens_in_either_header(locked: Served, web: httpx.Client) -> None:
    for key in (SECRET, OTHER):
        for headers in ({"authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            answer = web.post(f"{locked.url}/predict", content=BODY, headers=JSON | headers)
            assert answer.status_code == 200 and len(answer.json()["predictions"]) == 1
    for path in ("/predict", "/feedback", "/compute_held", "/nowhere"):
        assert web.post(locked.url + path, content=BODY, headers=JSON).status_code == 401


def test_the_platform_asks_without_a_key(locked: Served, web: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert web.get(locked.url + path).status_code == 200


@pytest.mark.alone
def test_without_and_with_a_wrong_key_takes_as_long(locked: Served, web: httpx.Client) -> None:
    """Interleaved, in random order; a key that is nearly right is a wrong key like another."""
    kinds = {"none": {}, "wrong": {"x-api-key": "x" * 20}, "near": {"x-api-key": SECRET[:-1] + "j"}}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = random.Random(0).sample([*kinds] * 300, 900)
    bodies = set()
    for kind in order:
        start = time.perf_counter()
        response = web.get(f"{locked.url}/model", headers=kinds[kind])
        seconds[kind].append(time.perf_counter() - start)
        assert response.status_code == 401
        bodies.add(response.content)
    assert len(bodies) == 1, "nor does the answer tell them apart"
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    for kind in ("wrong", "near"):
        # Half of a median is many times what a comparison takes; the machine's own noise is below it.
        assert abs(medians[kind] - medians["none"]) < 0.5 * medians["none"], medians


def test_names_are_logged_and_keys_never(locked: Served, web: httpx.Client) -> None:
    """The name is in the access log; no part of a secret is in anything that the service says or writes."""
    for key, name in ((SECRET, "billing"), (OTHER, "crew")):
        headers = JSON | {"x-api-key": key, "x-request-id": f"order-{name}"}
        assert web.post(f"{locked.url}/predict", content=BODY, headers=headers).status_code == 200
        found = wait_for(
            lambda name=name: [
                line for line in json_lines(locked.printed()) if line.get("request") == f"order-{name}"
            ],
            "the line of the request",
        )
        assert [(line["key"], line["status"], line["rows"]) for line in found] == [(name, 200, 1)]
    shown = [web.get(locked.url + path, headers={"x-api-key": SECRET}).text for path in PATHS]
    shown += [web.post(f"{locked.url}/predict", content=BODY, headers={"x-api-key": OTHER + "1"}).text]
    written = [path.read_bytes() for path in locked.output.parent.rglob("*") if path.is_file()]
    written = [content for content in written if not content.startswith(b"# who may ask")]
    for secret in (SECRET, OTHER):
        assert not [text for text in shown if secret[:12] in text]
        assert not [content for content in written if secret[:12].encode() in content]


def test_keys_come_and_go_while_it_serves(
    bento: str, tmp_path: Path, free_port: Callable[[], int], web: httpx.Client
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"crew:{OTHER}\n")
    keys.chmod(0o600)

    def opens(key: str) -> bool:
        answer = web.post(f"{service.url}/predict", content=BODY, headers=JSON | {"x-api-key": key})
        assert answer.status_code in (200, 401)
        return answer.status_code == 200

    def told() -> int:
        """How often a mistake was told; the file is looked at when somebody asks."""
        assert opens(SECRET)
        return service.printed().count(KEPT)

    with served(bento, tmp_path / "service", free_port(), NBPROD_KEYS_FILE=str(keys)) as service:
        assert opens(OTHER) and not opens(SECRET)
        keys.write_text(f"crew:{OTHER}\nbilling:{SECRET}\n")
        wait_for(lambda: opens(SECRET), "the new key to open", 20)
        keys.write_text(f"billing:{SECRET}\n")
        wait_for(lambda: not opens(OTHER), "the old key not to open any more", 20)
        for mistake, change in enumerate((lambda: keys.write_text("crew\n"), keys.unlink), 1):
            change()
            wait_for(lambda mistake=mistake: told() == mistake, "the mistake to be told", 20)
            assert not opens(OTHER), "and nobody opens a service by breaking the file"
    assert SECRET not in service.printed() and OTHER not in service.printed()


@pytest.mark.parametrize("wrong", ["secret-without-a-name", "billing:sha256=4711", "bill ing:"])
def test_a_service_does_not_start_with_keys_that_are_none(
    bento: str, tmp_path: Path, free_port: Callable[[], int], wrong: str
) -> None:
    with served(bento, tmp_path / "service", free_port(), NBPROD_KEYS=wrong) as service:
        assert service.process.wait(60) != 0
    lines = [line for line in service.printed().splitlines() if "NBPROD_KEYS" in line or "API key" in line]
    assert len(lines) == 1 and wrong not in service.printed() and "Traceback" not in service.printed()


def test_without_keys_it_answers_its_own_machine_only(
    bento: str, tmp_path: Path, free_port: Callable[[], int], web: httpx.Client
) -> None:
    """As in a container: it listens everywhere. A request from elsewhere comes by a proxy of this machine."""
    elsewhere = {"x-forwarded-for": "203.0.113.7"}
    with served(bento, tmp_path / "service", free_port(), host="0.0.0.0") as service:
        assert web.get(f"{service.url}/model").status_code == 200
        refused = web.get(f"{service.url}/model", headers=elsewhere)
        assert refused.status_code == 403 and "NBPROD_KEYS" in refused.json()["error"]
        assert web.get(f"{service.url}/readyz", headers=elsewhere).status_code == 200
        wait_for(lambda: "There are no API keys" in service.printed(), "the operator to be told")
    with served(bento, tmp_path / "open", free_port(), host="0.0.0.0", NBPROD_OPEN="1") as service:
        assert web.get(f"{service.url}/model", headers=elsewhere).status_code == 200


def test_serve_wants_keys_before_others_can_reach_it(
    bento: str, project: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    with pytest.raises(UsageError, match="--open"):
        serve(bento, free_port(), host="0.0.0.0")
    command = [
        sys.executable,
        "-c",
        "import sys; from nbprod.cli import main; sys.exit(main())",
        "serve",
        bento,
    ]
    words = ["--host", "0.0.0.0", "--port", str(free_port())]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "NBPROD_KEYS" in done.stderr

    monkeypatch.setenv("NBPROD_KEYS", f"billing:{SECRET}")
    port = free_port()
    process = subprocess.Popen(
        [*command, "--host", "0.0.0.0", "--port", str(port)],
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: status(port) == 200, "the service to be ready", 120)
        assert status(port, "/model") == 401 and status(port, "/model", x_api_key=SECRET) == 200
    finally:
        stop(Served(process, port, project / "none"))
    assert load_settings(project).keys_file is None
