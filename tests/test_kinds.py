"""Models of any kind are logged, loaded, served and monitored; what cannot be logged says why."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import orjson
import pandas as pd
import pytest
import xgboost
from modelling import encoder, flights, late, logged
from prometheus_client import CollectorRegistry
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

import nbprod
from nbprod.errors import ModelError
from nbprod.model.contract import plain_rows
from nbprod.model.store import Model
from nbprod.monitor.report import report
from nbprod.serve.answering import Answerer
from nbprod.serve.openapi import schemas
from nbprod.serve.prediction_log import feedback
from nbprod.settings import load_settings

# Any estimator


def words(labels: Any) -> np.ndarray:
    return np.where(labels, "late", "on time")


two = np.column_stack([late, flights["distance"] > 2500]).astype(int)
numbers = flights[["wind", "distance"]].fillna(10.0)
forest = RandomForestClassifier(n_estimators=3, random_state=0)
isolation = IsolationForest(n_estimators=5, random_state=0)
ANY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "words": (LogisticRegression(), words(late), {"classes": ["late", "on time"]}),
    "truth values": (LogisticRegression(), late.astype(bool), {"classes": [False, True]}),
    "objects": (LogisticRegression(), words(late).astype(object), {"classes": ["late", "on time"]}),
    "three": (LogisticRegression(), late + (flights["distance"] > 2500), {"classes": [0, 1, 2]}),
    "several numbers": (LinearRegression(), flights[["distance"]].assign(x=late), {"outputs": 2}),
    "one column": (LinearRegression(), flights[["distance"]], {"outputs": 1}),
    "several labels": (
        RandomForestClassifier(n_estimators=3, random_state=0),
        two,
        {"outputs": 2, "classes": None},
    ),
    "several words": (MultiOutputClassifier(LogisticRegression()), words(two), {"outputs": 2}),
    "labels in one": (MLPClassifier(4, max_iter=300, random_state=0), two, {"outputs": 2}),
    "groups": (KMeans(3, random_state=0, n_init=1), None, {"kind": "clusterer", "classes": None}),
    "mixture": (GaussianMixture(2, random_state=0), None, {"kind": "clusterer"}),
    "outliers": (
        IsolationForest(n_estimators=5, random_state=0),
        None,
        {"kind": "outlier detector", "classes": [-1, 1]},
    ),
    "lightgbm": (
        lightgbm.LGBMClassifier(n_estimators=5, verbose=-1),
        words(late),
        {"classes": ["late", "on time"]},
    ),
    "xgboost": (xgboost.XGBClassifier(n_estimators=5), late, {"classes": [0, 1]}),
    "xgboost numbers": (xgboost.XGBRegressor(n_estimators=5), two.astype(float), {"outputs": 2}),
}


def answer_and_feedback(model: Model) -> dict[str, Any]:
    """What a service answers to some rows, after the outcome of each was told to be what it answered."""
    answerer = Answerer(model, load_settings(), CollectorRegistry())
    assert answerer.parity.equal
    try:
        given: dict[str, Any] = orjson.loads(
            orjson.dumps(answerer.predict(plain_rows(model.contract, flights)).as_dict())
        )
        pairs = [
            {"id": id, "actual": actual}
            for id, actual in zip(given["ids"], given["predictions"], strict=True)
        ]
        assert answerer.feedback(pairs) == {"accepted": len(flights), "unknown": []}
    finally:
        answerer.close()
    return given


def near(given: Any, expected: np.ndarray, tolerance: float) -> bool:
    """Whether two answers are the same but for rounding."""
    return expected.dtype.kind == "f" and np.allclose(given, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ANY)
def test_any_kind_is_logged_loaded_served_and_monitored(store: Path, name: str):
    assert store.name == "bentoml"
    estimator, target, facts = ANY[name]
    pipeline = make_pipeline(encoder(), estimator).fit(flights, target)
    model = nbprod.load_model(logged(pipeline, flights, target).tag)
    assert model.facts["format"] == "skops"
    assert {key: model.facts[key] for key in facts} == facts
    assert all(np.isfinite(value) for value in model.facts["holdout"].values())
    assert bool(model.facts["holdout"]) == (target is not None)
    assert np.array_equal(model.pipeline.predict(flights), pipeline.predict(flights))
    if hasattr(pipeline, "predict_proba"):
        expected = pipeline.predict_proba(flights)
        assert np.array_equal(model.pipeline.predict_proba(flights), expected)
        assert np.allclose(model.predict_proba(flights), expected, rtol=model.tolerance, atol=model.tolerance)
    given = answer_and_feedback(model)
    assert given["predictions"] == model.predict(flights).tolist()
    assert np.array_equal(given["predictions"], pipeline.predict(flights)) or near(
        given["predictions"], pipeline.predict(flights), model.tolerance
    )
    assert ("probabilities" in given) == (hasattr(pipeline, "predict_proba") and model.outputs is None)
    outcome = schemas(model)["Feedback"]["properties"]["actual"]
    assert (outcome.get("type") == "array") == (model.outputs is not None)
    told = feedback(model.name)
    assert [np.asarray(each).tolist() for each in told["actual"]] == [
        np.asarray(each).tolist() for each in told["prediction"]
    ]
    found = report(model.name)
    assert found.rows == found.performance.rows == len(flights)
    assert not found.prediction.drifted
    metrics = found.performance.metrics
    assert metrics.get("accuracy") == 1 or metrics.get("mae") == 0
    orjson.dumps(found.as_dict() | {"performance": None})


def test_a_text_a_sparse_and_a_pandas_step(store: Path):
    assert store.name == "bentoml"
    texts = pd.DataFrame({"remark": ["late wind", "on time", "", "late"] * 25, "distance": range(100)})
    target = texts["remark"].str.contains("late")
    steps = make_column_transformer((TfidfVectorizer(), "remark"), (StandardScaler(), ["distance"]))
    sparse = make_pipeline(steps, LogisticRegression()).fit(texts, target)
    assert (
        logged(sparse, texts, target).pipeline.predict_proba(texts).tolist()
        == sparse.predict_proba(texts).tolist()
    )
    framed = make_pipeline(StandardScaler().set_output(transform="pandas"), LogisticRegression())
    framed.fit(numbers, late)
    assert logged(framed, numbers, late).pipeline[:-1].transform(numbers).columns.tolist() == [
        "wind",
        "distance",
    ]


def test_an_extra_that_is_not_installed_is_named(store: Path, tmp_path: Path):
    model = lightgbm.LGBMRegressor(n_estimators=3, verbose=-1).fit(numbers, late)
    tag = logged(model, numbers).tag
    code = f"import sys; sys.modules['lightgbm'] = None; import nbprod; nbprod.load_model({tag!r}).pipeline"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert store.name == "bentoml"
    assert "pip install 'nbprod[lightgbm]'" in done.stderr.splitlines()[-1]


# What cannot be logged


@pytest.mark.parametrize(
    ("model", "inputs", "labels", "said"),
    [
        (LinearRegression(), numbers, None, "LinearRegression is not fitted"),
        (make_pipeline(StandardScaler(), LinearRegression()), numbers, None, "is not fitted"),
        (StandardScaler().fit(numbers), numbers, None, "has no predict"),
        (LinearRegression().fit(numbers, late), numbers.to_numpy(), None, "not a ndarray"),
        (LinearRegression().fit(numbers, late), numbers["wind"], None, "not a Series"),
        (LinearRegression().fit(numbers, late), numbers[["wind"]], None, "(column distance)"),
        (LinearRegression().fit(numbers, late), flights[["wind", "distance"]], None, "(column wind)"),
        (LinearRegression().fit(numbers, late), numbers, late.head(), "labels are of the shape (5,)"),
        (LogisticRegression().fit(numbers, late), numbers, words(late), "labels cannot be compared"),
        (
            make_pipeline(FunctionTransformer(lambda x: x), LinearRegression()).fit(numbers, late),
            numbers,
            None,
            "lambda",
        ),
    ],
)
def test_what_cannot_be_logged_says_why_and_leaves_nothing(
    store: Path, model: Any, inputs: Any, labels: Any, said: str
):
    with pytest.raises(ModelError) as error:
        logged(model, inputs, labels)
    assert said in str(error.value)
    assert not (store / "models").exists()


def test_a_model_that_answers_at_random_is_told_so(store: Path):
    class Dice(LinearRegression):
        def predict(self, X: Any) -> np.ndarray:
            return np.random.default_rng().random(len(X))

    Dice.__module__, Dice.__qualname__ = __name__, "Dice"
    globals()["Dice"] = Dice
    with pytest.raises(ModelError, match="another way each time"):
        logged(Dice().fit(numbers, late), numbers, trusted=[f"{__name__}.Dice"])
    assert not (store / "models").exists()


# Golden examples


def test_golden_examples_have_hard_rows_that_the_pipeline_answers(store: Path):
    assert store.name == "bentoml"
    tolerant = logged(make_pipeline(encoder(), LogisticRegression()).fit(flights, late), flights, late)
    rows = tolerant.examples["rows"]
    assert {"", "never seen in training"} <= {row["carrier"] for row in rows}
    assert {None, flights["wind"].max(), flights["wind"].min()} <= {row["wind"] for row in rows}
    assert tolerant.facts["examples"] == {"typical": len(rows) - 7, "hard": 7, "left_out": 0}
    strict = make_column_transformer((OneHotEncoder(), ["carrier"]), (StandardScaler(), ["distance"]))
    strict_model = logged(make_pipeline(strict, LogisticRegression()).fit(flights, late), flights, late)
    assert strict_model.facts["examples"]["left_out"] == 2
    assert len(rows) <= 100
