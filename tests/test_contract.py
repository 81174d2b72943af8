"""Contracts hold what they promise: properties of generated contracts and rows, by rules of the tests."""

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from prometheus_client import CollectorRegistry
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import nbprod
from nbprod.errors import ContractError, UnusualValueWarning
from nbprod.model.compatibility import compare_contracts
from nbprod.model.contract import Column, Contract, infer_contract, json_schema, plain_rows
from nbprod.monitor.drift import drift
from nbprod.serve.answering import Answerer
from nbprod.serve.openapi import openapi_document
from nbprod.settings import load_settings

Row = dict[str, Any]
quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6)
INTEGERS = ("int64", "int32", "int8", "uint8", "Int64")
MOMENTS = ("datetime64[us]", "datetime64[ns]", "datetime64[us, UTC]", "datetime64[ns, Europe/Berlin]")


def bounds(column: Column) -> tuple[int, int]:
    """The smallest and the largest integer that a column accepts."""
    found = np.iinfo(column.dtype.lower())
    lowest, highest = int(found.min), int(found.max)
    low = lowest if column.ge is None else max(lowest, column.ge)
    return low, highest if column.le is None else min(highest, column.le)


@st.composite
def columns(draw: st.DrawFn, name: str) -> Column:
    """Any column: of any type, with or without limits of its author."""
    kind = draw(st.sampled_from(["int", "float", "bool", "string", "category", "date", "datetime"]))
    null = draw(st.booleans())
    if kind == "int":
        dtype = draw(st.sampled_from(INTEGERS))
        limits = draw(st.sampled_from([{}, {"ge": 0}, {"ge": 0, "le": 100}, {"le": 5}]))
        return Column(name, kind, dtype, nullable=null and dtype == "Int64", **limits)
    if kind == "float":
        limits = draw(st.sampled_from([{}, {"ge": 0.0}, {"ge": -1.5, "le": 1.5}]))
        return Column(name, kind, draw(st.sampled_from(["float64", "float32"])), nullable=null, **limits)
    if kind == "bool":
        return Column(name, kind, "boolean" if null else "bool", nullable=null)
    if kind == "string":
        known = tuple(sorted(draw(st.sets(TEXT, min_size=1, max_size=4))))
        dtype = draw(st.sampled_from(["str", "object"]))
        return Column(name, kind, dtype, nullable=null, categories=known, closed=draw(st.booleans()))
    if kind == "category":
        known = tuple(draw(st.lists(TEXT, min_size=1, max_size=4, unique=True)))
        return Column(name, kind, "category", nullable=null, categories=known, closed=True)
    if kind == "date":
        return Column(name, kind, "object", nullable=null)
    return Column(name, kind, draw(st.sampled_from(MOMENTS)), nullable=null)


def values(column: Column) -> st.SearchStrategy[Any]:
    """JSON values that a column accepts, by the rules that the tests know."""
    if column.type == "int":
        found: st.SearchStrategy[Any] = st.integers(*bounds(column))
    elif column.type == "float":
        width = 32 if column.dtype == "float32" else 64
        limits = {"min_value": column.ge, "max_value": column.le, "width": width}
        found = st.floats(allow_nan=False, allow_infinity=False, **limits)
    elif column.type == "bool":
        found = st.booleans()
    elif column.closed:
        found = st.sampled_from(column.categories)
    elif column.type == "string":
        found = TEXT
    elif column.type == "date":
        found = st.dates().map(date.isoformat)
    else:
        zones = st.sampled_from([UTC, datetime.now().astimezone().tzinfo]) if column.zoned else st.none()
        earliest, latest = datetime(1679, 1, 1), datetime(2260, 1, 1)
        found = st.datetimes(earliest, latest, timezones=zones).map(datetime.isoformat)
    return found | st.none() if column.nullable else found


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    """A contract of one to five columns."""
    count = draw(st.integers(1, 5))
    return Contract(tuple(draw(columns(name)) for name in ("a", "größe", "c d", "time", "ids")[:count]))


def rows_of(contract: Contract, **size: int) -> st.SearchStrategy[list[Row]]:
    """Rows that keep a contract."""
    return st.lists(st.fixed_dictionaries({each.name: values(each) for each in contract.columns}), **size)


CASES = contracts().flatmap(
    lambda contract: st.tuples(st.just(contract), rows_of(contract, min_size=1, max_size=4))
)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def in_limits(column: Column, value: Any) -> bool:
    return (column.ge is None or value >= column.ge) and (column.le is None or value <= column.le)


