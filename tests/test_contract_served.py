"""Columns of every type are answered, logged, profiled and documented, not only validated."""

from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pandas as pd
import pytest
from prometheus_client import CollectorRegistry
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import nbprod
from nbprod.errors import ContractError
from nbprod.model.contract import json_schema, plain_rows
from nbprod.model.store import Model, load
from nbprod.serve.answering import Answerer
from nbprod.serve.openapi import openapi_document
from nbprod.serve.prediction_log import predictions
from nbprod.settings import load_settings

AIRLINES = ["UA", "B6", "AA"]
DAYS = pd.to_datetime(["2013-03-10", "2013-07-04", None, "2013-11-03"])
FLIGHTS = pd.DataFrame(
    {
        "distance": [200, 1400, 1089, 2475],
        "day": pd.Series([None if pd.isna(day) else day.date() for day in DAYS], dtype=object),
        "carrier": pd.Categorical(["UA", None, "AA", "B6"], categories=AIRLINES),
        "size": pd.Categorical(
            ["small", "large", "large", None], categories=["small", "large"], ordered=True
        ),
        "engines": pd.Categorical([2, 4, None, 2], categories=[2, 4]),
        # The hour of the last is there twice on that day: with daylight saving time, and an hour later.
        "departs": pd.to_datetime(
            ["2013-03-10T06:59:59", None, "2013-07-04T12:00:00.123456", "2013-11-03T06:30:00"],
            utc=True,
            format="ISO8601",
        ).tz_convert("America/New_York"),
        "booked": pd.to_datetime(
            ["2013-01-01T08:00", "2013-01-02T09:30:15.5", None, "2013-01-03"], format="ISO8601"
        ),
        "seats": pd.array([180, None, 2**60 + 1, 2], dtype="Int64"),
        "delayed": pd.array([True, None, False, True], dtype="boolean"),
        "gate": ["007", "A1", None, ""],
        "time": pd.to_datetime(["2013-01-01"] * 4).tz_localize("UTC"),  # the log has a column of this name
    }
)


