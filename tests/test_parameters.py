"""Values on their way into a kernel: none changes, and none that would change is let in."""

import csv
import enum
import json
import traceback
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from types import NoneType
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from running import write_notebook

from nbprod.cli import main, read_tried_file, tried_text
from nbprod.errors import ParameterError
from nbprod.experiment.execution import fresh_notebook, inject, open_source, run
from nbprod.experiment.parameter_file import read_file
from nbprod.experiment.parameters import (
    check_values,
    effective_values,
    injected_cell,
    notebook_parameters,
    parse_texts,
    read_parameters,
)
from nbprod.experiment.plans import make_plan, recorded_plan


def parameters(source: str) -> list[Any]:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    return notebook_parameters({"cells": [cell]}, Path("train.ipynb"))


VALUES = {
    "plain": 'it\'s "quoted" \\ and\nbroken\r\n\ttabbed \x00 ünïcode 🛫',
    "code": "'; import os; os.abort() #",
    "braces": "{months} %s ${HOME}",
    "number": 0.1 + 0.2,
    "tiny": 5e-324,
    "whole": 2**80,
    "negative": -1,
    "truth": False,
    "nothing": None,
    "items": [1, 2.5, "three", None, True, [], {"a": [1]}],
    "mapping": {"key with spaces": {"'": '"'}, "": 0},
}


def test_values_arrive_in_the_kernel_unchanged(project: Path) -> None:
    cell = "\n".join(f"{name} = None" for name in VALUES)
    send = f"import json\nprint(json.dumps([{', '.join(VALUES)}]))"
    notebook = write_notebook(project / "nbs" / "echo.ipynb", cell, send)
    finished = run(notebook, VALUES)
    outputs = json.loads(finished.path.read_text())["cells"][-1]["outputs"]
    assert json.loads("".join(outputs[0]["text"])) == list(VALUES.values())
    assert finished.params == VALUES


@pytest.mark.parametrize(
    ("source", "value", "expected"),
    [
        ("x: float = 1.0", 1, 1.0),
        ("x: bool = True", False, False),
        ("x: int | None = 1", None, None),
        ("x: Optional[int] = 1", 2, 2),
        ("x: Union[int, str] = 1", "a", "a"),
        ("x: Literal['a', 1] = 'a'", 1, 1),
        ("x: list[float] = []", [1, 2.5], [1.0, 2.5]),
        ("x: list[list[int]] = []", ((1,), (2, 3)), [[1], [2, 3]]),
        ("x: dict[str, int] = {}", {"a": 1}, {"a": 1}),
        ("x = object()", 1, 1),
    ],
)
def test_given_from_python(source: str, value: Any, expected: Any) -> None:
    got = check_values(parameters(source), {"x": value})["x"]
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("x: float = 1.0", "banana"),
        ("x: float = 1.0", True),
        ("x: int = 1", True),
        ("x: int = 1", 1.0),
        pytest.param("x: int = 1", 10**5000, id="more digits than Python prints"),
        ("x: bool = True", 1),
        ("x: str = ''", 1),
        ("x: str = ''", "\udcff"),
        ("x: Literal['a', 1] = 'a'", "b"),
        ("x: list[int] = []", ["1"]),
        ("x: dict[str, int] = {}", {1: 1}),
        ("x: Path = Path()", 1),
        ("x: Path = Path()", "a\0b"),
        ("x: date = None", datetime(2026, 1, 1)),
        ("x: date = None", "1 January"),
        ("x: datetime = None", datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Zurich"))),
        ("x: Annotated[float, Field(gt=0)] = 1.0", 0),
        ("x: list[Annotated[int, Ge(1)]] = []", [1, 0]),
        ("x: Annotated[float, Odd(0)] = 1.0", 1.0),
        ("class Loss(Enum):\n    A = 1\nx: Loss = Loss.A", "B"),
        ("x: Loss = Loss.A", "A"),
        ("x: Literal[[1]] = 1", 1),
        ("x = 3", "3"),
        ("x = None", {1, 2}),
    ],
)
def test_value_that_does_not_fit(source: str, value: Any) -> None:
    with pytest.raises(ParameterError, match="Parameter x "):
        check_values(parameters(source), {"x": value})


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("x: str = ''", "00123", "00123"),
        ("x: str = ''", "", ""),
        ("x: str = ''", "null", "null"),
        ("x: str | None = ''", "null", None),
        ("x: int = 0", "00123", 123),
        ("x: int = 0", "-7", -7),
        ("x: float = 0", "1e-3", 0.001),
        ("x: float | int = 0", "2", 2.0),
        ("x: bool = True", "FALSE", False),
        ("x: Literal['a', 1] = 'a'", "1", 1),
        ("x: list[str] = []", "a, b", ["a", "b"]),
        ("x: list[str] = []", '["a,b"]', ["a,b"]),
        ("x: list[int] | None = None", "4,8", [4, 8]),
        ("x: list[int] = []", "", []),
        ("x: dict[str, float] = {}", '{"a": 1}', {"a": 1.0}),
        ("x = None", "[1]", [1]),
        ("x = None", "plain text", "plain text"),
    ],
)
def test_given_as_text(source: str, text: str, expected: Any) -> None:
    got = parse_texts(parameters(source), {"x": text})["x"]
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x: int = 0", "1.5"),
        ("x: int = 0", ""),
        ("x: float = 0", "banana"),
        ("x: bool = True", "maybe"),
        ("x: list[int] = []", "4,x"),
        ("x: list[int] = []", "[4,"),
        ("x: list[int] = []", '["4"]'),
        ("x: dict[str, int] = {}", "a=1"),
        ("x: dict[str, int] = {}", "[1]"),
        ("x: Literal['a'] = 'a'", "A"),
        ("x: Annotated[float, Field(gt=0, le=1)] = 1.0", "1.5"),
        ("x: date = None", "2026-02-30"),
        ("x: set[int] = set()", "1"),
    ],
)
def test_text_that_does_not_fit(source: str, text: str) -> None:
    with pytest.raises(ParameterError, match=r"Parameter x "):
        parse_texts(parameters(source), {"x": text})