def is_moment(value: Any, zoned: bool) -> bool:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return (moment.tzinfo is not None) == zoned and 1678 <= moment.year <= 2261


def is_date(value: Any) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


RULES: dict[str, Callable[[Column, Any], bool]] = {
    "bool": lambda _, value: type(value) is bool,
    "int": lambda column, value: (
        is_number(value) and value == int(value) and bounds(column)[0] <= value <= bounds(column)[1]
    ),
    "float": lambda column, value: (
        is_number(value) and abs(value) <= float(np.finfo(column.dtype).max) and in_limits(column, value)
    ),
    "string": lambda column, value: (
        isinstance(value, str) and (not column.closed or value in (column.categories or ()))
    ),
    "category": lambda column, value: isinstance(value, str) and value in (column.categories or ()),
    "date": lambda _, value: is_date(value),
    "datetime": lambda column, value: is_moment(value, column.zoned),
}


def keeps(column: Column, value: Any) -> bool:
    """Whether a JSON value keeps what a column promises: the rules once more, written for the tests."""
    return bool(column.nullable) if value is None else RULES[column.type](column, value)


def accepts(contract: Contract, row: Row) -> bool:
    """Whether a contract takes a row; what it says if not is about that row."""
    try:
        contract.frame([row])
    except ContractError as error:
        assert error.detail[0]["row"] == 0
        return False
    return True


def same(column: Column, one: Any, other: Any) -> bool:
    """Whether two JSON values stand for the same value of a column."""
    if one is None or other is None:
        return one is other
    if column.type == "datetime":
        return datetime.fromisoformat(one) == datetime.fromisoformat(other)
    return bool(np.float32(one) == np.float32(other)) if column.dtype == "float32" else bool(one == other)


def body_of(rows: list[Row]) -> bytes:
    return json.dumps({"rows": rows}).encode()


@quickly
@given(CASES)
def test_rows_from_a_contract_validate_wherever_they_come_in(case: tuple[Contract, list[Row]]):
    contract, rows = case
    again = Contract.from_dict(json.loads(json.dumps(contract.as_dict())))
    assert again == contract
    frame = again.frame(rows)
    assert list(frame.columns) == contract.names
    accepted, rejected = contract.split(frame)
    assert rejected == []
    pd.testing.assert_frame_equal(accepted, frame, check_index_type=False)
    decoded = contract.decoder.rows(body_of(rows))
    assert decoded is not None
    pd.testing.assert_frame_equal(contract.frame(decoded), frame)
    for row in rows:
        jsonschema.validate(row, json_schema(contract))


@quickly
@given(CASES)
def test_no_value_is_lost_from_json_to_a_frame_and_back(case: tuple[Contract, list[Row]]):
    contract, rows = case
    frame = contract.frame(rows)
    for row, back in zip(rows, plain_rows(contract, frame), strict=True):
        for column in contract.columns:
            assert same(column, row[column.name], back[column.name]), column
    pd.testing.assert_frame_equal(contract.frame(plain_rows(contract, frame)), frame)
    for column in contract.columns:
        if column.zoned:
            assert str(frame[column.name].dtype) == column.dtype


@quickly
@given(CASES)
def test_a_table_that_was_kept_as_parquet_is_accepted_with_the_same_values(case: tuple[Contract, list[Row]]):
    contract, rows = case
    frame = contract.frame(rows)
    kept = BytesIO()
    frame.to_parquet(kept)
    accepted, rejected = contract.split(pd.read_parquet(kept))
    assert rejected == []
    assert plain_rows(contract, accepted) == plain_rows(contract, frame)


