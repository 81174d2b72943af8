"""What tests share: stores of their own, a tiny project, free ports, and programs that Debian packages."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Chromium as root in a closed network; without the others it would look for its maker's servers.
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_configure(config: pytest.Config) -> None:
    """Give the session, and every process it starts, stores of its own and this environment's programs.

    BentoML reads BENTOML_HOME once, when it is imported: a fixture could come too late.
    """
    home = tempfile.TemporaryDirectory(prefix="nbprod-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    config.add_cleanup(_forget_locks)
    for name in [name for name in os.environ if name.startswith("NBPROD_")]:
        del os.environ[name]
    os.environ["BENTOML_HOME"] = str(Path(home.name) / "bentoml")
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Where this is set, nothing is compiled once and for all, and importing scikit-learn takes 6 s, not 2.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _locks() -> list[Path]:
    """The files that the processes of a test run lock, for the turn and the room; none for one process."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    names = [f"nbprod-{run}-{name}.lock" for name in ("turn", "room")] if run else []
    return [Path(tempfile.gettempdir(), name) for name in names]


def _forget_locks() -> None:
    """Remove the files; a process that still tests is the last one, and makes its own."""
    for path in _locks():
        path.unlink(missing_ok=True)


@contextmanager
def _room(alone: bool) -> Iterator[None]:
    """Room for a test beside those of other processes, or for it alone."""
    with ExitStack() as stack:
        if files := [stack.enter_context(path.open("w")) for path in _locks()]:
            turn, room = files
            fcntl.flock(turn, fcntl.LOCK_EX)  # who waits for the others goes before those who come later
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(turn, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run tests that are marked `alone` while no other test runs."""
    with _room(item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session")
def bentoml_home() -> Path:
    """The session's BentoML store, the one that BENTOML_HOME names."""
    return Path(os.environ["BENTOML_HOME"])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with one commit, which is also the current folder; its store is inside it."""
    folder = tmp_path / "project"
    (folder / "nbs").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = small\n\n[nbprod]\n", encoding="utf-8")
    (folder / ".gitignore").write_text(".nbprod/\n", encoding="utf-8")
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "Start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def store(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BentoML store of the test's own, in a project."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    assert project.is_dir()
    return tmp_path / "bentoml"


@pytest.fixture(scope="session")
def bento(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Bento of a model that compiles wholly, built in an empty folder for all who only serve it."""
    from operating import build_delay

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        return build_delay()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that gives a TCP port of localhost which nobody listens on, another one at each call."""
    from nbprod.serve import process

    given: set[int] = set()

    def find() -> int:
        while True:
            port = process.free_port()
            if port not in given:
                given.add(port)
                return port

    return find


@cache
def _apt_update() -> None:
    subprocess.run(["apt-get", "update", "-qq"], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _apt_install(packages: str) -> None:
    """Install `packages` quietly; whether that worked shows in the program that is looked for afterwards."""
    options = ["-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
    with Path(tempfile.gettempdir(), "nbprod-apt.lock").open("w") as lock:  # other processes test as well
        fcntl.flock(lock, fcntl.LOCK_EX)
        _apt_update()
        subprocess.run(
            ["apt-get", "install", *options, *packages.split()],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


def _find_program(program: str) -> str | None:
    """The path of a program; the last one if it is a pattern such as /usr/lib/*/bin/program."""
    if "*" in program:
        return max(map(str, Path("/").glob(program.lstrip("/"))), default=None)
    return shutil.which(program)


def require_debian(packages: str, program: str) -> str:
    """The path of `program`, from the Debian `packages` (space between them) if it is not there yet.

    `program` may be a pattern for a path. Installs the packages where we may: as root on Debian. Elsewhere
    the test is skipped; in CI (CI=true), where everything has to be tested, it fails.
    """
    if _find_program(program) is None and shutil.which("apt-get") and os.geteuid() == 0:
        _apt_install(packages)
    found = _find_program(program)
    if found is None:
        missing = f"{program} is missing; on Debian: apt-get install {packages}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium; tests that ask for it are skipped where there is none."""
    return require_debian("chromium", "/usr/bin/chromium")


@pytest.fixture(scope="session")
def podman() -> str:
    """The path of podman with what it needs to build and run images."""
    return require_debian("podman skopeo runc netavark aardvark-dns iptables", "/usr/bin/podman")


@pytest.fixture(scope="session")
def late_flights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service of real flights, `late_flights.Served`, which tests share."""
    from late_flights import serve_late_flights

    with serve_late_flights(tmp_path_factory.mktemp("late_flights")) as served:
        yield served
