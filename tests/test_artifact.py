"""A model's file cannot run code; who trusts more says so by name; the project's library comes along."""

import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import skops.io
from modelling import encoder, flights, late, logged
from sklearn.cluster import Birch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree._tree import NODE_DTYPE

import nbprod
from nbprod.cli import main
from nbprod.errors import ModelError
from nbprod.model.store import Model
from nbprod.serve.bento import build

Node = dict[str, Any]


# Hostile files


def json_node(value: Any) -> Node:
    return {
        "__class__": "str",
        "__module__": "builtins",
        "__loader__": "JsonNode",
        "content": json.dumps(value),
    }


def node(loader: str, path: str, **state: Any) -> Node:
    module, _, name = path.rpartition(".")
    return {"__class__": name, "__module__": module, "__loader__": loader, **state}


def sequence_node(loader: str, path: str, *values: Node) -> Node:
    return node(loader, path, content=list(values))


def dict_node(content: dict[str, Node], kind: Node | None = None) -> Node:
    kind = kind or node("TypeNode", "builtins.str")
    key_types = sequence_node("ListNode", "builtins.list", *[kind] * len(content))
    return node("DictNode", "builtins.dict", content=content, key_types=key_types)


def called(function: Node, argument: str) -> Node:
    """skops passes the keys of a dictionary through the types that the file lists for them."""
    return dict_node({argument: json_node(1)}, function)


def system(*values: Node) -> Node:
    return sequence_node("TupleNode", "builtins.tuple", *values)


def partial_node(function: Node) -> Node:
    empty = {"args": system(), "kwds": dict_node({}), "namespace": json_node(None)}
    return node("PartialNode", "functools.partial", content={"func": function, **empty})


SCIPY = "scipy.stats._continuous_distns.norm_gen"
PAYLOADS: dict[str, Callable[[str, str], Node]] = {
    # Each makes the file `marker`; `command` is the shell command that does.
    "os.system": lambda _, command: node(
        "ConstructorFromReduceNode", "os.system", content=system(json_node(command))
    ),
    "subprocess.check_call": lambda marker, _: sequence_node(
        "ListNode", "subprocess.check_call", json_node("touch"), json_node(marker)
    ),
    "posix.system": lambda _, command: called(node("FunctionNode", "posix.system"), command),
    "builtins.exec": lambda _, command: called(
        partial_node(node("TypeNode", "builtins.exec")), f"import os; os.system({command!r})"
    ),
    "builtins.eval": lambda _, command: node(
        *("LossNode", "builtins.eval"),
        content=dict_node({}),
        __reduce__={"args": system(json_node(f"__import__('os').system({command!r})"))},
    ),
    "operator.call": lambda _, command: node(
        "OperatorFuncNode",
        "operator.call",
        attrs=system(node("FunctionNode", "posix.system"), json_node(command)),
    ),
    "numpy.ndarray.tofile": lambda marker, _: called(
        node("MethodNode", "numpy.ndarray", content={"func": "tofile", "obj": array_node("0.npy")}), marker
    ),
    SCIPY: lambda _, command: node(
        *("ObjectNode", SCIPY),
        content=dict_node({"_parse_arg_template": json_node(f"import os; os.system({command!r})")}),
    ),
}


def array_node(file: str) -> Node:
    return node("NdArrayNode", "numpy.ndarray", type="numpy", file=file)


