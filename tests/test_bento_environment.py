"""A Bento where nothing is installed but what it asks for, as in a container: it starts, answers and logs."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

import httpx
import pytest
from modelling import encoder, flights, late, logged
from operating import served
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import nbprod
from nbprod.model.store import Model
from nbprod.serve.bento import build
from nbprod.serve.log_reading import feedback, predictions
from nbprod.serve.requirements import needs_python
from nbprod.settings import load_settings

LIST = "from importlib.metadata import distributions; print(*[each.name for each in distributions()])"


def needed(asked: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements bring, themselves and all that they require."""
    found: dict[str, Distribution] = {}
    known: set[tuple[str, str]] = set()
    waiting = [Requirement(each) for each in asked]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in known:
                continue
            known.add((name, extra))
            with suppress(PackageNotFoundError):
                found[name] = distribution(name)
                required = map(Requirement, found[name].requires or ())
                waiting += [
                    each for each in required if each.marker is None or each.marker.evaluate({"extra": extra})
                ]
    return found


def make_environment(folder: Path, asked: Iterable[str]) -> Path:
    """A Python environment with exactly what these requirements bring; its interpreter.

    The files are those that are installed here, so nothing is fetched.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for each in needed(asked).values():
        for file in each.files or ():
            source = Path(str(each.locate_file(file)))
            if ".." not in file.parts and source.is_file() and source.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).symlink_to(source)
    return folder / "bin" / "python"


def compiled() -> Model:
    """A model whose answers are a graph's."""
    return logged(make_pipeline(encoder(), LogisticRegression()).fit(flights, late), flights, late)


def in_python() -> Model:
    """A model whose answers need scikit-learn."""
    words = flights[["carrier"]]
    steps = make_column_transformer((CountVectorizer(analyzer="char"), "carrier"))
    model = logged(make_pipeline(steps, LogisticRegression()).fit(words, late), words, late)
    assert needs_python(model)
    return model


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("make", [compiled, in_python])
def test_it_needs_nothing_that_it_does_not_ask_for(
    make: Callable[[], Model], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    model = make()
    built = build(model.tag)
    asked = (built.path / "env" / "python" / "requirements.txt").read_text().split()
    python = make_environment(tmp_path / "environment", asked)
    listed = subprocess.run([python, "-c", LIST], capture_output=True, text=True, check=True).stdout.split()
    assert "bentoml" in listed and {"nbprod", "papermill", "jupyterlab"}.isdisjoint(listed)
    folder = tmp_path / "service"
    with served(built.bento, folder, free_port(), python=str(python)) as service:
        answer = httpx.post(f"{service.url}/predict", json={"rows": model.examples["rows"]}).json()
        assert answer["predictions"] == model.examples["predictions"]
        told = {"feedback": [{"id": answer["ids"][0], "actual": 1}]}
        assert httpx.post(f"{service.url}/feedback", json=told).json() == {"accepted": 1, "unknown": []}
        with nbprod.connect(service.url) as client:  # which sends Arrow
            frame = model.contract.frame(model.examples["rows"])
            assert client.predict(frame).tolist() == answer["predictions"]
        assert httpx.get(f"{service.url}/v2").json()["version"] == version("nbprod")
        pages = ("/model", "/docs", "/docs.json", "/schema.json", "/metrics")
        assert {path: httpx.get(f"{service.url}{path}").status_code for path in pages} == dict.fromkeys(
            pages, 200
        )
    settings = load_settings(required=False, environ={"NBPROD_STORE": str(folder / "store")})
    assert predictions("delay", settings=settings)["id"].tolist()[: len(answer["ids"])] == answer["ids"]
    assert feedback("delay", settings=settings)["id"].tolist() == answer["ids"][:1]
