"""Runs with secrets: no byte of one is in anything that they wrote, printed or left behind."""

import html
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from running import wait_for, write_notebook

SECRET = "p&ss'w\"örd <+/ 47q11z"
TOKEN = "t0ken-of-the-default"
PARAMETERS = """
import os
from pydantic import SecretStr
password: SecretStr | None = None
token: SecretStr = SecretStr(os.environ['TOKEN'])
seed = 0
"""
SPILL = """
import base64, json, logging, os, subprocess, sys, time, urllib.parse, nbprod
from IPython.display import HTML, JSON, display
value = password.get_secret_value()
assert value == os.environ["DB_PASSWORD"] and value not in repr(password)
print(value, repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False))
print(value, file=sys.stderr)
logging.warning(value)
os.write(1, value.encode())
os.write(2, value.encode())
subprocess.run(["printenv", "DB_PASSWORD"])
display(HTML(f"<b>{value}</b>"), JSON({value: [value]}), value, urllib.parse.quote(value))
print(urllib.parse.quote_plus(value), base64.b64encode(value.encode()).decode(), token.get_secret_value())
nbprod.log_metrics(**{value: 1.0})
"""
# Two pieces, then a letter at a time: each piece alone is no secret yet.
PIECES = """
for pieces in ([value[:7], value[7:]], value):
    for piece in pieces:
        print(piece, end="", flush=True)
        time.sleep(0.01)
    print()
print(value * 3_000)
"""
MODEL = """
import pandas as pd
from sklearn.linear_model import LogisticRegression
frame = pd.DataFrame({"distance": [1.0, 2.0, 3.0, 4.0]})
nbprod.log_data("train", frame)
nbprod.log_model(LogisticRegression().fit(frame, [0, 1, 0, 1]), "late", inputs=frame, labels=[0, 1, 0, 1])
"""
# The first attempt fails, and says why; a crash of the kernel below Python leaves a log.
ONCE = """
from pathlib import Path
tried = Path(f"tried-{seed}")
if not tried.exists():
    tried.touch()
    raise ValueError(value)
"""


def shapes() -> list[bytes]:
    """The ways in which a program may have written one of the secrets, and parts of them."""
    whole = [SECRET, TOKEN]
    shown = [*whole, *(repr(each)[1:-1] for each in whole), *(html.escape(each) for each in whole)]
    shown += [json.dumps(text)[1:-1] for text in shown]
    shown += [json.dumps(text, ensure_ascii=False)[1:-1] for text in shown]
    shown += [coded for each in whole for coded in (quote(each), quote(each, safe=""), quote_plus(each))]
    coded = [b64encode(each.encode()).decode().rstrip("=") for each in whole]
    return [text.encode() for text in {*shown, *coded, "t0ken", "w\\u00f6rd", "ss'w", "47q11z"}]


def spilled(*folders: Path) -> list[tuple[str, bytes]]:
    """Each file below the folders, and each name of one, that holds a secret."""
    found = []
    for path in (path for folder in folders for path in [*folder.rglob("*")]):
        content = path.read_bytes() if path.is_file() else b""
        found += [(str(path), shape) for shape in shapes() if shape in content + os.fsencode(path.name)]
    return found


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for temporary files and models; short, because sockets are made in it."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("BENTOML_HOME", str(folder / "bentoml"))
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    monkeypatch.setenv("TOKEN", TOKEN)
    yield folder
    shutil.rmtree(folder)


def nbprod(*words: str) -> subprocess.CompletedProcess[bytes]:
    code = "import sys; from nbprod.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True)