def test_no_kernel_starts_for_wrong_parameters(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "learning_rate: float = 0.1")
    for wrong in ({"learning_rat": 0.1}, {"learning_rate": "banana"}):
        with pytest.raises(ParameterError, match="learning_rate") as error:
            run(notebook, wrong)
        assert error.value.exit_code == 2
    assert not (project / ".nbprod").exists()


def test_syntax_error_in_the_cell_names_its_line(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "a = 1\nb = = 2")
    with pytest.raises(ParameterError, match="line 2 of the parameters cell"):
        read_parameters(notebook)


def test_cell_is_read_and_not_executed(project: Path) -> None:
    cell = "import os\nx: int = os.abort()\ny: os.abort() = 1\nz: 'os.abort()' = 1\n"
    notebook = write_notebook(project / "nbs" / "train.ipynb", cell)
    assert [each.name for each in read_parameters(notebook)] == ["x", "y", "z"]


TEXT = some.text(some.characters(exclude_categories=["Cs"]))
WHOLE = some.integers(-(2**70), 2**70)
PATHS = some.builds(Path, TEXT.filter(lambda text: "\0" not in text))
ZONES = some.none() | some.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
TIMES = some.datetimes(timezones=some.none() | some.just(UTC)) | some.builds(
    lambda time, zone: time.replace(tzinfo=zone), some.datetimes(), ZONES
)


class Loss(enum.Enum):
    SQUARED = "squared"
    ABSOLUTE = 1