def array_bytes(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


Members = dict[str, bytes]


def forged(path: Path, change: Callable[[Node, Members], None], compression: int = 0) -> bytes:
    """Change the schema and the members of the skops file at `path`; its bytes, as they are now."""
    with ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(members["schema.json"])
    change(schema, members)
    if "schema.json" in members:
        members["schema.json"] = json.dumps(schema).encode()
    with ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


def add(payload: Node) -> Callable[[Node, Members], None]:
    """Make `payload` an attribute of the pipeline in the file."""

    def change(schema: Node, members: Members) -> None:
        attributes = schema["content"]
        attributes["content"]["extra"] = payload
        attributes["key_types"]["content"].append(node("TypeNode", "builtins.str"))
        members["0.npy"] = array_bytes(np.arange(3))

    return change


@pytest.fixture
def forest(store: Path) -> Model:
    """A version with trees in it."""
    assert store.name == "bentoml"
    model = make_pipeline(StandardScaler(), RandomForestClassifier(n_estimators=3, random_state=0))
    return logged(model.fit(flights[["distance"]], late), flights[["distance"]], late)


def refused(model: Model, *said: str) -> None:
    """`model` is refused with its path and with what is said."""
    with pytest.raises(ModelError) as error:
        nbprod.load_model(model.tag).predict(flights)
    for text in (str(model.folder), *said):
        assert text in str(error.value)


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_refused_by_name_and_not_executed(forest: Model, tmp_path: Path, name: str):
    marker = tmp_path / "executed"
    payload = PAYLOADS[name](str(marker), f"touch {marker}")
    data = forged(forest.file("pipeline.skops"), add(payload))
    refused(forest, name, "not trusted")
    assert not marker.exists()
    # It is a real one: who nods at all that skops lists has executed it.
    try:
        skops.io.loads(data, trusted=[*skops.io.get_untrusted_types(data=data), name])
    except Exception as error:  # after it was executed
        logging.info("skops: %s", error)
    for _ in range(100):
        if marker.exists():
            return
        os.sched_yield()
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the payload does nothing")


def test_a_function_of_scikit_learn_that_deletes_a_folder_is_no_value(forest: Model, tmp_path: Path):
    victim = tmp_path / "victim"
    victim.mkdir()
    name = "sklearn.datasets._base.clear_data_home"
    data = forged(forest.file("pipeline.skops"), add(called(node("FunctionNode", name), str(victim))))
    refused(forest, name)
    assert victim.exists()
    skops.io.loads(data, trusted=[name, *skops.io.get_untrusted_types(data=data)])
    assert not victim.exists()


@pytest.mark.parametrize(
    "payload",
    [
        array_node("0.npy") | {"__class__": "memmap"},
        node("MethodNode", "sklearn.pipeline.Pipeline", content={"func": "fit", "obj": json_node(1)}),
        node("ObjectNode", "sklearn.utils._show_versions.platform"),
        node("ObjectNode", "sklearn.conftest.pytest"),
        node("FunctionNode", "numpy.load"),
        node("FunctionNode", "numpy.testing._private.utils.runstring"),
        node("TypeNode", "xgboost.core.DMatrix"),
        node("UnheardNode", "builtins.str"),
        node(
            "DefaultDictNode",
            "collections.defaultdict",
            content={"default_factory": node("FunctionNode", "numpy.mean"), "main": dict_node({})},
        ),
        dict_node({"a": json_node(1)}, partial_node(node("TypeNode", "builtins.str"))),
        {"__loader__": {"__loader__": "JsonNode"}},
        {"__loader__": "DictNode"},
        {"__loader__": ["ObjectNode"], "__module__": None, "__class__": 7},
    ],
)
def test_what_has_no_place_in_a_model_is_refused(forest: Model, payload: Node):
    forged(forest.file("pipeline.skops"), add(payload))
    refused(forest)


class Payload:
    """What pickle executes when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def first_array(members: Members, *texts: bytes) -> str:
    return next(
        name for name in members if name.endswith(".npy") and all(text in members[name] for text in texts)
    )


def test_a_pickle_inside_of_the_archive_is_not_read(forest: Model, tmp_path: Path):
    marker = tmp_path / "executed"
    evil = np.array([Payload(marker)], dtype=object)

    def change(_: Node, members: Members) -> None:
        members[first_array(members, b"left_child")] = array_bytes(evil, allow_pickle=True)

    forged(forest.file("pipeline.skops"), change)
    refused(forest, "only pickle could read")
    forest.file("pipeline.skops").write_bytes(pickle.dumps(Payload(marker)))
    refused(forest, "no readable skops file")
    assert not marker.exists()


def changed_array(text: bytes, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Node, Members], None]:
    def forge(_: Node, members: Members) -> None:
        name = first_array(members, text)
        members[name] = array_bytes(change(np.load(io.BytesIO(members[name]))))

    return forge


def bitness(array: np.ndarray) -> np.ndarray:
    """The nodes of a tree as a machine of 32 bits writes them."""
    small = {
        name: "<i4" if kind[0] == np.dtype(np.intp) else kind[0] for name, kind in NODE_DTYPE.fields.items()
    }
    return array.astype(list(small.items()))


def endless(array: np.ndarray) -> np.ndarray:
    """A tree whose root leads to itself."""
    array["left_child"][0] = 0
    return array


def outside(array: np.ndarray) -> np.ndarray:
    """A tree whose root leads to memory that is not its own."""
    array["right_child"][0] = 10**9
    return array


def without_schema(_: Node, members: Members) -> None:
    del members["schema.json"]


def set_protocol(protocol: Any) -> Callable[[Node, Members], None]:
    return lambda schema, _: schema.update(protocol=protocol)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_array(b"'<f8'", lambda array: array.astype(">f8")), "another order of bytes"),
        (
            changed_array(b"left_child", lambda array: array.astype(array.dtype.newbyteorder())),
            "order of bytes",
        ),
        (changed_array(b"left_child", bitness), "another architecture"),
        (changed_array(b"left_child", endless), "lead nowhere"),
        (changed_array(b"left_child", outside), "lead nowhere"),
        (changed_array(b"left_child", lambda array: array[:1]), "lead nowhere"),
        (set_protocol(99), "protocol 99"),
        (set_protocol(0), "protocol 0"),
        (set_protocol("2"), "not skops'"),
        (without_schema, "no readable skops file"),
        (lambda schema, _: schema.update(protocol=None), "not skops'"),
        (lambda schema, _: schema.pop("__class__"), "needs sklearn.pipeline.None"),
    ],
)
def test_another_machines_or_a_broken_file_says_what_is_wrong(
    forest: Model, change: Callable[[Node, Members], None], said: str
):
    forged(forest.file("pipeline.skops"), change)
    refused(forest, said)


def test_an_archive_that_would_grow_is_a_bomb(forest: Model, monkeypatch: pytest.MonkeyPatch):
    path = forest.file("pipeline.skops")
    whole = path.read_bytes()
    forged(path, lambda _, members: members.update(zeros=bytes(10**7)), ZIP_DEFLATED)
    refused(forest, "would unpack to")
    path.write_bytes(whole)
    inner = io.BytesIO()
    with ZipFile(inner, "w", ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", bytes(10**6))
    forged(path, lambda _, members: members.update({"matrix.npz": inner.getvalue()}))
    monkeypatch.setattr("nbprod.model.archive.LARGEST_MATRIX", 10**5)
    refused(forest, "matrix.npz would unpack to 1,000,000 bytes")


def test_a_file_that_is_cut_off_anywhere_is_refused(forest: Model):
    path = forest.file("pipeline.skops")
    whole = path.read_bytes()
    for length in [0, 1, 30, *range(1000, len(whole), len(whole) // 12), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(forest, "no readable skops file")
    path.write_bytes(whole)
    nbprod.load_model(forest.tag).predict(flights)
    nested = b'{"protocol": 2, "content": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    with ZipFile(path, "w") as archive:
        archive.writestr("schema.json", nested)
    refused(forest, "no readable skops file")


def set_facts(model: Model, **facts: Any) -> None:
    model.file("facts.json").write_text(json.dumps(model.facts | facts))


def test_the_facts_beside_a_file_give_no_trust(forest: Model, tmp_path: Path):
    marker = tmp_path / "executed"
    payload = called(node("FunctionNode", "posix.system"), f"touch {marker}")
    forged(forest.file("pipeline.skops"), add(payload))
    wheel = {"name": "posix", "file": "posix-1.whl", "sha256": "", "version": "1"}
    for facts in ({"trusted": ["posix.system"]}, {"library": "posix"}, {"library": "posix", "wheel": wheel}):
        set_facts(forest, **facts)
        refused(forest, "posix.system")
    (forest.folder / "pipeline.pickle").write_bytes(pickle.dumps(Payload(marker)))
    set_facts(forest, format="pickle")
    refused(forest, "is a pickle", "allow_pickle=True")
    assert not marker.exists()


# Pickle by name


def test_pickle_is_asked_for_by_who_logs_and_by_who_loads(store: Path, capsys: pytest.CaptureFixture[str]):
    numbers = flights[["distance"]]
    grouping = make_pipeline(StandardScaler(), Birch(n_clusters=3)).fit(numbers)
    with pytest.raises(ModelError, match=r"Birch cannot be saved without pickle.*allow_pickle=True"):
        logged(grouping, numbers)
    assert not (store / "models").exists(), "nothing half-written stays"
    model = logged(grouping, numbers, allow_pickle=True)
    assert (model.facts["format"], model.facts["kind"]) == ("pickle", "clusterer")
    refused(model, "runs whatever its author put into it")
    given = nbprod.load_model(model.tag, allow_pickle=True).predict(numbers)
    assert given.tolist() == grouping.predict(numbers).tolist()
    for words in (["build", model.tag], ["serve", model.tag], ["promote", model.tag, "production"]):
        assert main(words) == 1
        assert "--allow-pickle" in capsys.readouterr().err
    assert main(["promote", model.tag, "production", "--allow-pickle"]) == 1
    assert "logged by hand" in capsys.readouterr().err, "it could be loaded"


def test_what_can_be_saved_safely_is_no_pickle_even_where_it_may_be(store: Path):
    assert store.name == "bentoml"
    model = make_pipeline(encoder(), LogisticRegression()).fit(flights, late)
    assert logged(model, flights, late, allow_pickle=True).facts["format"] == "skops"


# Names that are trusted by hand

PLUGIN = '''"""A package of somebody else."""

from sklearn.base import BaseEstimator, TransformerMixin


class Cap(TransformerMixin, BaseEstimator):
    """Numbers are at most 3000."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return X.clip(upper=3000)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package that can be imported and is neither scikit-learn's nor the project's."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "capping.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    import capping

    yield capping
    sys.modules.pop("capping")


def test_other_types_are_named_by_who_logs_and_by_who_loads(
    store: Path, plugin: Any, project: Path, caplog: pytest.LogCaptureFixture
):
    assert store.name == "bentoml"
    numbers = flights[["distance"]]
    model = make_pipeline(plugin.Cap(), LinearRegression()).fit(numbers, late)
    with pytest.raises(ModelError, match=r"LinearRegression cannot be saved: .*capping\.Cap"):
        logged(model, numbers)
    version = logged(model, numbers, trusted=["capping.Cap"])
    assert (version.facts["trusted"], "capping" in version.facts["packages"]) == (["capping.Cap"], True)
    assert "trusted = capping.Cap" in caplog.text
    refused(version, "capping.Cap", "trusted=[…]", "settings.ini")
    expected = model.predict(numbers).tolist()
    assert nbprod.load_model(version.tag, trusted=["capping.Cap"]).predict(numbers).tolist() == expected
    settings = project / "settings.ini"
    settings.write_text(f"{settings.read_text()}trusted = capping.Cap other.Name\n")
    assert nbprod.load_model(version.tag).predict(numbers).tolist() == expected
    caplog.clear()
    assert logged(model, numbers).facts["trusted"] == ["capping.Cap"]
    assert caplog.text == ""


# The library

LIBRARY = '''"""Features of the project."""

from sklearn.base import BaseEstimator, TransformerMixin

from small_library.units import HOURS


class Hours(TransformerMixin, BaseEstimator):
    """Minutes become hours."""

    def fit(self, X, y=None):
        self.fitted_ = True
        return self

    def transform(self, X):
        return X / HOURS


def double(frame):
    return frame * 2
'''


@pytest.fixture
def library(project: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """A version whose pipeline has a class and a function of the project's library."""
    assert store.name == "bentoml"
    (project / "settings.ini").write_text(
        "[DEFAULT]\nlib_name = small_library\nversion = 1.2.0\n\n[nbprod]\n"
    )
    (project / "small_library").mkdir()
    (project / "small_library" / "__init__.py").touch()
    (project / "small_library" / "units.py").write_text("HOURS = 60\n")
    (project / "small_library" / "features.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(project))
    from small_library.features import Hours, double

    model = make_pipeline(Hours(), FunctionTransformer(double), LinearRegression())
    yield logged(model.fit(flights[["distance"]], late), flights[["distance"]], late)
    for name in [name for name in sys.modules if name.startswith("small_library")]:
        del sys.modules[name]


ELSEWHERE = """
import json, sys
import pandas as pd
import nbprod

frame = pd.DataFrame(json.loads(sys.stdin.read()))
model = nbprod.load_model("delay:latest")
print(json.dumps([model.predict(frame).tolist(), model.pipeline[0].__class__.__module__]))
import small_library
print(small_library.__file__)
"""


def elsewhere(store: Path, folder: Path, rows: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Load the latest model in a new process, in `folder`, where nothing of the project is on the path."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE],
        cwd=folder,
        env=environ | {"BENTOML_HOME": str(store)},
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_model_loads_where_its_project_is_not(library: Model, store: Path, project: Path, tmp_path: Path):
    expected = nbprod.load_model(library.tag).predict(flights).tolist()
    moved, empty = tmp_path / "elsewhere" / "bentoml", tmp_path / "empty"
    shutil.move(store, moved)
    shutil.rmtree(project)
    empty.mkdir()
    done = elsewhere(moved, empty, flights[["distance"]].to_dict("records"))
    assert done.returncode == 0, done.stderr
    answer, place = done.stdout.splitlines()
    assert json.loads(answer) == [expected, "small_library.features"]
    assert "small_library-1.2.0-py3-none-any.whl" in place
    assert done.stderr == ""


def test_the_wheel_is_one_that_can_be_installed(library: Model, tmp_path: Path):
    wheel = library.library_path
    assert wheel is not None
    target = tmp_path / "site"
    command = [
        "uv",
        "pip",
        "install",
        "--quiet",
        "--offline",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (target / "small_library" / "features.py").read_text() == LIBRARY
    assert "Version: 1.2.0" in (target / "small_library-1.2.0.dist-info" / "METADATA").read_text()


def test_another_library_than_the_models_is_told(
    library: Model, project: Path, caplog: pytest.LogCaptureFixture
):
    expected = nbprod.load_model(library.tag).predict(flights)
    assert caplog.text == ""
    (project / "small_library" / "units.py").write_text("HOURS = 3600\n")
    assert nbprod.load_model(library.tag).predict(flights).tolist() == expected.tolist(), (
        "it is imported already"
    )
    assert "small_library/units.py differ" in caplog.text
    assert "1.2.0" in caplog.text


def test_a_library_that_is_nobodys_is_refused(
    library: Model, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Outside of the project, code that is not the model's own is not used because it has the same name."""
    (project / "small_library" / "units.py").write_text("HOURS = 3600\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"trusted=\['small_library'\]"):
        nbprod.load_model(library.tag).predict(flights)
    assert len(nbprod.load_model(library.tag, trusted=["small_library"]).predict(flights)) == len(flights)


def test_a_wheel_that_was_exchanged_is_not_imported(library: Model, store: Path, tmp_path: Path):
    assert library.library_path is not None
    with ZipFile(library.library_path, "a") as archive:
        archive.writestr("small_library/more.py", "")
    done = elsewhere(store, tmp_path, flights[["distance"]].to_dict("records"))
    assert done.returncode == 1
    assert "not the wheel that was logged" in done.stderr.splitlines()[-1]


def test_a_version_without_a_wheel_still_loads(library: Model, store: Path, tmp_path: Path):
    """As versions were before: the package in a folder, and fewer facts."""
    expected = nbprod.load_model(library.tag).predict(flights).tolist()
    assert library.library_path is not None
    shutil.unpack_archive(library.library_path, library.folder / "library", "zip")
    library.library_path.unlink()
    known = ("created", "estimator", "classes", "holdout", "holdout_rows", "run", "tag", "library")
    library.file("facts.json").write_text(json.dumps({name: library.facts[name] for name in known}))
    assert nbprod.load_model(library.tag).predict(flights).tolist() == expected
    done = elsewhere(store, tmp_path, flights[["distance"]].to_dict("records"))
    assert json.loads(done.stdout.splitlines()[0])[0] == expected, done.stderr


def test_a_service_trusts_what_its_builder_did(library: Model):
    """A Bento has the library itself and no settings; it answers over HTTP where no project is."""
    built = build(library.tag)
    assert built.parity["equal"]
    source = (built.path / "src" / "service.py").read_text()
    assert "trusted=('small_library',)" in source
    assert "allow_pickle=False" in source
    assert (built.path / "src" / "small_library" / "features.py").read_text() == LIBRARY