WRONG = st.one_of(
    st.sampled_from([None, "", "UA", True, False, 0, 1, -1, 3.5, 3.0, 101, 2**63, 2**70, 1e39, [], {}]),
    st.sampled_from(["2013-02-29", "2013-02-28", "2013-1-1", "2013-02-28T10:00:00", "2013-02-28T10:00:00Z"]),
    st.sampled_from(["1066-10-14T09:00:00", "10:00", "00123", " 7", "nan", "2013-02-28T10:00:00+05:30"]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
)


@settings(quickly, max_examples=200)
@given(CASES, st.data())
def test_a_changed_field_never_passes_unless_it_is_still_valid(
    case: tuple[Contract, list[Row]], data: st.DataObject
):
    contract, rows = case
    column = data.draw(st.sampled_from(contract.columns))
    row = {**rows[0], column.name: data.draw(WRONG)}
    expected = keeps(column, row[column.name])
    assert accepts(contract, row) == expected, (column, row)
    decoded = contract.decoder.rows(body_of([row]))
    assert decoded is None or expected, (column, row)
    if expected:
        jsonschema.validate(row, json_schema(contract))


@quickly
@given(CASES, st.data())
def test_missing_and_unknown_fields_are_refused_by_name(
    case: tuple[Contract, list[Row]], data: st.DataObject
):
    contract, [row, *_] = case
    name = data.draw(st.sampled_from(contract.names))
    for wrong, field in (({**row, "unknown": 1}, "unknown"), ({**row}, name)):
        if field == name:
            wrong.pop(name)
        assert contract.decoder.rows(body_of([wrong])) is None
        with pytest.raises(ContractError) as error:
            contract.frame([wrong])
        assert [each["column"] for each in error.value.detail] == [field]
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json_schema(contract))


@settings(quickly, max_examples=150)
@given(columns("a"), columns("a"), st.data())
def test_what_a_comparison_says_is_what_callers_meet(old: Column, new: Column, data: st.DataObject):
    before, now = Contract((old,)), Contract((new,))
    verdict = compare_contracts(before, now).verdict
    row = {"a": data.draw(values(old))}
    if verdict != "breaking":
        assert accepts(now, row), (old, new, row)
    if verdict == "compatible":
        assert accepts(before, {"a": data.draw(values(new))})
    assert compare_contracts(before, before).verdict == "compatible"


def witnesses(column: Column) -> list[Any]:
    """Values at the ends of what a column may accept, one of which a narrower column has to refuse."""
    if column.type == "int":
        ends: list[Any] = [*bounds(column)]
    elif column.type == "float":
        largest = float(np.finfo(column.dtype).max)
        ends = [
            -largest if column.ge is None else column.ge,
            largest if column.le is None else column.le,
            0.5,
        ]
    elif column.type in ("string", "category"):
        ends = [*(column.categories or ()), "never seen"]
    elif column.type == "datetime":
        fine = "" if column.resolution == "us" else "001"
        ends = [f"2013-01-31T12:00:00.000001{fine}{'Z' if column.zoned else ''}"]
    else:
        ends = [True] if column.type == "bool" else ["0001-01-01", "2013-01-31"]
    return [each for each in [*ends, None] if accepts(Contract((column,)), {"a": each})]


@settings(quickly, max_examples=150)
@given(columns("a"), columns("a"))
def test_nothing_is_called_breaking_that_refuses_no_caller(old: Column, new: Column):
    refused = [each for each in witnesses(old) if not accepts(Contract((new,)), {"a": each})]
    comparison = compare_contracts(Contract((old,)), Contract((new,)))
    assert (comparison.verdict == "breaking") == bool(refused), (comparison, refused)


def test_columns_that_come_and_go_break_callers():
    one, both = (
        Contract((Column("a", "int", "int64"),)),
        Contract((Column("a", "int", "int64"), Column("b", "int", "int64"))),
    )
    for old, new in ((one, both), (both, one)):
        comparison = compare_contracts(old, new)
        assert comparison.verdict == "breaking"
        assert [change.column for change in comparison.changes] == ["b"]


def test_a_column_of_mixed_kinds_is_refused_with_its_rows():
    frame = pd.DataFrame({"seats": ["180", "2", 3.5, None, b"4"]}, index=[10, 11, 12, 13, 14], dtype=object)
    with pytest.raises(ContractError, match="'seats'") as error:
        infer_contract(frame)
    assert re.search(r"\b12\b.*\b14\b", str(error.value))


def test_digits_stay_text_and_large_integers_exact():
    frame = pd.DataFrame({"id": ["00123", "7"], "serial": pd.array([2**60 + 1, None], dtype="Int64")})
    contract = infer_contract(frame)
    assert [column.type for column in contract.columns] == ["string", "int"]
    rows = plain_rows(contract, frame)
    assert rows == [{"id": "00123", "serial": 2**60 + 1}, {"id": "7", "serial": None}]
    assert contract.frame(rows)["serial"].tolist()[0] == 2**60 + 1
    accepted, rejected = contract.split(
        pd.DataFrame({"id": [123, 7], "serial": [1, 2]}).astype({"id": object})
    )
    assert len(accepted) == 0
    assert {finding["column"] for finding in rejected} == {"id"}


