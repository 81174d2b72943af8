"""Contracts hold what they promise: properties of generated contracts and rows, by rules of the tests."""

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbprod
from nbprod.errors import ContractError
from nbprod.model.compatibility import compare_contracts
from nbprod.model.contract import Column, Contract, infer_contract, json_schema, plain_rows

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
        is_number(value) and abs(value) <= np.finfo(column.dtype).max and in_limits(column, value)
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
