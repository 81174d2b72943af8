"""Values on their way into a kernel: none changes, and none that would change is let in."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from running import write_notebook

from nbprod.errors import ParameterError
from nbprod.experiment.execution import run
from nbprod.experiment.parameters import check_values, notebook_parameters, parse_texts, read_parameters


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
        ("x: float = 1.0", math.inf),
        ("x: int = 1", True),
        ("x: int = 1", 1.0),
        pytest.param("x: int = 1", 10**5000, id="more digits than Python prints"),
        ("x: bool = True", 1),
        ("x: str = ''", 1),
        ("x: str = ''", "\udcff"),
        ("x: Literal['a', 1] = 'a'", "b"),
        ("x: list[int] = []", ["1"]),
        ("x: dict[str, int] = {}", {1: 1}),
        ("x: dict[int, int] = {}", {1: 1}),
        ("x: Path = Path()", "here"),
        ("x: 'date' = None", "2026-01-01"),
        ("x: Annotated[float, Field(gt=0)] = 1.0", 2.0),
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
        ("x: float = 0", "nan"),
        ("x: float = 0", "banana"),
        ("x: bool = True", "maybe"),
        ("x: list[int] = []", "4,x"),
        ("x: list[int] = []", "[4,"),
        ("x: list[int] = []", '["4"]'),
        ("x: dict[str, int] = {}", "a=1"),
        ("x: dict[str, int] = {}", "[1]"),
        ("x: Literal['a'] = 'a'", "A"),
        ("x: Path = Path()", "here"),
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