def test_zones_of_callers_become_the_zone_of_training():
    departs = pd.to_datetime(["2013-07-04 08:00"]).tz_localize("America/New_York")
    contract = infer_contract(pd.DataFrame({"departs": departs}))
    frame = contract.frame([{"departs": "2013-07-04T14:00:00+02:00"}])
    assert frame["departs"].iloc[0] == departs[0]
    assert str(frame["departs"].dt.tz) == "America/New_York"
    assert frame["departs"].iloc[0] - departs[0] == timedelta(0)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (nbprod.Column(ge=500), "400"),
        (nbprod.Column(ge=10, le=5), "ge"),
        (nbprod.Column(categories=("a",)), "distance"),
    ],
)
def test_limits_that_the_data_or_they_themselves_break_are_refused(column: Column, said: str):
    frame = pd.DataFrame({"distance": [400, 1000]})
    with pytest.raises(ContractError, match=said):
        infer_contract(frame, {"distance": column})


def test_a_column_that_the_frame_lacks_is_named():
    with pytest.raises(ContractError, match=r"'distanc'.*'distance'"):
        infer_contract(pd.DataFrame({"distance": [400, 1000]}), {"distanc": nbprod.Column(ge=0)})


# Kinds of columns at their edges

ODD = {
    "texts of nulls alone": pd.Series([None, None], dtype=object),
    "numbers of nulls alone": pd.Series([np.nan, np.nan]),
    "no category": pd.Series(pd.Categorical([None, None], categories=[])),
    "ordered numbers as categories": pd.Series(pd.Categorical([1, None], categories=[2, 1], ordered=True)),
    "NaN among objects": pd.Series(["UA", np.nan], dtype=object),
    "None among objects": pd.Series(["UA", None], dtype=object),
    "texts in Python": pd.Series(["UA", None], dtype="string[python]"),
    "texts in Arrow": pd.Series(["UA", None], dtype="string[pyarrow]"),
    "first and last day": pd.Series([date(1, 1, 1), date(9999, 12, 31)], dtype=object),
    "both sides of a change of clocks": pd.Series(
        pd.to_datetime(["2013-10-27T00:30Z", "2013-10-27T01:30Z"]).tz_convert("Europe/Berlin")
    ),
    "a fixed offset": pd.Series(pd.to_datetime(["2013-01-01T00:00+05:30", None])),
    "nanoseconds": pd.Series(pd.to_datetime(["2013-01-01T00:00:00.000000007", None]).as_unit("ns")),
    "the largest number": pd.Series([2**64 - 1, None], dtype="UInt64"),
    "half precision": pd.Series([1.5, 2.0], dtype="float16"),
    "maybe": pd.Series([True, None], dtype="boolean"),
    "no rows": pd.Series([], dtype="Int64"),
}


@pytest.mark.parametrize("name", ['12" vinyl', "", "class", "größe\n日本"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_columns_come_back_as_they_were(kind: str, name: str):
    frame = pd.DataFrame({name: ODD[kind]})
    contract = Contract.from_dict(json.loads(json.dumps(infer_contract(frame).as_dict())))
    rows = plain_rows(contract, frame)
    pd.testing.assert_frame_equal(contract.frame(json.loads(json.dumps(rows, allow_nan=False))), frame)
    decoded = contract.decoder.rows(body_of(rows))
    pd.testing.assert_frame_equal(contract.frame(rows if decoded is None else decoded), frame)
    accepted, rejected = contract.split(frame)
    assert rejected == []
    pd.testing.assert_frame_equal(accepted, frame, check_index_type=False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pd.Series([1.0, np.inf]), "infinite"),
        (pd.Series(pd.to_timedelta([1, 2], unit="h")), "total_seconds"),
        (pd.Series(pd.period_range("2013", periods=2, freq="D")), "to_timestamp"),
        (pd.Series([1, 2], dtype="int64[pyarrow]"), "convert_dtypes"),
        (pd.Series([1, 2], dtype=object), "astype.'Int64'"),
        (
            pd.Series([date(2013, 1, 1), datetime(2013, 1, 2)], dtype=object),
            "mixes date with datetime: row 1",
        ),
        (pd.Series(["UA", "\ud83d"], dtype=object), "Unicode: row 1"),
        (pd.Series(pd.Categorical([date(2013, 1, 1)])), "rename_categories"),
    ],
)
def test_what_json_cannot_say_is_refused_with_what_to_do(values: pd.Series, said: str):
    with pytest.raises(ContractError, match=said):
        infer_contract(pd.DataFrame({"a": values}))


