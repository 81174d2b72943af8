"""The compiled form of a model: where it is used, what it answers, and what happens without it."""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from running import write_notebook
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

import nbprod
from nbprod.cli import main
from nbprod.model.compile import compile_model, difference
from nbprod.model.contract import infer_contract, plain_rows
from nbprod.model.pipeline import compute

TRAIN = """
import pandas as pd
from sklearn.linear_model import LogisticRegression
import nbprod
inputs = pd.DataFrame({"distance": [400, 1000, 1600, 2475], "wind": [3.0, 20.5, 4.5, 18.0]})
model = LogisticRegression().fit(inputs, [0, 1, 0, 1])
nbprod.log_model(model, "late", inputs=inputs, labels=[0, 1, 0, 1])
"""
CODES = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan, encoded_missing_value=np.nan)
KNOWN = OneHotEncoder(handle_unknown="ignore")
FILLED = make_pipeline(SimpleImputer(), StandardScaler())
NUMBERS = ["hour", "distance", "wind"]


@pytest.fixture
def tag(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that a run has logged, in a project and a BentoML store of its own."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    return nbprod.run(write_notebook(project / "nbs" / "train.ipynb", "seed = 0", TRAIN)).model


def flights(rows: int, seed: int = 0) -> pd.DataFrame:
    """Flights with a text, a whole number, and numbers of 64 and 32 bits that may be missing."""
    random = np.random.default_rng(seed)
    wind = random.normal(10, 4, rows).round(2)
    wind[random.random(rows) < 0.1] = np.nan
    distance = random.uniform(90, 2500, rows).astype("float32")
    distance[random.random(rows) < 0.05] = np.nan
    texts = random.choice(["UA", "AA", "B6", "DL"], rows)
    return pd.DataFrame(
        {"carrier": texts, "hour": random.integers(0, 24, rows), "distance": distance, "wind": wind}
    )


def strange(rows: int) -> pd.DataFrame:
    """Flights as nobody saw them: values far off, texts of any letters, everything missing."""
    random = np.random.default_rng(1)
    letters = [chr(code) for code in (*range(32, 127), 0xE9, 0x130, 0xDF, 0x4E2D, 0x1F6EB, 0x301)]
    table = flights(rows, seed=2)
    table["carrier"] = ["".join(random.choice(letters, random.integers(0, 6))) for _ in range(rows)]
    table["hour"] = random.integers(-1000, 1000, rows)
    table["wind"] = random.choice([np.nan, -0.0, 1e-300, -1e6, 10.005, 9.995, 1e6], rows) * 1.0
    table.loc[random.random(rows) < 0.3, "distance"] = np.nan
    return table


def late(table: pd.DataFrame) -> np.ndarray:
    """Whether a flight is late: an outcome that depends on all columns."""
    score = table["wind"].fillna(12) + table["hour"] / 2 + (table["carrier"] == "UA") * 3
    return (score + table["distance"].fillna(0) / 1000 > 18).to_numpy()


@pytest.mark.usefixtures("tag")
def test_a_wholly_compiled_model_answers_rows_without_pandas_and_scikit_learn():
    code = (
        "import sys, json, nbprod\n"
        "model = nbprod.load_model('late:latest')\n"
        "given = model.compute_rows([{'distance': 1000, 'wind': 20.5}, {'distance': 400, 'wind': 3.0}])\n"
        "heavy = {'pandas', 'scipy', 'sklearn', 'skops', 'skl2onnx', 'papermill'} & set(sys.modules)\n"
        "print(json.dumps([given.predictions.tolist(), given.probabilities.tolist(), sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    predictions, probabilities, heavy = json.loads(done.stdout)
    assert predictions == [1, 0]
    assert heavy == []
    pipeline = nbprod.load_model("late:latest").pipeline
    expected = pipeline.predict_proba(pd.DataFrame({"distance": [1000, 400], "wind": [20.5, 3.0]}))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_the_verdict_is_listed_and_recorded(tag: str, capsys: pytest.CaptureFixture[str]):
    assert main(["models", "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["tag"], listed["compiled"]) == (tag, "whole")
    verdict = nbprod.load_model(tag).verdict
    assert verdict["difference"] <= verdict["tolerance"] == nbprod.load_model(tag).tolerance
    assert verdict["rows"] > 4
    assert set(verdict["microseconds"]) == {"pipeline", "compiled"}


def test_a_damaged_graph_is_not_used_and_said(tag: str, caplog: pytest.LogCaptureFixture):
    model = nbprod.load_model(tag)
    expected = model.predict(pd.DataFrame({"distance": [1000], "wind": [20.5]}))
    graph = model.file("compiled") / "graph.onnx"
    graph.write_bytes(graph.read_bytes()[:100])
    damaged = nbprod.load_model(tag)
    with caplog.at_level(logging.WARNING, "nbprod"):
        given = damaged.predict(pd.DataFrame({"distance": [1000], "wind": [20.5]}))
    assert given.tolist() == expected.tolist() == [1]
    assert damaged.predictor is None
    assert f"the pipeline of {tag} answers itself" in caplog.text


def test_threads_share_a_predictor(tag: str):
    model = nbprod.load_model(tag)
    rows = [{"distance": 100 * number, "wind": number / 2} for number in range(2500)]
    expected = model.compute_rows(rows).probabilities
    assert expected is not None
    parts = [slice(number, number + 1 + number % 90) for number in range(0, 2400, 7)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda part: model.compute_rows(rows[part]).probabilities, parts))
    for part, probabilities in zip(parts, given, strict=True):
        np.testing.assert_allclose(probabilities, expected[part], rtol=1e-12)


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(
            make_column_transformer((CODES, ["carrier"]), remainder="passthrough"),
            HistGradientBoostingRegressor(max_iter=40),
        ),
        make_pipeline(
            make_column_transformer((KNOWN, ["carrier"]), (FILLED, NUMBERS)),
            RandomForestClassifier(30, random_state=0),
        ),
        make_pipeline(make_column_transformer((KNOWN, ["carrier"]), (FILLED, NUMBERS)), LogisticRegression()),
    ],
    ids=["boosting", "forest", "logistic"],
)
def test_what_was_accepted_answers_strange_rows_as_the_pipeline_does(model: Any):
    """The rows are others than those that the graph was accepted on."""
    table = flights(1500)
    model.fit(table, late(table))
    contract = infer_contract(table)
    predictor, verdict = compile_model(model, contract, table.tail(400).reset_index(drop=True))
    assert predictor is not None, verdict.reason
    assert verdict.compiled == "whole"
    rows = pd.concat([strange(3000), flights(1000, seed=3)], ignore_index=True)
    expected = compute(model, rows)
    assert difference(expected, predictor.compute(rows)) <= verdict.tolerance
    assert difference(expected, predictor.compute_rows(plain_rows(contract, rows))) <= verdict.tolerance


def test_a_model_that_does_not_compile_answers_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    inputs = pd.DataFrame({"distance": [400, 1000, 1600, 2475]})
    ridge = KernelRidge().fit(inputs, [70.0, 150.0, 230.0, 345.0])
    model = nbprod.load_model(nbprod.log_model(ridge, "air_time", inputs=inputs))
    assert (model.verdict["compiled"], model.verdict["reason"]) == (
        "no",
        "skl2onnx has no converter for KernelRidge",
    )
    assert model.predictor is None
    assert model.compute_rows([{"distance": 1000}]).predictions == pytest.approx(ridge.predict(inputs[1:2]))
    assert not (model.folder / "compiled").exists()


def test_a_text_model_is_not_compiled_where_tokens_would_differ():
    """ONNX has no tokenizer that reads every script as scikit-learn does, so the pipeline answers itself."""
    table = flights(300)
    table["carrier"] = [
        f"{text} from {hour}" for text, hour in zip(table["carrier"], table["hour"], strict=True)
    ]
    texts = make_column_transformer((TfidfVectorizer(), "carrier"), (FILLED, NUMBERS))
    model = make_pipeline(texts, LogisticRegression()).fit(table, late(table))
    predictor, verdict = compile_model(model, infer_contract(table), table)
    assert predictor is None
    assert verdict.compiled == "no"
    assert verdict.reason
