"""Tables scored from end to end: formats, places, faults, and processes that are killed while they work."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from psutil import Process
from running import alive, mounted, start_driver, wait_for
from test_cluster import Cluster, new_cluster
from test_remote import server as s3  # noqa: F401

from nbprod.errors import ClusterError, NbprodError, NotFoundError, ScoreError, StoreError, UsageError
from nbprod.model.scoring import Scored
from nbprod.model.store import Model, load

CARRIERS = ["AA", "DL", "UA"]

# A step that leaves a mark for each batch, and waits where it meets a distance that is held.
WATCHED = """
import os, time, uuid
from pathlib import Path

def watched(frame):
    meeting, distance = Path(os.environ["MEETING"]), int(frame["distance"].iloc[0])
    mark = meeting / f"{distance} {os.getpid()} {uuid.uuid4().hex}.tmp"
    mark.touch()
    mark.rename(mark.with_suffix(".mark"))
    while (meeting / f"hold-{distance}").exists():
        time.sleep(0.02)
    return frame
"""
TRAIN = """
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder
import nbprod
from small.watched import watched
rows = pd.DataFrame({"carrier": ["AA", "DL", "UA"] * 20, "distance": range(100, 6100, 100)})
encoder = OneHotEncoder(handle_unknown="ignore")
codes = make_column_transformer((encoder, ["carrier"]), remainder="passthrough")
late = ((rows.distance // 100) % 7 > 2).map({True: "late", False: "on time"})
for name, steps in (("delay", ()), ("watched", (FunctionTransformer(watched),))):
    pipeline = make_pipeline(*steps, codes, LogisticRegression(max_iter=500)).fit(rows, late)
    nbprod.log_model(pipeline, name, rows)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a library, and two models: `delay`, and `watched` that uses the library."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "small").mkdir()
    (folder / "small" / "__init__.py").touch()
    (folder / "small" / "watched.py").write_text(WATCHED)
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = small\n\n[nbprod]\njobs = 2\n")
    (folder / "meeting").mkdir()
    environment = {"BENTOML_HOME": str(folder / "bentoml"), "MEETING": str(folder / "meeting")}
    code = f"import os; os.environ.update({environment!r})\n{TRAIN}"
    _, errors = start_driver(code, folder).communicate()
    assert (folder / "bentoml" / "models" / "watched").exists(), errors
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for tables, with the project as current folder."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("BENTOML_HOME", str(home / "bentoml"))
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    (tmp_path / "meeting").mkdir()
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def model(place: Path) -> Model:  # noqa: ARG001
    """The model without a library."""
    return load("delay")


def flights(count: int, first: int = 0) -> pd.DataFrame:
    """So many flights, with an id of digits."""
    numbers = np.arange(first, first + count)
    ids = [f"{number:07}" for number in numbers]
    carriers = np.array(CARRIERS)[numbers % 3]
    return pd.DataFrame({"flight": ids, "carrier": carriers, "distance": numbers % 6000, "late": numbers % 2})


def expected(model: Model, table: pd.DataFrame) -> pd.DataFrame:
    """The output as plain pandas makes it."""
    inputs = table[["carrier", "distance"]]
    chances = model.pipeline.predict_proba(inputs)
    columns = {"prediction": model.pipeline.predict(inputs)}
    columns |= {f"probability_{label}": chances[:, each] for each, label in enumerate(model.classes or [])}
    return pd.concat([table[["flight", "late"]].reset_index(drop=True), pd.DataFrame(columns)], axis=1)


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    """The test fails unless both are equal; a CSV's own columns are text."""
    for name in ("flight", "late"):
        assert found[name].astype(str).tolist() == wanted[name].astype(str).tolist(), name
    rest = list(wanted.columns[2:])
    assert list(found.columns) == list(wanted.columns)
    pd.testing.assert_frame_equal(found[rest], wanted[rest], check_dtype=False, rtol=1e-12)


def score(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """The command `nbprod score`."""
    return subprocess.run(["nbprod", "score", *words], capture_output=True, text=True, **options)


# What is read and what is written


def test_every_format_gives_what_the_pipeline_gives(model: Model, place: Path) -> None:
    table = flights(5000)
    wanted = expected(model, table)
    table.to_parquet(place / "a.parquet", row_group_size=777)
    table.to_csv(place / "b.csv", index=False)
    table.to_csv(place / "c.csv.gz", index=False)
    for name in ("a.parquet", "b.csv", "c.csv.gz"):
        for output in (f"{name}.out.parquet", f"{name}.out.csv"):
            result = model.score_table(place / name, place / output, jobs=2)
            assert isinstance(result, Scored) and (result.rows, result.rejected) == (5000, 0)
            read = pd.read_parquet if output.endswith("parquet") else pd.read_csv
            found = (
                read(place / output)
                if output.endswith("parquet")
                else read(place / output, dtype={"flight": str})
            )
            same(found, wanted)
    assert pq.read_schema(place / "a.parquet.out.parquet").metadata[b"nbprod.model"] == model.tag.encode()
    assert not [*place.glob(".*")]


def test_a_folder_gives_a_folder_or_one_file(model: Model, place: Path) -> None:
    tables = {"2012/a.parquet": flights(300), "2013/b.csv": flights(200, 300), "c.csv.gz": flights(100, 500)}
    for name, table in tables.items():
        path = place / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    (place / "in" / "_SUCCESS").touch()
    model.score_table(place / "in", place / "out")
    made = {
        path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*") if path.is_file()
    }
    assert made == {"2012/a.parquet", "2013/b.parquet", "c.parquet"}
    same(pd.read_parquet(place / "out" / "2013" / "b.parquet"), expected(model, tables["2013/b.csv"]))
    with pytest.raises(UsageError, match="other columns to keep than"):  # `late` is a number or a text
        model.score_table(place / "in", place / "one.parquet")
    model.score_table(place / "in", place / "one.parquet", keep=["flight"])
    one = pd.read_parquet(place / "one.parquet")
    assert one["flight"].tolist() == [value for table in tables.values() for value in table["flight"]]
    model.score_table(f"{place}/in/*/*", place / "some", keep=["flight"])
    assert sorted(path.name for path in (place / "some").rglob("*.parquet")) == ["a.parquet", "b.parquet"]
    # Without anything to tell rows by, their place does.
    bare = place / "bare"
    bare.mkdir()
    for name in ("x", "y"):
        flights(3)[["carrier", "distance"]].to_parquet(bare / f"{name}.parquet")
    model.score_table(bare, place / "bare.parquet")
    told = pd.read_parquet(place / "bare.parquet")[["file", "row"]].to_numpy().tolist()
    assert told == [[f"{name}.parquet", row] for name in "xy" for row in range(3)]


def test_large_and_small_row_groups_are_cut_and_joined(model: Model, place: Path) -> None:
    """A group of several parts, a part of several groups, and more processes than either."""
    table = flights(400_000)
    wanted = expected(model, table)
    for rows, jobs in ((400_000, 3), (30_000, 2), (170_000, 2)):
        table.to_parquet(place / "in.parquet", row_group_size=rows)
        result = model.score_table(place / "in.parquet", place / "out.parquet", jobs=jobs, force=True)
        assert isinstance(result, Scored) and result.rows == 400_000
        same(pd.read_parquet(place / "out.parquet"), wanted)


def test_a_csv_of_several_parts_with_line_breaks_in_it(model: Model, place: Path) -> None:
    table = flights(400_000).assign(note='two\nlines, and a "quote"' + "." * 30)
    for name in ("in.csv", "in.csv.gz"):
        table.to_csv(place / name, index=False)
        assert name == "in.csv.gz" or (place / name).stat().st_size > 2**24
        result = model.score_table(
            place / name, place / "out.parquet", jobs=2, force=True, keep=["flight", "late"]
        )
        assert isinstance(result, Scored) and result.rows == 400_000
        same(pd.read_parquet(place / "out.parquet"), expected(model, table))


def test_what_is_in_memory(model: Model, place: Path) -> None:
    table = flights(1000)
    wanted = expected(model, table)
    frame = model.score_table(table.set_index(pd.Index(range(1000, 0, -1))))
    assert isinstance(frame, pd.DataFrame) and frame.index.tolist() == [*range(1000, 0, -1)]
    same(frame.reset_index(drop=True), wanted)
    table.to_parquet(place / "in.parquet")
    for source in (
        pa.Table.from_pandas(table),
        pa.dataset.dataset(place / "in.parquet"),
        place / "in.parquet",
    ):
        found = model.score_table(source)
        assert isinstance(found, pd.DataFrame)
        same(found, wanted)
    for source in (table, pa.Table.from_pandas(table)):
        model.score_table(source, place / "out.parquet", force=True)
        same(pd.read_parquet(place / "out.parquet"), wanted)
    assert not [*place.glob(".*")]
    with pytest.raises(UsageError, match="A list cannot be scored"):
        model.score_table([1, 2, 3])


# Rows that break the contract


def broken(path: Path) -> None:
    """A table in whose rows 1, 3 and 4 something is wrong."""
    lines = [
        "flight,carrier,distance",
        "001,AA,100",
        "002,,200",
        "003,UA,300",
        "004,DL,far",
        "005",
        "006,AA,NA",
    ]
    path.write_text("\n".join([*lines[:5], lines[5], "007,ZZ,700"]) + "\n")


def test_rejected_rows_go_aside_with_the_reason(place: Path) -> None:
    broken(place / "in.csv")
    result = score("delay:latest", str(place / "in.csv"), str(place / "out.parquet"), "--json")
    facts = json.loads(result.stdout)
    assert (result.returncode, facts["rows"], facts["rejected"]) == (0, 6, 3), result.stderr
    assert facts["output"] == str(place / "out.parquet") and facts["seconds"] > 0
    assert pd.read_parquet(place / "out.parquet")["flight"].tolist() == ["001", "003", "007"]
    rejected = pd.read_parquet(facts["rejected_output"])
    assert rejected["file"].tolist() == ["in.csv"] * 3
    assert rejected["row"].tolist() == [1, 3, 4] and rejected["column"].isna().tolist() == [
        False,
        False,
        True,
    ]
    assert rejected["column"].tolist()[:2] == ["carrier", "distance"]
    assert rejected["flight"].tolist()[:2] == ["002", "004"] and rejected["distance"].tolist()[1] == "far"
    assert (
        "null" in rejected["message"][0]
        and "far" in rejected["message"][1]
        and "values" in rejected["message"][2]
    )
    # With an output in CSV, so are they; what was rejected earlier is no longer there when all is well.
    score("delay:latest", str(place / "in.csv"), str(place / "out.csv"))
    assert len(pd.read_csv(place / "out.rejected.csv")) == 3
    flights(5).to_csv(place / "in.csv", index=False)
    assert score("delay:latest", str(place / "in.csv"), str(place / "out.csv"), "--force").returncode == 0
    assert not (place / "out.rejected.csv").exists()


def test_strict_stops_at_the_first_of_them(place: Path) -> None:
    table = flights(300_000)
    table.loc[[200_000, 200_007], "carrier"] = None
    table.to_parquet(place / "in.parquet")
    done = score("delay:latest", str(place / "in.parquet"), str(place / "out.parquet"), "--strict")
    assert done.returncode == 1 and done.stdout == ""
    assert f"{place}/in.parquet: row 200000, column 'carrier': must not be null" in done.stderr
    assert not (place / "out.parquet").exists()
    assert score("delay:latest", str(place / "in.parquet"), str(place / "out.parquet")).returncode == 0
    assert pd.read_parquet(place / "out.rejected.parquet")["row"].tolist() == [200_000, 200_007]


def test_a_table_without_one_row_that_fits_is_an_error(model: Model, place: Path) -> None:
    flights(10).assign(distance="far").to_parquet(place / "in.parquet")
    with pytest.raises(ScoreError, match="No row keeps the contract"):
        model.score_table(place / "in.parquet", place / "out.parquet")
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == ["in.parquet"]


# Errors, each before anything is written


def test_errors_name_what_is_wrong(model: Model, place: Path) -> None:
    flights(10).to_parquet(place / "in.parquet")
    flights(10).rename(columns={"distance": "Distance"}).to_csv(place / "misspelled.csv", index=False)
    flights(0).to_parquet(place / "empty.parquet")
    (place / "nothing.csv").touch()
    (place / "torn.parquet").write_bytes((place / "in.parquet").read_bytes()[:-30])
    (place / "torn.csv.gz").write_bytes(gzip.compress(b"flight,carrier,distance\n" + os.urandom(5000))[:-900])
    (place / "latin.csv").write_bytes("flight,carrier,distance\n1,Ü,5\n".encode("latin-1"))
    (place / "there.parquet").touch()
    (place / "notes.txt").touch()
    (place / "folder").mkdir()
    wrong = [
        ("delai", "in.parquet", "out.parquet", 2, "There is no model 'delai'"),
        ("delay@production", "in.parquet", "out.parquet", 2, "has no alias"),
        ("delay", "in.parquet", "in.parquet", 2, "is an input"),
        ("delay", "in.parquet", "there.parquet", 2, "exists already"),
        ("delay", "in.parquet", "out", 2, "end its name in .parquet or .csv"),
        ("delay", "in.parquet", "out.csv.gz", 2, "not written compressed"),
        ("delay", "missing.parquet", "out.parquet", 2, "missing.parquet does not exist"),
        ("delay", "*.pq", "out.parquet", 2, "No Parquet or CSV file fits"),
        ("delay", "folder", "out.parquet", 2, "No Parquet or CSV file is in the folder"),
        ("delay", "notes.txt", "out.parquet", 2, "must end in one of"),
        ("delay", "misspelled.csv", "out.parquet", 2, "no column 'distance'. Did you mean 'Distance'?"),
        ("delay", "empty.parquet", "out.parquet", 2, "has no rows"),
        ("delay", "nothing.csv", "out.parquet", 2, "is empty"),
        ("delay", "torn.parquet", "out.parquet", 1, "torn.parquet cannot be read"),
        ("delay", "torn.csv.gz", "out.parquet", 1, "torn.csv.gz cannot be read"),
        ("delay", "latin.csv", "out.parquet", 1, "latin.csv cannot be read"),
    ]
    before = sorted(place.iterdir())
    for name, source, output, code, words in wrong:
        done = score(name, str(place / source), str(place / output))
        assert words in done.stderr and done.returncode == code, (source, done.stderr)
        assert done.stderr.startswith("nbprod: ") and done.stderr.count("\n") <= 4, done.stderr
    assert [path for path in sorted(place.iterdir()) if not path.name.startswith(".")] == before
    for options, words in [({"keep": ["flihgt"]}, "Did you mean 'flight'"), ({"keep": ["*"]}, None)]:
        if words:
            with pytest.raises(UsageError, match=words):
                model.score_table(place / "in.parquet", place / "out.parquet", **options)
    flights(3).assign(prediction=1).to_parquet(place / "taken.parquet")
    with pytest.raises(UsageError, match="has a column 'prediction', as the output would"):
        model.score_table(place / "taken.parquet", place / "out.parquet")
    with pytest.raises(UsageError, match="in the folder of the inputs"):
        model.score_table(place.parent, place / "out.parquet")
    with pytest.raises(UsageError, match="may not be written"):
        model.score_table(place / "in.parquet", "/proc/out.parquet")
    with pytest.raises(UsageError, match="must be local"):
        model.score_table(place / "in.parquet", place / "out.parquet", executor="here")


def test_a_full_disk_leaves_nothing_half_written(place: Path) -> None:
    flights(400_000).to_parquet(place / "in.parquet")
    with mounted(place / "disk", "size=2m"):
        done = score("delay", str(place / "in.parquet"), str(place / "disk" / "out.parquet"))
        assert done.returncode == 1 and "space" in done.stderr, done.stderr
        assert [path.name for path in (place / "disk").iterdir()] == [".out.parquet.nbprod"]


# Processes that end early


def marks(place: Path) -> Counter[int]:
    """How often a batch that begins with each distance was computed."""
    return Counter(int(path.name.split()[0]) for path in (place.parent / "meeting").glob("*.mark"))


def watched_files(place: Path, count: int = 6) -> list[Path]:
    """As many files of one part each, that begin with the distances 0, 100, 200 and so on."""
    (place / "in").mkdir()
    for number in range(count):
        flights(50, 100 * number).to_parquet(place / "in" / f"{number}.parquet")
    return sorted((place / "in").iterdir())


def hold(place: Path, distance: int) -> Path:
    """Let batches that begin with a distance wait, until the path that is returned is removed."""
    path = place.parent / "meeting" / f"hold-{distance}"
    path.touch()
    return path


def start(place: Path, *more: str) -> "subprocess.Popen[str]":
    """The command that scores the watched files, in the background."""
    command = ["nbprod", "score", "watched", str(place / "in"), str(place / "out"), "--json", *more]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def worker_at(place: Path, distance: int, but: int | None = None) -> int:
    """The process that is at a batch which begins with a distance."""

    def find() -> int | None:
        found = [int(path.name.split()[1]) for path in (place.parent / "meeting").glob(f"{distance} *.mark")]
        return next((pid for pid in found if alive(pid) and pid != but), None)

    pid: int = wait_for(find, f"a worker at {distance}")
    return pid


def done_parts(place: Path) -> int:
    """How many parts the account of the job has."""
    return len([*(place / ".out.nbprod").glob("*/*.json")])


def finished(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a command that succeeded printed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    facts: dict[str, Any] = json.loads(output)
    return facts


def check_output(place: Path, files: list[Path]) -> None:
    """The test fails unless the output is that of these files, and nothing else is left."""
    model = load("delay")  # the other one but for the step that watches
    for path in files:
        same(pd.read_parquet(place / "out" / path.name), expected(model, pd.read_parquet(path)))
    assert not [*place.glob(".*")]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda each: each.name
)
def test_an_interrupted_job_goes_on_where_it_was(place: Path, number: signal.Signals) -> None:
    files, held = watched_files(place), hold(place, 400)
    process = start(place)
    worker = worker_at(place, 400)
    wait_for(lambda: done_parts(place) == 5, "all parts but one")
    children = [child.pid for child in Process(process.pid).children(recursive=True)]
    assert worker in children
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), errors
    for pid in children:
        wait_for(lambda pid=pid: not alive(pid), "the end of every process")
    assert not (place / "out").exists() and done_parts(place) == 5
    held.unlink()
    assert finished(start(place))["resumed"] == 5
    assert marks(place) == {0: 1, 100: 1, 200: 1, 300: 1, 400: 2, 500: 1}
    check_output(place, files)


def test_another_input_or_model_starts_anew(place: Path) -> None:
    files, held = watched_files(place), hold(place, 400)
    process = start(place)
    wait_for(lambda: done_parts(place) == 5, "all parts but one")
    process.kill()
    process.communicate()
    held.unlink()
    flights(60, 100).to_parquet(files[1])
    facts = finished(start(place))
    assert (facts["resumed"], facts["rows"]) == (4, 310)
    assert marks(place)[100] == 2 and marks(place)[0] == 1
    check_output(place, files)
    # The same with other columns carried through, or by another model, is another job.
    assert finished(start(place, "--force", "--keep", "flight"))["resumed"] == 0


def test_one_writer_at_a_time(place: Path) -> None:
    watched_files(place, 2)
    held = hold(place, 0)
    process = start(place)
    worker_at(place, 0)
    other = start(place)
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 2 and "Another process is writing" in errors
    held.unlink()
    finished(process)


def test_a_killed_worker_is_replaced_once(place: Path) -> None:
    files, held = watched_files(place), hold(place, 0)
    process = start(place)
    first = worker_at(place, 0)
    os.kill(first, signal.SIGKILL)
    second = worker_at(place, 0, but=first)
    held.unlink()
    assert finished(process)["rows"] == 300 and second != first
    assert marks(place)[0] == 2 and sum(marks(place).values()) == 7
    check_output(place, files)


def test_a_part_that_kills_two_workers_is_an_error(place: Path) -> None:
    files, held = watched_files(place), hold(place, 400)
    process = start(place)
    wait_for(lambda: done_parts(place) == 5, "all parts but one")
    first = worker_at(place, 400)
    os.kill(first, signal.SIGKILL)
    os.kill(worker_at(place, 400, but=first), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Two processes died at part 0 of" in errors and "4.parquet" in errors
    assert "status -9" in errors and not (place / "out").exists()
    held.unlink()
    assert finished(start(place))["resumed"] == 5
    check_output(place, files)


# Elsewhere


def test_tables_in_s3(model: Model, place: Path, s3: Callable[[], None]) -> None:  # noqa: F811
    table = flights(200_000)
    with fsspec.open("s3://team/in/a.parquet", "wb") as stream:
        table.to_parquet(stream, row_group_size=50_000)
    with fsspec.open("s3://team/in/b.csv.gz", "wb", compression="gzip") as stream:
        flights(1000).to_csv(stream, index=False)
    result = model.score_table("s3://team/in/a.parquet", "s3://team/out/a.parquet", jobs=2)
    assert isinstance(result, Scored) and result.output == "s3://team/out/a.parquet"
    with fsspec.open("s3://team/out/a.parquet", "rb") as stream:
        same(pd.read_parquet(stream), expected(model, table))
    model.score_table("s3://team/in", "s3://team/both", keep=["flight"])
    files = fsspec.filesystem("s3").find("team/both")
    assert [name.rpartition("/")[2] for name in files] == ["_SUCCESS", "a.parquet", "b.parquet"]
    assert not [*(place / ".nbprod").rglob("*.arrow")]
    with pytest.raises(UsageError, match="exists already"):
        model.score_table("s3://team/in", "s3://team/both")
    with pytest.raises(NotFoundError, match=r"s3://team/in/c\.parquet does not exist"):
        model.score_table("s3://team/in/c.parquet", place / "c.parquet")
    s3()
    with pytest.raises(StoreError, match=r"s3://team/in/a\.parquet cannot be read"):
        model.score_table("s3://team/in/a.parquet", place / "a.parquet")


def test_tables_in_the_memory_of_this_process(model: Model) -> None:
    table = flights(500)
    with fsspec.open("memory://scoring/in.csv", "w") as stream:
        table.to_csv(stream, index=False)
    model.score_table("memory://scoring/in.csv", "memory://scoring/out.parquet")
    with fsspec.open("memory://scoring/out.parquet", "rb") as stream:
        same(pd.read_parquet(stream), expected(model, table))
    fsspec.filesystem("memory").rm("/scoring", recursive=True)


def test_a_missing_library_is_named(place: Path) -> None:
    code = "import sys; sys.modules['s3fs'] = None; from nbprod.cli import main; sys.exit(main())"
    words = ["score", "delay", "s3://team/in.parquet", str(place / "out.parquet")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'nbprod[s3]'" in done.stderr


# On a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two workers, which know neither the project nor its models."""
    folder = tmp_path_factory.mktemp("cluster")
    meeting = folder / "meeting"
    meeting.mkdir()
    with new_cluster(folder, "a", "b", BENTOML_HOME=str(folder / "bentoml"), MEETING=str(meeting)) as cluster:
        yield cluster


def test_a_cluster_gives_the_same(model: Model, place: Path, cluster: Cluster) -> None:
    table = flights(300_000)
    table.loc[7, "carrier"] = None
    table.to_parquet(place / "in.parquet")
    words = ["--executor", cluster.address, "--json"]
    done = score("delay", str(place / "in.parquet"), str(place / "out.parquet"), *words)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["rows"], facts["rejected"]) == (300_000, 1)
    same(pd.read_parquet(place / "out.parquet"), expected(model, table.drop(index=7)))
    assert not (cluster.folder / "bentoml" / "models").exists()
    with pytest.raises(
        NotFoundError, match=r"gone\.parquet does not exist on the worker tcp://.*all workers see"
    ):
        table.to_parquet(place / "gone.parquet")
        vanishing(model, place / "gone.parquet", place / "no.parquet", cluster)


def vanishing(model: Model, source: Path, output: Path, cluster: Cluster) -> None:
    """Score a table that only the driver sees: the workers look for it elsewhere."""
    from nbprod.model import scoring

    original = scoring.make_plan

    def moved(*arguments: Any, **options: Any) -> Any:
        plan = original(*arguments, **options)
        source.rename(source.with_name("elsewhere.parquet"))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "make_plan", moved)
        model.score_table(source, output, executor=cluster.address)


def test_a_killed_worker_of_a_cluster(place: Path, cluster: Cluster) -> None:
    files = watched_files(place)
    meeting = cluster.folder / "meeting"
    held = meeting / "hold-300"
    held.touch()
    process = start(place, "--executor", cluster.address)

    def at_it(but: int | None = None) -> Callable[[], int | None]:
        def find() -> int | None:
            found = [int(path.name.split()[1]) for path in meeting.glob("300 *.mark")]
            return next((pid for pid in found if alive(pid) and pid != but), None)

        return find

    first: int = wait_for(at_it(), "a worker at the part")
    wait_for(lambda: done_parts(place) == 5, "all other parts")
    name = next(name for name, worker in cluster.workers.items() if worker.pid == first)
    cluster.kill(name)
    wait_for(at_it(first), "the other worker at the part")
    held.unlink()
    assert finished(process)["rows"] == 300
    check_output(place, files)
    assert Counter(path.name.split()[0] for path in meeting.glob("*.mark"))["0"] == 1
    cluster.start_worker(name)
    wait_for(lambda: cluster.log(name).count("Registered to"), "the worker to be back")


def test_a_cluster_that_is_not_there(
    model: Model, place: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbprod.model import scoring_cluster

    flights(10).to_parquet(place / "in.parquet")
    monkeypatch.setattr(scoring_cluster.on_cluster, "__defaults__", (1.0,))
    with pytest.raises(ClusterError, match="No Dask scheduler answers"):
        model.score_table(
            place / "in.parquet", place / "out.parquet", executor=f"tcp://127.0.0.1:{free_port()}"
        )
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(NbprodError, match=r"pip install 'nbprod\[dask\]'"):
        model.score_table(place / "in.parquet", place / "out.parquet", executor="tcp://127.0.0.1:1")
    assert not (place / "out.parquet").exists()