@pytest.mark.parametrize("columns", [[0, 1], [("a", "b"), ("a", "c")], ["a", "a"]])
def test_names_that_json_cannot_tell_apart_are_refused(columns: list[Any]):
    frame = pd.DataFrame([[1, 2]])
    frame.columns = pd.Index(columns, tupleize_cols=False)
    with pytest.raises(ContractError, match="name"):
        infer_contract(frame)


@pytest.mark.parametrize("how", [{}, {"dtype": str}])
def test_a_csv_file_is_read_by_the_contract_and_not_by_guess(how: dict[str, Any]):
    frame = pd.DataFrame(
        {
            "carrier": ["UA", "AA", "B6"],
            "distance": [1400, 1089, 1576],
            "seats": pd.array([180, None, 2**53 + 1], dtype="Int64"),
            "wind": [4.6, np.nan, 0.1 + 0.2],
            "late": [True, False, True],
            "day": [date(2013, 1, 1), date(2013, 1, 31), date(2012, 2, 29)],
            "at": pd.to_datetime(
                ["2013-01-01T05:00", "2013-01-01T06:30:01.5", "1999-12-31"], format="ISO8601"
            ),
            "size": pd.Categorical(["S", "L", "S"], ["S", "M", "L"], ordered=True),
        }
    )
    frame["departs"] = frame["at"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    contract = infer_contract(frame)
    text = BytesIO(frame.to_csv(index=False).encode())
    if not how:  # pandas would read the large whole number as a float, for the gap beside it
        how = {"dtype": {"seats": "Int64"}}
    accepted, rejected = contract.split(pd.read_csv(text, **how))
    assert rejected == []
    pd.testing.assert_frame_equal(accepted, frame, check_index_type=False)


def test_a_code_that_was_read_as_a_number_is_no_row_s_fault():
    contract = infer_contract(pd.DataFrame({"zip": ["01001", "94103"]}))
    with pytest.raises(ContractError, match="read it as text") as error:
        contract.split(pd.DataFrame({"zip": [1001, 94103]}))
    assert error.value.detail[0]["row"] is None
    with pytest.raises(ContractError, match="is missing"):
        contract.split(pd.DataFrame({"ZIP": ["01001"]}))


def test_a_contract_of_the_first_form_is_still_read():
    column = {"description": "", "categories": None, "minimum": None, "maximum": None, "nullable": False}
    first = [
        {
            **column,
            "name": "size",
            "type": "string",
            "dtype": "category",
            "categories": ["L", "S"],
            "example": "S",
        },
        {
            **column,
            "name": "at",
            "type": "datetime",
            "dtype": "datetime64[us]",
            "example": "2013-01-01T05:00:00",
        },
    ]
    contract = Contract.from_dict({"columns": first})
    frame = contract.frame([{"size": "S", "at": "2013-01-01T05:00:00"}])
    assert frame["size"].cat.categories.tolist() == ["L", "S"]
    assert frame["at"][0] == pd.Timestamp("2013-01-01T05:00:00")


# From the notebook to the log


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"ge": 0}, "nbprod.Column"),
        (nbprod.Column(minimum=0), "comes from the training data"),
        (nbprod.Column(ge="0"), "must be a number"),
        (nbprod.Column(nullable=True), "has no room for nulls"),
        (nbprod.Column(pattern="x"), "pattern is for text"),
        (nbprod.Column(ge=0, example=-1), "the example must be at least 0"),
        (nbprod.Column(le=300), "row 1, column 'distance': must be at most 300, got 400"),
        (nbprod.Column(gt=300, lt=300), "no value"),
    ],
)
def test_an_author_who_says_what_cannot_be_is_told_so(said: Any, words: str):
    with pytest.raises(ContractError, match=re.escape(words)):
        infer_contract(pd.DataFrame({"distance": [80, 400]}), {"distance": said})