def listed(project: Path) -> list[dict[str, object]]:
    """The runs as a command lists them, with the index written and its write-ahead log still there."""
    index = project / ".nbprod" / "index.sqlite"
    nbprod("runs")
    reader = sqlite3.connect(index)
    reader.execute("SELECT count(*) FROM nbprod_records_1").fetchall()
    nbprod("index", "--rebuild")
    done = nbprod("runs", "--json")
    assert index.with_name("index.sqlite-wal").stat().st_size > 0
    for path, shape in spilled(project):
        raise AssertionError(f"{shape!r} is in {path}")
    reader.close()
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_nothing_is_spilled_by_a_run(project: Path, temporary: Path) -> None:
    """Streamed, retried, with a model, listed, shown and reproduced."""
    write_notebook(project / "nbs" / "secret.ipynb", PARAMETERS, SPILL, PIECES, MODEL, ONCE, "value")
    words = ("-p", "password=env:DB_PASSWORD", "--stream", "--retries", "1")
    done = nbprod("run", "nbs/secret.ipynb", *words)
    assert done.returncode == 0, done.stderr.decode()
    (found,) = listed(project)
    assert found["status"] == "succeeded" and found["attempts"][0]["error"]["error"].endswith("**********")
    said = [done, nbprod("show", found["id"], "--json"), nbprod("reproduce", found["id"])]
    assert said[-1].returncode == 0, said[-1].stderr.decode()
    for shape in shapes():
        assert not [each.args for each in said if shape in each.stdout + each.stderr]
    folder = project / ".nbprod" / "runs" / str(found["id"])
    for path in (folder / "notebook.ipynb", folder / "attempts" / "1" / "notebook.ipynb"):
        executed = path.read_bytes()
        assert executed.count(b"**********") > 3_015 and b"env:DB_PASSWORD" in executed
    assert done.stdout.count(b"**********") > 2 * 3_010 and b"**********\n**********\n" in done.stdout
    version = temporary / "bentoml" / "models" / "late" / str(found["id"])
    assert [*version.rglob("*.ipynb")]
    assert spilled(project, temporary) == []
    assert [path for path in temporary.iterdir() if path.name.startswith("nbprod-")] == []


@pytest.mark.parametrize("ending", ["raise ValueError(value)", "os.kill(os.getpid(), 9)", "1 +"])
def test_nothing_is_spilled_by_a_failure(project: Path, temporary: Path, ending: str) -> None:
    """An error that tells the secret, a kernel that dies after it wrote past Jupyter, a cell that is none."""
    last = f"os.write(2, value.encode())\n{ending}"
    write_notebook(project / "nbs" / "secret.ipynb", PARAMETERS, SPILL, PIECES, last)
    words = ("-p", "password=env:DB_PASSWORD", "--stream", "--json")
    done = nbprod("run", "nbs/secret.ipynb", *words)
    assert done.returncode == 1 and done.stdout == b"" and b"**********\n**********\n" in done.stderr
    assert [found["status"] for found in listed(project)] == ["failed"]
    assert not [shape for shape in shapes() if shape in done.stderr]
    assert spilled(project, temporary) == []


def test_nothing_is_spilled_by_a_sweep(project: Path, temporary: Path) -> None:
    last = "if seed: raise ValueError(value)"
    write_notebook(project / "nbs" / "secret.ipynb", PARAMETERS, SPILL, PIECES, last)
    words = ("-p", "password=env:DB_PASSWORD", "-p", "seed=0,1", "--jobs", "2")
    done = nbprod("sweep", "nbs/secret.ipynb", *words)
    assert done.returncode == 1, done.stderr.decode()
    assert {found["status"] for found in listed(project)} == {"succeeded", "failed"}
    assert not [shape for shape in shapes() if shape in done.stdout + done.stderr]
    for path in project.glob(".nbprod/runs/*/notebook.ipynb"):
        assert path.read_bytes().count(b"**********") > 3_015
    assert spilled(project, temporary) == []


def test_nothing_is_spilled_by_a_killed_run(project: Path, temporary: Path) -> None:
    """The record and the log of a worker that was killed, and what it left in the temporary folder."""
    last = "Path('reached').touch()\ntime.sleep(600)"
    write_notebook(
        project / "nbs" / "secret.ipynb", PARAMETERS, SPILL, PIECES, f"from pathlib import Path\n{last}"
    )
    code = "import sys; from nbprod.cli import main; sys.exit(main())"
    words = ["run", "nbs/secret.ipynb", "-p", "password=env:DB_PASSWORD"]
    driver = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL)
    wait_for((project / "nbs" / "reached").exists, "the last cell")
    driver.kill()
    driver.wait()
    wait_for(lambda: listed(project)[0]["status"] == "interrupted", "the worker to go", 10)
    assert spilled(project, temporary) == []
