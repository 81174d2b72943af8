"""Every estimator of scikit-learn that predicts: logged, loaded without pickle elsewhere, the same answers.

scikit-learn's own tests say how each can be constructed; a mixed frame with nulls and text is encoded first.
"""

import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder
from sklearn.utils import all_estimators
from sklearn.utils._test_common.instance_generator import _construct_instances

import nbprod
from nbprod.errors import ModelError
from nbprod.model.store import Model, load

KINDS = ("classifier", "regressor", "clusterer", "outlier_detector", "density_estimator")
# skops cannot write these (its list of unsupported types); pickle can, for who asks for it.
NOT_SAVED = {"Birch"}

# Loads each model as a stranger would, with everything gone that could read a pickle.
CHILD = """
import json, pickle, sys
import joblib, pandas as pd
import nbprod

def refuse(*_, **__):
    raise AssertionError("a pickle was read")

pickle.load = pickle.loads = pickle.Unpickler = joblib.load = refuse
inputs = pd.read_json(sys.argv[1], orient="table").reset_index(drop=True)
for tag in json.load(sys.stdin):
    model = nbprod.load_model(tag)
    frame = model.contract.check_frame(inputs)
    computed = model.compute(frame)
    answer = {"pipeline": model.pipeline.predict(frame).tolist(), "computed": computed.predictions.tolist()}
    if computed.probabilities is not None:
        answer["probabilities"] = computed.probabilities.tolist()
    print(json.dumps([tag, answer]))
"""


@dataclass(frozen=True)
class Case:
    """One estimator: the fitted pipeline and what became of it, a version or an error."""

    name: str
    kind: str
    pipeline: Pipeline
    model: Model | None
    error: str = ""


def make_inputs(rows: int = 90) -> pd.DataFrame:
    """Flights with a number that has nulls, a whole number and a text."""
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "wind": np.where(generator.random(rows) < 0.1, np.nan, generator.gamma(4, 2.5, rows)),
            "distance": generator.integers(80, 5000, rows),
            "carrier": generator.choice(["AA", "B6", "UA"], rows),
        }
    )


def encoded(estimator: Any) -> Pipeline:
    """`estimator` behind the steps that make numbers of the frame; a single column for who takes no more."""
    numbers = make_pipeline(SimpleImputer(), MinMaxScaler())
    if estimator.__sklearn_tags__().input_tags.one_d_array:
        return make_pipeline(make_column_transformer((numbers, ["wind"])), estimator)
    texts = OneHotEncoder(drop="first", sparse_output=False, handle_unknown="ignore")
    return make_pipeline(
        make_column_transformer((numbers, ["wind", "distance"]), (texts, ["carrier"])), estimator
    )


def make_target(estimator: Any, kind: str, inputs: pd.DataFrame) -> Any:
    """Labels or numbers that depend on the inputs; two a row for who predicts several outputs only."""
    number = inputs["wind"].fillna(10) + inputs["distance"] / 1000 + 1
    target = (number > number.median()).astype(int) if kind == "classifier" else number
    tags = estimator.__sklearn_tags__().target_tags
    return np.column_stack([target, target[::-1]]) if tags.multi_output and not tags.single_output else target


def candidates() -> Iterator[tuple[str, str, Any]]:
    """Name, kind and an unfitted instance of every estimator, and of one that has to be told to predict."""
    for name, constructor in all_estimators():
        try:
            estimator = next(iter(_construct_instances(constructor)))
        except (
            BaseException
        ) as error:  # scikit-learn skips what cannot be constructed; pytest's skip is no Exception
            assert type(error).__name__ in ("SkipTest", "Skipped"), name
            continue
        kind = estimator.__sklearn_tags__().estimator_type
        if kind in KINDS:
            if "random_state" in estimator.get_params():  # one of them predicts at random
                estimator.set_params(random_state=0)
            yield name, kind, estimator
    yield "LocalOutlierFactor (novelty)", "outlier_detector", LocalOutlierFactor(novelty=True)


def log(name: str, kind: str, estimator: Any, inputs: pd.DataFrame) -> Case:
    """Fit an estimator and log it."""
    target = make_target(estimator, kind, inputs)
    pipeline = encoded(estimator).fit(inputs, target)
    labels = target if kind in ("classifier", "regressor") else None
    tagged = "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")
    try:
        return Case(name, kind, pipeline, load(nbprod.log_model(pipeline, tagged, inputs, labels)))
    except ModelError as error:
        return Case(name, kind, pipeline, None, str(error))


@pytest.fixture(scope="module")
def inputs() -> pd.DataFrame:
    return make_inputs()