DEFINED = "class Loss(enum.Enum):\n    SQUARED = 'squared'\n    ABSOLUTE = 1\n"
LOSSES = some.sampled_from(Loss)
TYPES: list[tuple[str, some.SearchStrategy[Any]]] = [
    ("int", WHOLE),
    ("float", some.floats()),
    ("bool", some.booleans()),
    ("str", TEXT),
    ("date", some.dates()),
    ("datetime", TIMES),
    ("Path", PATHS),
    ("Loss", LOSSES),
    ("Literal['a', 2, None]", some.sampled_from(["a", 2])),
    ("Annotated[float, Field(gt=0, le=1)]", some.floats(0, 1, exclude_min=True)),
    ("list[int]", some.lists(WHOLE)),
    ("list[float]", some.lists(some.floats())),
    ("list[str]", some.lists(TEXT)),
    ("list[date | None]", some.lists(some.dates() | some.none())),
    ("list[list[Path]]", some.lists(some.lists(PATHS))),
    ("dict[str, datetime]", some.dictionaries(TEXT, TIMES)),
    ("dict[int, list[Loss]]", some.dictionaries(WHOLE, some.lists(LOSSES))),
    ("dict[date, Path | None]", some.dictionaries(some.dates(), PATHS | some.none())),
    ("int | float | None", WHOLE | some.floats() | some.none()),
    ("date | datetime", some.dates() | TIMES),
    ("Loss | None", LOSSES | some.none()),
    ("Annotated[int, Ge(0)] | None", some.integers(0) | some.none()),
]
PARAMETERS = {source: parameters(f"{DEFINED}x: {source}") for source, _ in TYPES}
ANY = some.sampled_from(TYPES).flatmap(lambda pair: some.tuples(some.just(pair[0]), pair[1]))
OFTEN = settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))


def exactly(value: Any) -> Any:
    """What tells two values apart that Python may call equal: types, zones, the sign of a zero, NaN."""
    if isinstance(value, enum.Enum):
        return "Loss", value.name
    if isinstance(value, list):
        return [exactly(each) for each in value]
    if isinstance(value, dict):
        return [(exactly(key), exactly(each)) for key, each in value.items()]
    return type(value), repr(value), value.utcoffset() if isinstance(value, datetime) else None


def arrived(values: dict[str, Any]) -> Any:
    """What a kernel that has imported nothing but enum gets for `x`."""
    space: dict[str, Any] = {"enum": enum}
    exec(DEFINED + injected_cell(values), space)
    assert set(space) <= {"enum", "__builtins__", "Loss", "_datetime", "_pathlib", "x"}
    return space["x"]


def as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(as_json(key)): as_json(each) for key, each in value.items()}
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value.isoformat() if isinstance(value, date) else value


def as_text(value: Any) -> str:
    """`value` as one writes it on a command line."""
    return json.dumps(as_json(value)) if isinstance(value, list | dict | NoneType) else str(as_json(value))


def as_yaml(value: Any) -> Any:
    """`value` in YAML's own types: dates and numbers are such there, the others texts."""
    if isinstance(value, list):
        return [as_yaml(each) for each in value]
    if isinstance(value, dict):
        return {as_yaml(key): as_yaml(each) for key, each in value.items()}
    return as_json(value) if isinstance(value, Path | enum.Enum | datetime) else value


def unfolded(value: Any) -> Any:
    """`value` without what ISO 8601 has no sign for: which of two equal times by the clock is meant."""
    if isinstance(value, list):
        return [unfolded(each) for each in value]
    if isinstance(value, dict):
        return {key: unfolded(each) for key, each in value.items()}
    return value.replace(fold=0) if isinstance(value, datetime) else value


@OFTEN
@given(ANY)
@example(("datetime", datetime(2026, 10, 25, 2, 30, fold=1)))
@example(("float", -0.0))
def test_any_value_arrives_from_python(pair: tuple[str, Any]) -> None:
    source, value = pair
    checked = check_values(PARAMETERS[source], {"x": value})
    assert exactly(arrived(checked)) == exactly(value)


@OFTEN
@given(ANY)
def test_any_value_arrives_from_a_command_line(pair: tuple[str, Any]) -> None:
    source, value = pair
    checked = parse_texts(PARAMETERS[source], {"x": as_text(value)})
    assert exactly(arrived(checked)) == exactly(unfolded(value))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("values") / "params.yaml"


@OFTEN
@given(pair=ANY)
@example(pair=("dict[date, Path | None]", {date(2000, 1, 1): Path("NONE")}))
def test_any_value_arrives_from_yaml(pair: tuple[str, Any], file: Path) -> None:
    source, value = pair
    file.write_text(yaml.safe_dump({"x": as_yaml(value)}, sort_keys=False), encoding="utf-8")
    assert exactly(arrived(read_file(file, PARAMETERS[source]))) == exactly(unfolded(value))