@pytest.mark.parametrize("missing", [np.nan, None])
def test_a_missing_text_is_missing_to_the_pipeline_in_the_way_that_training_knew(missing: float | None):
    frame = pd.DataFrame({"carrier": pd.Series(["UA", missing, "AA", missing], dtype=object)})
    encoder = OneHotEncoder().fit(frame)  # which refuses what it has not seen, None after NaN too
    contract = infer_contract(frame)
    again = contract.frame(plain_rows(contract, frame))
    np.testing.assert_array_equal(encoder.transform(again).toarray(), encoder.transform(frame).toarray())
    accepted, _ = contract.split(frame)
    np.testing.assert_array_equal(encoder.transform(accepted).toarray(), encoder.transform(frame).toarray())


def every_kind(rows: int) -> pd.DataFrame:
    """Flights with a column of every kind."""
    random = np.random.default_rng(0)
    seconds = pd.to_timedelta(random.integers(0, 10**6, rows), unit="s")
    return pd.DataFrame(
        {
            "carrier": random.choice(["UA", "AA"], rows),
            "origin": pd.Series(random.choice(["JFK", "LGA"], rows), dtype=object),
            "size": pd.Categorical(random.choice(["S", "L"], rows), ["S", "M", "L"], ordered=True),
            "gate": pd.Categorical(random.choice([1, 2], rows), [1, 2, 3]),
            "distance": random.integers(80, 4983, rows),
            "seats": pd.array([None if i % 7 == 0 else 2**53 + i for i in range(rows)], dtype="Int64"),
            "wind": random.random(rows).astype("float32"),
            "rain": pd.array([None if i % 5 == 0 else bool(i % 2) for i in range(rows)], dtype="boolean"),
            "day": [date(2013, 1, 1) + timedelta(i % 30) for i in range(rows)],
            "scheduled": (pd.Timestamp("2013-01-01") + seconds).as_unit("ns") + pd.Timedelta(7, unit="ns"),
            "time": (pd.Timestamp("2013-01-01", tz="UTC") + seconds).tz_convert("America/New_York"),
        }
    )


def test_every_kind_of_column_is_logged_answered_counted_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    frame = every_kind(120)
    encoder = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["carrier", "origin", "size", "gate"]),
        ("passthrough", ["wind"]),
    )
    late = frame["wind"].gt(0.5).astype(int)
    tag = nbprod.log_model(
        make_pipeline(encoder, LogisticRegression()).fit(frame, late),
        "kinds",
        inputs=frame,
        labels=late,
        columns={
            "distance": nbprod.Column(ge=0, lt=10_000, unit="miles", description="Between the airports"),
            "carrier": nbprod.Column(categories=["AA", "UA", "B6"]),
            "day": nbprod.Column(ge=date(2000, 1, 1)),
        },
    )
    model, project = nbprod.load_model(tag), load_settings(tmp_path, required=False, environ={})
    registry = CollectorRegistry()
    answerer = Answerer(model, project, registry)
    assert answerer.parity.equal
    rows = plain_rows(model.contract, frame.head(20))
    rows[0] |= {"gate": 9, "time": "2014-06-01T00:00:00+02:00"}
    answerer.predict(answerer.rows(body_of(rows)))
    with pytest.raises(ContractError, match="must be one of 'AA', 'UA', 'B6', got 'XX'"):
        answerer.predict(answerer.rows(body_of([rows[1] | {"carrier": "XX"}])))
    answerer.close()

    logged = nbprod.predictions("kinds", settings=project)
    asked = model.contract.frame(rows)
    for name in asked:
        found = logged["feature.time" if name == "time" else name]
        pd.testing.assert_series_equal(found, asked[name], check_names=False)
    counted = {
        (sample.labels["column"], sample.labels["kind"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "nbprod_unusual_values_total" and sample.value
    }
    assert counted == {("gate", "unseen"): 1, ("time", "above"): 1}
    assert {each.column for each in drift(model.baseline, asked)} == set(asked)

    document = openapi_document(model, {"paths": {}})
    validate(document)
    described = document["components"]["schemas"]["Row"]["properties"]
    assert described["distance"]["minimum"] == 0
    assert described["distance"]["exclusiveMaximum"] is True
    assert described["distance"]["description"].startswith("Between the airports; in miles; training values")
    assert described["carrier"]["enum"] == ["AA", "UA", "B6"]
    assert (described["day"]["format"], described["time"]["format"]) == ("date", "date-time")
    with pytest.warns(UnusualValueWarning, match="gate: 1 not among the training values"):
        model.predict(asked)