@pytest.fixture(scope="module")
def cases(inputs: pd.DataFrame) -> list[Case]:
    with warnings.catch_warnings():  # so few rows: much does not converge
        warnings.simplefilter("ignore")
        return [log(*candidate, inputs) for candidate in candidates()]


@pytest.fixture(scope="module")
def answers(
    cases: list[Case], inputs: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What a new process answers, in another folder and without pickle, by tag."""
    folder = tmp_path_factory.mktemp("elsewhere")
    table = folder / "inputs.json"
    inputs.to_json(table, orient="table", double_precision=15)
    tags = [case.model.tag for case in cases if case.model]
    command = [sys.executable, "-P", "-c", CHILD, str(table)]
    done = subprocess.run(
        command, cwd=folder, input=json.dumps(tags), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def are_equal(expected: np.ndarray, given: Any, tolerance: float = 1e-9) -> bool:
    """Whether two answers are the same; numbers up to the rounding that another order of sums gives."""
    found = np.asarray(given)
    if expected.dtype.kind != "f":
        return bool(np.array_equal(expected, found))
    return expected.shape == found.shape and bool(
        np.allclose(expected, found, rtol=tolerance, atol=tolerance, equal_nan=True)
    )


def test_every_one_is_saved_without_pickle_or_refused_by_name(cases: list[Case]):
    assert len(cases) > 100
    for case in cases:
        if case.model:
            assert case.model.facts["format"] == "skops"
        elif hasattr(case.pipeline, "predict"):
            assert case.name in NOT_SAVED, case.error
            assert f"{case.name} cannot be saved without pickle" in case.error
        else:
            assert "has no predict method" in case.error, case.error


def test_each_answers_the_same_in_a_new_process(
    cases: list[Case], answers: dict[str, dict[str, Any]], inputs: pd.DataFrame
):
    wrong = []
    for case in (case for case in cases if case.model):
        assert case.model is not None
        given = answers[case.model.tag]
        if not are_equal(case.pipeline.predict(inputs), given["pipeline"]):
            wrong.append(case.name)
        if "probabilities" in given:
            tolerance = compiled(case.model).get("tolerance") or 1e-9
            if not are_equal(case.pipeline.predict_proba(inputs), given["probabilities"], tolerance):
                wrong.append(f"{case.name}: probabilities")
    assert wrong == []


def compiled(model: Model) -> dict[str, Any]:
    """What is known of the compiled form of a model; nothing where it has none."""
    found: dict[str, Any] = model.facts.get("compiled") or {}
    return found


def test_each_that_is_compiled_agrees_within_its_tolerance(
    cases: list[Case], answers: dict[str, dict[str, Any]], inputs: pd.DataFrame
):
    """What `compute` answers, compiled or not; the tolerance is the one that the version states."""
    wrong = []
    for case in (case for case in cases if case.model):
        assert case.model is not None
        tolerance = compiled(case.model).get("tolerance") or 1e-9
        if not are_equal(case.pipeline.predict(inputs), answers[case.model.tag]["computed"], tolerance):
            wrong.append(case.name)
    assert wrong == []


def test_a_table_of_counts(cases: list[Case], capsys: pytest.CaptureFixture[str]):
    def fate(case: Case) -> str:
        if case.model is None:
            return "refused by name" if hasattr(case.pipeline, "predict") else "no predict method"
        names = {"whole": "compiled wholly", "part": "in part"}
        return names.get(compiled(case.model).get("compiled", ""), "not at all")

    saved = ["compiled wholly", "in part", "not at all"]
    counts = Counter((case.kind, fate(case)) for case in cases)
    table = pd.Series(counts).unstack(fill_value=0)
    table = table.reindex(columns=[*saved, "refused by name", "no predict method"], fill_value=0)
    table.insert(0, "saved safely", table[saved].sum(axis=1))
    with capsys.disabled():
        print(f"\n\n{table.T.assign(all=table.sum()).to_string()}\n")
    assert table["saved safely"].sum() == sum(case.model is not None for case in cases)


def test_who_cannot_be_saved_safely_can_be_pickled_by_name(cases: list[Case], inputs: pd.DataFrame):
    """The answer is the same as ever, once it was allowed where it is loaded too."""
    for case in (case for case in cases if case.name in NOT_SAVED and not case.model):
        tag = nbprod.log_model(case.pipeline, "pickled", inputs, allow_pickle=True)
        assert load(tag).facts["format"] == "pickle"
        with pytest.raises(ModelError, match="is a pickle"):
            nbprod.load_model(tag).predict(inputs)
        given = nbprod.load_model(tag, allow_pickle=True).predict(inputs)
        assert given.tolist() == case.pipeline.predict(inputs).tolist()
