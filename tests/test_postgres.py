"""The index in a real PostgreSQL: the same answers, many processes, faults, and a password nobody sees."""

import logging
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import require_debian
from running import command, make, record_and_list, start_recording, truth, wait_for, write_notebook

from nbprod.experiment import database as database_module
from nbprod.experiment import index as index_module
from nbprod.experiment.index import rebuild, records
from nbprod.experiment.recording import read_record
from nbprod.experiment.runs import runs
from nbprod.settings import load_settings

PASSWORD = "kept-to-itself-4711"


class Server:
    """A PostgreSQL of the test's own: on loopback, in a temporary folder, as a user who is not root."""

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        self.programs, self.folder, self.port = programs, folder, port
        self.log = folder / "log"
        self.user: str | None = None
        self.process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.user = next(name for name in ("postgres", "nobody") if name in known)
            shutil.chown(folder, self.user)

    def make(self) -> None:
        """The data folder of a new server."""
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        owner = ["--username=ada", f"--pwfile={self.folder / 'password'}"]
        program = [str(self.programs / "initdb"), "-D", str(self.folder / "data"), *options, *owner]
        subprocess.run(program, user=self.user, cwd=self.folder, check=True, capture_output=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-c", "unix_socket_directories="]
        program = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), *where]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*program, "-c", "fsync=off"], user=self.user, cwd=self.folder, stdout=log, stderr=log
            )
        wait_for(self.answers, "PostgreSQL")

    def answers(self) -> bool:
        """Whether it takes connections."""
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it as it stands, with whatever it is doing; it recovers at the next start."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGQUIT)
        assert self.process is not None
        self.process.wait(60)
        self.process = None

    def url(self, database: str, password: str = PASSWORD) -> str:
        """The URL of a database, as a user writes it."""
        return f"postgresql://ada:{password}@127.0.0.1:{self.port}/{database}"

    def ask(self, question: Any, database: str) -> list[Any]:
        """The rows that a question gives."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(question)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def server(free_port: Callable[[], int]) -> Iterator[Server]:
    """A running server."""
    programs = Path(require_debian("postgresql", "/usr/lib/postgresql/*/bin/initdb")).parent
    with tempfile.TemporaryDirectory(prefix="nbprod-postgres-") as folder:
        made = Server(programs, Path(folder), free_port())
        made.make()
        made.start()
        yield made
        if made.process is not None:
            made.stop()


@pytest.fixture
def database(server: Server, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an empty database, which is the index of the current project."""
    assert project.is_dir()
    if server.process is None:
        server.start()
    server.ask("DROP DATABASE IF EXISTS runs WITH (FORCE)", "postgres")
    server.ask("CREATE DATABASE runs", "postgres")
    monkeypatch.setenv("NBPROD_INDEX", server.url("runs"))
    yield "runs"


def rows(server: Server, database: str) -> list[Any]:
    """What the index has."""
    return server.ask("SELECT * FROM nbprod_records_1 ORDER BY store, run", database)