@OFTEN
@given(ANY)
@example(("str", "1..9"))
def test_any_value_arrives_by_a_sweep_from_a_command_line(pair: tuple[str, Any]) -> None:
    source, value = pair
    [parameter], text = PARAMETERS[source], as_text(value)
    one = not text.startswith("[") and "," not in text
    for given_text in [json.dumps([text])] + ([text] if one else []):
        [read] = tried_text(parameter, given_text)
        assert exactly(arrived({"x": read})) == exactly(unfolded(value))


@OFTEN
@given(pair=ANY)
def test_any_value_arrives_by_a_sweep_from_yaml(pair: tuple[str, Any], file: Path) -> None:
    source, value = pair
    for document in ({"x": [as_yaml(value)]}, [{"x": as_yaml(value)}]):
        file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        read = read_tried_file(file, PARAMETERS[source])
        [values] = make_plan(PARAMETERS[source], read).values() or []
        assert exactly(arrived(values)) == exactly(unfolded(value))


@OFTEN
@given(pair=ANY)
def test_any_value_arrives_by_a_sweep_from_csv(pair: tuple[str, Any], file: Path) -> None:
    source, value = pair
    table = file.with_suffix(".csv")
    with table.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["x"], [as_text(value)]])
    [values] = read_tried_file(table, PARAMETERS[source])
    assert exactly(arrived(values)) == exactly(unfolded(value))


@OFTEN
@given(ANY)
@example(("float", -0.0))
def test_any_value_arrives_by_a_sweep_from_python_and_by_its_record(pair: tuple[str, Any]) -> None:
    source, value = pair
    for tried in ({"x": [value]}, [{"x": value}]):
        plan = make_plan(PARAMETERS[source], tried)
        [values] = plan.values() or []
        assert exactly(arrived(values)) == exactly(value)
        recorded = json.loads(json.dumps(plan.as_dict(), allow_nan=False))
        [again] = recorded_plan(PARAMETERS[source], recorded).values() or []
        assert exactly(arrived(again)) == exactly(unfolded(value))


@OFTEN
@given(ANY)
def test_what_the_record_says_can_be_given_again(pair: tuple[str, Any]) -> None:
    source, value = pair
    recorded = effective_values(PARAMETERS[source], check_values(PARAMETERS[source], {"x": value}))
    again = check_values(PARAMETERS[source], json.loads(json.dumps(recorded, allow_nan=False)))
    assert exactly(again["x"]) == exactly(unfolded(value))


OF_ALL_TYPES = f"""
import datetime, enum
from datetime import date
from pathlib import Path
from typing import Annotated, Literal
from pydantic import Field
{DEFINED}
a: int = 1  # a count
b: float = 0.5
c: bool = False
d: str = ""
e: date = date(2026, 1, 1)
f: datetime.datetime | None = None
g: Path = Path("data")
h: Loss = Loss.SQUARED
i: Annotated[float, Field(gt=0, le=1)] = 1.0  # a share of 100%
j: Literal["gini", "entropy"] = "gini"
k: list[date] = []
l: dict[str, float | None] = dict()
m_n = 0.1
"""
GIVEN = {
    "a": "-7",
    "b": "nan",
    "c": "yes",
    "d": "00123",
    "e": "2026-01-31",
    "f": "2026-01-31T09:30:00+01:00",
    "g": "a 'b'/\"c\"",
    "h": "ABSOLUTE",
    "i": "0.25",
    "j": "entropy",
    "k": "2026-02-28,2026-03-31",
    "l": '{"x": 1, "y": null, "z": -Infinity}',
    "m-n": "1e-3",
}
ARRIVED = [
    "-7", "nan", "True", "'00123'", "datetime.date(2026, 1, 31)",
    "datetime.datetime(2026, 1, 31, 9, 30, tzinfo=datetime.timezone(datetime.timedelta(seconds=3600)))",
    "PosixPath('a \\'b\\'/\"c\"')", "<Loss.ABSOLUTE: 1>", "0.25", "'entropy'",
    "[datetime.date(2026, 2, 28), datetime.date(2026, 3, 31)]", "{'x': 1.0, 'y': None, 'z': -inf}", "0.001",
]  # fmt: skip