@pytest.fixture
def model(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model of the flights, in a project and a store of the test's own."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    assert project.is_dir()
    pipeline = make_pipeline(make_column_transformer((StandardScaler(), ["distance"])), LinearRegression())
    pipeline.fit(FLIGHTS, FLIGHTS["distance"] / 8)
    said = {"distance": nbprod.Column(ge=0, unit="miles"), "carrier": nbprod.Column(categories=AIRLINES)}
    return load(nbprod.log_model(pipeline, "minutes", FLIGHTS, columns=said))


def answer(model: Model, requests: list[list[dict[str, Any]]]) -> None:
    """Answer requests as a service does, from their bytes, and write the log."""
    answerer = Answerer(model, load_settings(), CollectorRegistry())
    try:
        assert answerer.parity.equal
        for rows in requests:
            given = answerer.predict(answerer.rows(orjson.dumps({"rows": rows})))
            assert given.predictions == pytest.approx([row["distance"] / 8 for row in rows])
    finally:
        answerer.close()


def logged(model: Model) -> pd.DataFrame:
    """The input columns of what is logged, under their own names."""
    frame = predictions(model.name)
    return frame.drop(columns="time").rename(columns={"feature.time": "time"})[model.contract.names]


def test_the_prediction_log_keeps_every_type_null_and_zone(model: Model):
    rows = plain_rows(model.contract, FLIGHTS)
    answer(model, [rows[:1], rows[1:3], rows[3:]])
    pd.testing.assert_frame_equal(logged(model), model.contract.check_frame(FLIGHTS))
    assert plain_rows(model.contract, logged(model)) == rows


def test_a_log_of_nothing_but_nulls_has_the_dtypes_of_training(model: Model):
    empty = {column.name: None for column in model.contract.columns if column.nullable}
    row = plain_rows(model.contract, FLIGHTS)[0] | empty
    answer(model, [[row], [row, row]])
    assert logged(model).dtypes.tolist() == model.contract.check_frame(FLIGHTS).dtypes.tolist()
    assert plain_rows(model.contract, logged(model)) == [row] * 3


def test_moments_of_any_zone_are_logged_in_that_of_training(model: Model):
    row = plain_rows(model.contract, FLIGHTS)[0] | {"departs": "2013-07-04T14:00:00+02:00"}
    answer(model, [[row]])
    assert logged(model)["departs"].iloc[0] == pd.Timestamp("2013-07-04T08:00", tz="America/New_York")
    assert str(logged(model)["departs"].dt.tz) == "America/New_York"


def test_the_baseline_counts_what_is_logged_as_what_was_trained(model: Model):
    answer(model, [plain_rows(model.contract, FLIGHTS)])
    assert set(model.baseline.features) == set(model.contract.names)
    for name, values in logged(model).items():
        histogram = model.baseline.features[str(name)]
        assert histogram.count(values).tolist() == list(histogram.counts), name
        assert histogram.counts[-1] == FLIGHTS[name].isna().sum(), name
    times = {name for name, each in model.baseline.features.items() if each.time}
    assert times == {"day", "departs", "booked", "time"}


def test_the_document_describes_each_type_and_its_example_works(model: Model):
    document = orjson.loads(orjson.dumps(openapi_document(model, {"paths": {}})))
    properties = document["components"]["schemas"]["Row"]["properties"]
    formats = {name: each["format"] for name, each in properties.items() if "format" in each}
    assert formats.items() >= {"day": "date", "departs": "date-time"}.items()
    assert properties["distance"]["minimum"] == 0
    assert properties["carrier"]["enum"] == [*AIRLINES, None]
    types = {
        name: properties[name]["type"] for name in ("day", "carrier", "size", "engines", "seats", "delayed")
    }
    assert list(types.values()) == ["string", "string", "string", "integer", "integer", "boolean"]
    assert all(properties[name]["nullable"] for name in types)
    request = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    for row in request["rows"]:
        jsonschema.validate(row, json_schema(model.contract))
    answer(model, [request["rows"]])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("day", "2013-07-04T00:00:00"),
        ("carrier", "ZZ"),
        ("engines", "2"),
        ("departs", "2013-07-04T08:00:00"),
        ("booked", "2013-01-01T08:00:00Z"),
        ("seats", 1.5),
        ("distance", -1),
    ],
)
def test_a_service_refuses_what_breaks_a_type_and_logs_nothing(model: Model, column: str, value: Any):
    row = plain_rows(model.contract, FLIGHTS)[0] | {column: value}
    answerer = Answerer(model, load_settings(), CollectorRegistry())
    try:
        with pytest.raises(ContractError, match=column):
            answerer.predict(answerer.rows(orjson.dumps({"rows": [row]})))
    finally:
        answerer.close()
    assert len(predictions(model.name)) == 0


def test_unusual_days_moments_and_texts_are_counted_in_what_was_answered(model: Model):
    row = plain_rows(model.contract, FLIGHTS)[1] | {
        "distance": 9000,
        "day": "1999-12-31",
        "departs": "2030-01-01T00:00:00Z",
        "gate": "Z9",
    }
    answer(model, [[row]])
    assert model.contract.unusual(logged(model)) == {
        "distance": {"above": 1},
        "day": {"below": 1},
        "departs": {"above": 1},
        "gate": {"unseen": 1},
    }


def test_categories_that_training_did_not_see_are_logged_beside_known_ones(model: Model):
    known = plain_rows(model.contract, FLIGHTS)
    unseen = known[0] | {"size": "huge", "engines": 8}
    answer(model, [known[:2], [unseen], known[2:]])
    assert plain_rows(model.contract, logged(model)) == [*known[:2], unseen, *known[2:]]
    assert model.contract.unusual(logged(model)) == {"size": {"unseen": 1}, "engines": {"unseen": 1}}