def test_answers_are_those_of_the_notebooks_and_of_sqlite(
    database: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for texts that PostgreSQL does not take, and for numbers that JSON does not have."""
    for number in range(12):
        make(f"run-{number}", auc=number / 7)
    odd = {"nul": "a\0b", "half": "\ud83d", "smile": "\N{GRINNING FACE}", "big": 2**70, "nan": float("nan")}
    make("odd", params=odd, lineage={"packages": {"name\0": "\udc00" * 300}})
    make(os.fsdecode(b"half-\xff"))
    expected = repr(sorted(truth().items()))
    assert repr(sorted(records(load_settings()).items())) == expected

    def unread(path: Path) -> None:
        assert not path.parent.name.isascii(), f"read {path} again"

    monkeypatch.setattr(index_module, "read_record", lambda path: unread(path) or read_record(path))
    assert repr(sorted(records(load_settings()).items())) == expected
    monkeypatch.setattr(index_module, "read_record", read_record)
    monkeypatch.setenv("NBPROD_INDEX", "sqlite:///index.sqlite")
    assert repr(sorted(records(load_settings()).items())) == expected
    assert len(rows(server, database)) == 13


def test_rebuilt_index_is_equal(database: str, server: Server) -> None:
    for number in range(5):
        make(f"run-{number}")
    assert len(runs()) == 5
    before = rows(server, database)
    server.ask("UPDATE nbprod_records_1 SET content = 'damaged' WHERE run = 'run-1'", database)
    server.ask("UPDATE nbprod_parts_1 SET content = 'damaged'", database)
    assert records(load_settings()) == truth()
    server.ask("DROP TABLE nbprod_records_1, nbprod_parts_1", database)
    done = command("index", "--rebuild", "--json")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["{", '"runs":', "5", "}"], "")
    assert rows(server, database) == before and rebuild(load_settings()) == 5
    assert rows(server, database) == before and records(load_settings()) == truth()


def test_many_processes_lose_nothing(database: str, server: Server, project: Path) -> None:
    """16 at once, which also make the tables at once; the server reports no error at all."""
    start = server.log.stat().st_size
    record_and_list(project)
    assert len(rows(server, database)) == 160 and records(load_settings()) == truth()
    assert b"ERROR" not in server.log.read_bytes()[start:]


def test_projects_do_not_mix(database: str, server: Server, project: Path) -> None:
    """Not even two at the same path, as those of two machines may be."""
    for number in range(3):
        make(f"run-{number}")
    assert len(runs()) == 3
    (project / ".nbprod").rename(project / "first")
    make("run-0", auc=0.1)
    assert [run.metrics for run in runs()] == [{"auc": 0.1}] and rebuild(load_settings()) == 1
    assert len(rows(server, database)) == 4
    (project / ".nbprod").rename(project / "second")
    (project / "first").rename(project / ".nbprod")
    assert len(runs()) == 3 and records(load_settings()) == truth() and len(rows(server, database)) == 4


def test_database_goes_away_while_processes_work(database: str, server: Server, project: Path) -> None:
    """Everybody goes on with the notebooks and says why; afterwards the index catches up."""
    workers = [start_recording(project, number, 40) for number in range(4)]
    wait_for(lambda: _has_rows(server, database), "the first rows")
    server.stop()
    told = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4 and len(truth()) == 160
    said = [line for _, errors in told for line in errors.splitlines()]
    front = f"nbprod: the index postgresql+psycopg://ada:***@127.0.0.1:{server.port}/runs cannot be used, so"
    assert said and [line for line in said if not line.startswith(front)] == []
    server.start()
    assert len(runs()) == 160 and len(rows(server, database)) == 160
    assert records(load_settings()) == truth()


def _has_rows(server: Server, database: str) -> bool:
    try:
        return len(rows(server, database)) > 3
    except psycopg.errors.UndefinedTable:
        return False


@pytest.mark.usefixtures("database")
def test_database_goes_away_within_a_listing(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(30):
        make(f"run-{number:02}")
    monkeypatch.setattr(index_module, "BATCH", 10)

    def read(path: Path) -> dict[str, Any] | None:
        if path.parent.name == "run-15":
            server.stop()
        return read_record(path)

    monkeypatch.setattr(index_module, "read_record", read)
    assert records(load_settings()) == truth()
    assert len(caplog.records) == 1 and "so the notebooks are read" in caplog.text
    monkeypatch.setattr(index_module, "read_record", read_record)
    server.start()
    assert len(rows(server, "runs")) == 10
    assert len(runs()) == 30 and len(rows(server, "runs")) == 30


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("password", "password authentication failed"),
        ("database", 'database "missing" does not exist'),
        ("refused", "onnection refused"),
        ("frozen", "timeout expired"),
        ("option", "invalid connection option"),
    ],
)
@pytest.mark.usefixtures("database")
def test_unusable_database(
    server: Server, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    """The listing is that of the notebooks, after one line; only making the index anew fails."""
    make("first")
    urls = {
        "password": server.url("runs", f"{PASSWORD}-wrong"),
        "database": server.url("missing"),
        "refused": server.url("runs").replace(str(server.port), str(free_port())),
        "frozen": server.url("runs"),
        "option": server.url("runs") + f"?conect_timeout=1&sslpassword={PASSWORD}",
    }
    monkeypatch.setenv("NBPROD_INDEX", urls[fault])
    if fault == "frozen":
        server.signal(signal.SIGSTOP)
    try:
        done = command("runs", "--json")
        assert done.returncode == 0 and '"id": "first"' in done.stdout
        assert reason in done.stderr and done.stderr.count("\n") == 1
        failed = command("index", "--rebuild")
        assert failed.returncode == 1 and reason in failed.stderr and failed.stderr.count("\n") == 1
        assert PASSWORD not in done.stderr + failed.stderr
    finally:
        server.signal(signal.SIGCONT)


@pytest.mark.usefixtures("database")
def test_server_that_refuses_to_write(server: Server) -> None:
    server.ask("ALTER DATABASE runs SET default_transaction_read_only = on", "postgres")
    make("first")
    done = command("runs", "--json")
    assert done.returncode == 0 and "read-only transaction" in done.stderr and done.stderr.count("\n") == 1
    assert command("index").returncode == 1


@pytest.mark.usefixtures("database")
def test_writer_that_never_ends(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It makes listings say so, and not wait for ever; readers do not wait at all."""
    make("first")
    assert len(runs()) == 1
    monkeypatch.setattr(database_module, "PATIENCE", 0.2)
    with psycopg.connect(server.url("runs")) as writer:
        writer.execute("SELECT pg_advisory_xact_lock(%s)", [database_module.LOCK])
        assert len(runs()) == 1 and caplog.text == ""
        make("second")
        assert len(runs()) == 2 and "lock timeout" in caplog.text and len(rows(server, "runs")) == 1
    assert len(runs()) == 2 and len(rows(server, "runs")) == 2


@pytest.mark.usefixtures("project")
def test_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBPROD_INDEX", f"postgres://ada:{PASSWORD}@127.0.0.1/runs")
    make("first")
    code = "import sys; sys.modules['psycopg'] = None\n"
    code += "from nbprod.cli import main\nsys.exit(main(['runs']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'nbprod[postgres]'" in done.stderr
    assert done.stderr.count("\n") == 1 and PASSWORD not in done.stderr


def test_password_is_in_no_file(
    database: str, server: Server, project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a run, a listing and a failure, it is neither in the project nor in what was logged."""
    caplog.set_level(logging.DEBUG)
    write_notebook(project / "nbs" / "train.ipynb", "depth = 1", "print(depth)")
    done = command("run", "nbs/train.ipynb")
    assert done.returncode == 0 and len(runs()) == 1 and len(rows(server, database)) == 1
    server.ask("DROP DATABASE runs WITH (FORCE)", "postgres")
    assert len(runs()) == 1 and "so the notebooks are read" in caplog.text
    assert PASSWORD not in done.stdout + done.stderr + caplog.text + repr(load_settings())
    written = [file for file in project.rglob("*") if file.is_file()]
    assert len(written) > 3 and not [file for file in written if PASSWORD.encode() in file.read_bytes()]