def test_a_value_of_every_type_arrives_in_a_kernel(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ", ".join([*"abcdefghijkl", "m_n"])
    send = f"import json\nprint(json.dumps([repr(each) for each in [{names}]]))"
    notebook = write_notebook(project / "nbs" / "echo.ipynb", OF_ALL_TYPES, send)
    options = [f"--{name}={value}" for name, value in GIVEN.items()]
    assert main(["run", str(notebook), *options, "--json"]) == 0
    finished = json.loads(capsys.readouterr().out)
    executed = json.loads(Path(finished["path"]).read_text())
    assert json.loads("".join(executed["cells"][-1]["outputs"][0]["text"])) == ARRIVED
    assert executed["cells"][1]["metadata"]["tags"] == ["injected-parameters"]
    assert finished["params"]["e"] == "2026-01-31" and finished["params"]["b"] == "nan"
    assert executed["metadata"]["papermill"]["parameters"] == finished["params"]


def test_a_value_of_every_type_arrives_by_a_sweep(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ", ".join([*"abcdefghijkl", "m_n"])
    send = f"import json\nprint(json.dumps([repr(each) for each in [{names}]]))"
    notebook = write_notebook(project / "nbs" / "echo.ipynb", OF_ALL_TYPES, send)
    given = {name.replace("-", "_"): value for name, value in GIVEN.items()}
    with (project / "trials.csv").open("w", newline="") as table:
        csv.writer(table).writerows([list(given), list(given.values())])
    assert main(["sweep", str(notebook), "-f", "trials.csv", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["runs"]
    options = [f"--{name}={json.dumps([value])}" for name, value in GIVEN.items()]
    assert main(["sweep", str(notebook), *options, "--json"]) == 0
    made += json.loads(capsys.readouterr().out)["runs"]
    for run_made in made:
        [*_, last] = json.loads(Path(run_made["path"]).read_text())["cells"]
        assert json.loads("".join(last["outputs"][0]["text"])) == ARRIVED
    assert len(made) == 2


def test_help_shows_the_parameters(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = write_notebook(project / "nbs" / "echo.ipynb", OF_ALL_TYPES + "day = date.today()\njobs = 2\n")
    for verb in ("run", "sweep"):
        with pytest.raises(SystemExit):
            main([verb, str(notebook), "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "--a VALUE a count (int; default: 1)" in told and "--m-n VALUE" in told
        assert "a share of 100% (Annotated[float, Field(gt=0, le=1)]; default: 1.0)" in told
        assert "--day VALUE Any; computed: date.today()" in told
    with pytest.raises(SystemExit):
        main(["run", str(notebook), "--da", "1"])
    assert main(["params", str(notebook)]) == 0
    assert "computed: date.today()" in capsys.readouterr().out


def test_a_sweep_over_a_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "from datetime import date\nday: date = date(2026, 1, 1)\nname: str = ''"
    notebook = write_notebook(project / "nbs" / "echo.ipynb", cell, "print(repr(day), name)")
    (project / "grid.yaml").write_text("day: [2026-02-01, 2026-03-01]\nname: [x, y]\n")
    assert main(["sweep", str(notebook), "-f", "grid.yaml", "--name", "007", "--json"]) == 0
    made = [run["params"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert made == [{"day": "2026-02-01", "name": "007"}, {"day": "2026-03-01", "name": "007"}]


def test_a_notebook_of_another_language_is_left_to_papermill(project: Path) -> None:
    language = {"kernelspec": {"name": "ir", "language": "R"}}
    notebook = write_notebook(project / "nbs" / "r.ipynb", "x = 1", **language)
    source = open_source(notebook)
    assert len(inject(fresh_notebook(source, {}), {"x": 2})["cells"]) == 1


def test_a_secret_is_given_by_name_only(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = "from pydantic import SecretStr\npassword: SecretStr | None = None"
    notebook = write_notebook(project / "nbs" / "secret.ipynb", cell)
    monkeypatch.setenv("SHORT", "1234")
    for value, said in (("hunter2", "env:NAME"), ("env:UNSET_ONE", "UNSET_ONE"), ("env:SHORT", "too few")):
        assert main(["run", str(notebook), "-p", f"password={value}"]) == 2
        told = capsys.readouterr().err
        assert said in told and "hunter2" not in told
        with pytest.raises(ParameterError) as error:
            run(notebook, password=value)
        assert "hunter2" not in "".join(traceback.format_exception(error.value, limit=0))
    assert not (project / ".nbprod").exists()
