"""What the tests of models share: flights, the steps that make numbers of them, and machines of a team."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from running import write_notebook
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import nbprod
from nbprod.model.store import Model, load


def make_flights(rows: int = 200) -> pd.DataFrame:
    """Flights with a text, a number that has nulls and a whole number."""
    generator = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "carrier": generator.choice(["AA", "B6", "UA"], rows),
            "wind": np.where(generator.random(rows) < 0.1, np.nan, generator.gamma(4, 2.5, rows)),
            "distance": generator.integers(80, 5000, rows),
        }
    )


def encoder() -> Any:
    """The steps that make numbers of flights."""
    return make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["carrier"]),
        (make_pipeline(SimpleImputer(), StandardScaler()), ["wind", "distance"]),
    )


flights = make_flights()
late = (flights["wind"].fillna(0) > 12).astype(int)


def logged(model: Any, inputs: pd.DataFrame = flights, labels: Any = None, **options: Any) -> Model:
    """`model` as a version."""
    return load(nbprod.log_model(model, "delay", inputs, labels, **options))


@dataclass(frozen=True)
class Machine:
    """A copy of a project with a BentoML store of its own."""

    project: Path
    enter: Callable[[], None]

    @property
    def home(self) -> Path:
        """The folder of its BentoML stores."""
        return self.project.parent / "bentoml"


def make_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, store: str, parameters: str, train: str
) -> Machine:
    """A machine in `folder`, with a training notebook and its store at an address, which is entered."""
    project = folder / "project"
    (project / "nbs").mkdir(parents=True)
    (project / "settings.ini").write_text(f"[nbprod]\nstore = {store}\n")
    write_notebook(project / "nbs" / "train.ipynb", parameters, train)

    def enter() -> None:
        monkeypatch.chdir(project)
        monkeypatch.setenv("BENTOML_HOME", str(folder / "bentoml"))

    enter()
    return Machine(project, enter)
