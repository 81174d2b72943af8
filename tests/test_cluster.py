"""Sweeps on a Dask cluster: a real scheduler and real workers over TCP, some of which do not live long."""

import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from psutil import Process
from running import alive, start_driver, wait_for, write_notebook

from nbprod.errors import ClusterError, UsageError
from nbprod.experiment.cluster import ClusterExecutor, open_cluster
from nbprod.experiment.execution import Source, open_source
from nbprod.experiment.parameters import check_values
from nbprod.experiment.runs import Run, runs

# A cell that says where it runs and then waits for a file `go` beside the project.
WAITING = """
import json, os, time
from pathlib import Path
meeting = Path(MEETING)
print("so far", flush=True)
mark = meeting / f"{seed}-{os.getpid()}.tmp"
facts = {"kernel": os.getpid(), "folder": os.environ["NBPROD_RUN"]}
mark.write_text(json.dumps(facts))
mark.rename(mark.with_suffix(".json"))
while not (meeting / "go").exists():
    time.sleep(0.05)
"""


class Cluster:
    """A scheduler and workers, each a process of its own with a folder of its own below `folder`."""

    def __init__(self, folder: Path, nanny: str = "--no-nanny", **environment: str) -> None:
        self.folder, self.nanny, self.environment = folder, nanny, os.environ | environment
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.ways: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}  # how each was started first
        facts = folder / "scheduler.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(facts)]
        self.scheduler = self.start("scheduler", "dask", "scheduler", *options)
        wait_for(lambda: facts.exists() and facts.read_text(), "the scheduler")
        self.address: str = json.loads(facts.read_text())["address"]

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=self.environment | environment
            )

    def start_worker(self, name: str, *program: str, **environment: str) -> None:
        folder = self.folder / name
        options = ["--nthreads", "1", "--no-dashboard", self.nanny, "--local-directory", str(folder)]
        program, environment = self.ways.setdefault(name, (program, environment))
        command = [*(program or ("dask", "worker")), self.address, "--name", name, *options]
        self.workers[name] = self.start(name, *command, **environment)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        worker.kill()
        worker.wait()

    def close(self) -> None:
        # The workers first: one that is told to end by its scheduler as well may never do it.
        for processes in (self.workers.values(), [self.scheduler]):
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=30)


def distribution(folder: Path, name: str, version: str) -> Path:
    """A folder in which that version of a distribution is installed, with nothing in it."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@contextmanager
def new_cluster(folder: Path, *workers: str, **environment: str) -> Iterator[Cluster]:
    """A cluster with workers of these names."""
    cluster = Cluster(folder, **environment)
    try:
        for name in workers:
            cluster.start_worker(name)
        for name in workers:
            wait_for(lambda name=name: "Registered to" in cluster.log(name), f"worker {name}")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with two workers that have a secret and models of their own; one has a package of its own."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = {"CLUSTER_TOKEN": "the-workers-own-token", "BENTOML_HOME": str(folder / "bentoml")}
    with new_cluster(folder, "a", **environment) as cluster:
        cluster.start_worker("b", PYTHONPATH=str(distribution(folder / "site", "oddity", "0.0.1")))
        wait_for(lambda: "Registered to" in cluster.log("b"), "worker b")
        yield cluster


@contextmanager
def opened(address: str, source: Source, **options: Any) -> Iterator[ClusterExecutor]:
    how = {"sweep": "s1", "sweep_plan": {}, "cancelled": threading.Event()} | options
    with open_cluster(address, source, **how) as executor:
        yield executor


def submit(
    executor: ClusterExecutor, source: Source, values: Sequence[Mapping[str, Any]]
) -> list[Future[Run]]:
    checked = [check_values(source.parameters, each) for each in values]
    return [executor.submit(each, number) for number, each in enumerate(checked)]


def waiting_notebook(project: Path) -> tuple[Source, Path]:
    """A notebook whose runs meet in a folder, and that folder."""
    meeting = project.parent / "meeting"
    meeting.mkdir()
    cell = WAITING.replace("MEETING", repr(str(meeting)))
    return open_source(write_notebook(project / "nbs" / "wait.ipynb", "seed = 0", cell)), meeting


def marks(meeting: Path, count: int) -> list[dict[str, Any]]:
    """What that many runs said when they began."""
    found = wait_for(lambda: (all_ := sorted(meeting.glob("*.json"))) and len(all_) >= count and all_, "runs")
    return [json.loads(path.read_text()) for path in found]


def worker_of(mark: Mapping[str, Any], cluster: Cluster) -> str:
    """The name of the worker that executes a run which said that."""
    return Path(mark["folder"]).relative_to(cluster.folder).parts[0]


def test_runs_are_executed_by_all_workers(
    project: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is listed while it runs, keeps its place, and is one record of this store."""
    source, meeting = waiting_notebook(project)
    plan = {"values": [{"seed": seed} for seed in (3, 1, 2)]}
    with opened(cluster.address, source, sweep_plan=plan) as executor:
        assert executor.slots == 2
        futures = submit(executor, source, plan["values"])
        marks(meeting, 2)
        assert {(run.status, run.trial) for run in runs()} == {("running", 0), ("running", 1)}
        (meeting / "go").touch()
        tried = [future.result() for future in futures]
    assert [(run.status, run.params["seed"], run.trial) for run in tried] == [
        ("succeeded", 3, 0),
        ("succeeded", 1, 1),
        ("succeeded", 2, 2),
    ]
    assert {run.id for run in runs()} == {run.id for run in tried} and {run.sweep for run in tried} == {"s1"}
    assert len({run.lineage["cluster"]["worker"] for run in tried}) == 2
    for run in tried:
        executed = json.loads(run.path.read_text())["metadata"]
        assert executed["papermill"]["output_path"] == str(run.path)
        assert run.lineage["commit"] and run.lineage["plan"] == plan
        assert run.lineage["cluster"]["scheduler"] == cluster.address
        assert executed["nbprod"]["kernel"]["warm"] and {path.name for path in run.folder.iterdir()} == {
            "notebook.ipynb",
            "changes.patch",
        }
        names = {mark["folder"].rpartition("/")[2]: worker_of(mark, cluster) for mark in marks(meeting, 3)}
        odd = {"oddity": {"driver": None, "worker": "0.0.1"}} if names[run.id] == "b" else {}
        assert run.lineage["cluster"]["differs"] == odd
    wait_for(lambda: not [*cluster.folder.glob("*/**/nbprod-*")], "workers that have cleaned up")
    assert capfd.readouterr() == ("", "")


def test_a_worker_without_the_project(project: Path, cluster: Cluster) -> None:
    """It executes what was sent, in a project of its own; values of all types arrive; a cell may fail."""
    library = project / "small"
    library.mkdir()
    (library / "__init__.py").write_text("")
    (library / "units.py").write_text("HOUR = 3600\n")
    cells = [
        "from datetime import date\nfrom enum import Enum\nclass Loss(Enum):\n    LOG = 'log'",
        "from pathlib import Path\nfrom small.units import HOUR\n"
        "print(HOUR, loss is Loss.LOG, repr(day), Path.cwd().name, flush=True)\n"
        "Path('aside.txt').write_text('made in passing')\n1 / depth",
    ]
    notebook = write_notebook(
        project / "nbs" / "train.ipynb",
        "depth = 1\nday: 'date | str' = ''\nloss: 'Loss | None' = None",
        *cells[1:],
    )
    content = json.loads(notebook.read_text())
    content["cells"].insert(
        0, {"cell_type": "code", "metadata": {}, "source": cells[0], "outputs": [], "execution_count": None}
    )
    notebook.write_text(json.dumps(content))
    source = open_source(notebook)
    values = [{"depth": depth, "day": date(2026, 1, 2), "loss": "log"} for depth in (1, 0)]
    with opened(cluster.address, source) as executor:
        (library / "units.py").write_text("HOUR = 60\n")  # so what the workers see is not what was sent
        good, bad = (future.result() for future in submit(executor, source, values))
    printed = json.loads(good.path.read_text())["cells"][-1]["outputs"][0]["text"]
    assert "".join(printed) == "3600 True datetime.date(2026, 1, 2) nbs\n"
    assert (good.status, bad.status) == ("succeeded", "failed")
    assert bad.error and bad.error["error"] == "ZeroDivisionError: division by zero"
    assert good.notebook == "nbs/train.ipynb" and not (project / "nbs" / "aside.txt").exists()
    sent = hashlib.sha256(b"HOUR = 3600\n").hexdigest()
    assert good.lineage["modules"]["small.units"] == bad.lineage["modules"]["small.units"] == sent


def test_a_secret_is_the_workers(project: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER_TOKEN", "the-drivers-own-token")
    monkeypatch.setenv("DRIVER_TOKEN", "only-the-driver-has-it")
    cell = "assert token.get_secret_value() == 'the-workers-' + 'own-token'\nprint(token.get_secret_value())"
    parameters = "from pydantic import SecretStr\ntoken: SecretStr"
    source = open_source(write_notebook(project / "nbs" / "secret.ipynb", parameters, cell))
    values = [{"token": "env:CLUSTER_TOKEN"}, {"token": "env:DRIVER_TOKEN"}]
    with opened(cluster.address, source) as executor:
        known, missing = (future.result() for future in submit(executor, source, values))
    assert known.status == "succeeded" and known.params == {"token": "env:CLUSTER_TOKEN"}
    assert missing.status == "failed" and missing.error
    assert "The environment has no variable DRIVER_TOKEN" in missing.error["error"]
    assert re.search(r"The worker tcp://127\.0\.0\.1:\d+ could not", missing.error["error"])
    written = [path for path in (*project.rglob("*"), *cluster.folder.rglob("*")) if path.is_file()]
    everything = b"".join(path.read_bytes() for path in written)
    assert b"the-workers-own" not in everything and b"only-the-driver" not in everything
    assert b"the-drivers-own" not in everything


def test_cancelling_saves_what_was_executed(project: Path, cluster: Cluster) -> None:
    source, meeting = waiting_notebook(project)
    cancelled = threading.Event()
    with opened(cluster.address, source, cancelled=cancelled) as executor:
        *begun, waiting = submit(executor, source, [{"seed": seed} for seed in range(3)])
        found = marks(meeting, 2)
        cancelled.set()
        tried = [future.result() for future in begun]
        with pytest.raises(CancelledError):
            waiting.result()
    assert [run.status for run in tried] == ["cancelled", "cancelled"] and len(runs()) == 2
    for run in tried:
        assert "so far" in run.path.read_text() and run.error and run.error["cell"] == 5
    assert not any(alive(mark["kernel"]) for mark in found)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, "interrupted"), (signal.SIGINT, "cancelled")],
    ids=["kill", "ctrl-c"],
)
def test_a_driver_that_ends_early(
    project: Path, cluster: Cluster, number: signal.Signals, status: str
) -> None:
    """The workers notice, what had begun is recorded, and nothing else is begun."""
    source, meeting = waiting_notebook(project)
    code = f"""
import threading
from nbprod.experiment.cluster import open_cluster
from nbprod.experiment.execution import open_source
source = open_source({str(source.path)!r})
how = {{"sweep": "s1", "sweep_plan": {{}}, "cancelled": threading.Event()}}
with open_cluster({cluster.address!r}, source, **how) as executor:
    for future in [executor.submit({{"seed": seed}}, seed) for seed in range(3)]:
        future.result()
"""
    driver = start_driver(code, project)
    found = marks(meeting, 2)
    driver.send_signal(number)
    output, errors = driver.communicate()
    assert driver.returncode == -number and output == ""
    assert "KeyboardInterrupt" in errors.splitlines()[-1] if number == signal.SIGINT else errors == ""
    for mark in found:
        wait_for(lambda mark=mark: not alive(mark["kernel"]), "the end of a kernel")
    assert [run.status for run in runs()] == [status, status]


def test_a_killed_worker_costs_time_only(project: Path, cluster: Cluster) -> None:
    """The run is begun again by another worker, and counted once; nothing of it is left where it was."""
    source, meeting = waiting_notebook(project)
    with opened(cluster.address, source) as executor:
        futures = submit(executor, source, [{"seed": 0}, {"seed": 1}])
        lost, _ = marks(meeting, 2)
        name = worker_of(lost, cluster)
        below = [child.pid for child in Process(cluster.workers[name].pid).children(recursive=True)]
        assert lost["kernel"] in below and len(below) >= 5  # two servers, our worker, the kernel, the janitor
        cluster.kill(name)
        wait_for(lambda: not any(map(alive, below)), "the end of all that the worker had started")
        assert not Path(lost["folder"]).parents[2].exists()
        wait_for(lambda: executor.slots == 1, "one worker less")
        (meeting / "go").touch()
        tried = [future.result() for future in futures]
        cluster.start_worker(name)
        wait_for(lambda: executor.slots == 2, "another worker")
    assert [run.status for run in tried] == ["succeeded", "succeeded"] and len(runs()) == 2
    assert len(marks(meeting, 3)) == 3 and tried[0].lineage["cluster"] == tried[1].lineage["cluster"]
    assert not [*source.settings.runs.glob("*/*.log")]


def test_no_cluster_to_speak_of(
    project: Path, cluster: Cluster, free_port: Callable[[], int], tmp_path: Path
) -> None:
    source = open_source(write_notebook(project / "nbs" / "train.ipynb", "depth = 1"))
    address = f"tcp://127.0.0.1:{free_port()}"
    threads = threading.active_count()
    with pytest.raises(ClusterError, match=f"No Dask scheduler answers at {address} within 1 s"):
        opened(address, source, patience=1.0).__enter__()
    with pytest.raises(UsageError, match=r"'gopher://here' is no address"):
        opened("gopher://here", source).__enter__()
    assert threading.active_count() == threads
    assert {each.status for each in gc.get_objects() if isinstance(each, Client)} <= {"closed"}
    # Workers of another nbprod, and without any.
    code = "import sys; sys.modules['nbprod'] = None; from dask.__main__ import main; main()"
    odd: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "old": ((), {"PYTHONPATH": str(distribution(tmp_path, "nbprod", "0.0.1"))}),
        "none": ((sys.executable, "-c", code, "worker"), {}),
    }
    for name, message in (("old", "has nbprod 0.0.1, not"), ("none", "cannot import nbprod")):
        program, environment = odd[name]
        cluster.start_worker(name, *program, **environment)
        wait_for(lambda name=name: "Registered to" in cluster.log(name), "the odd worker")
        with pytest.raises(ClusterError, match=message) as raised:
            opened(cluster.address, source).__enter__()
        assert cluster.address in str(raised.value)
        cluster.kill(name)
    assert len(runs()) == 0


def test_a_run_that_kills_its_workers(project: Path, tmp_path: Path) -> None:
    """It has failed when it has killed as many as the scheduler allows; with nannies, the sweep goes on."""
    source, meeting = waiting_notebook(project)
    how = {"nanny": "--nanny", "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with new_cluster(tmp_path, "a", **how) as cluster, opened(cluster.address, source) as executor:
        futures = submit(executor, source, [{"seed": seed} for seed in range(2)])
        [mark] = marks(meeting, 1)
        Process(mark["kernel"]).parents()[1].kill()  # above the kernel's server
        killer = futures[0].result()
        (meeting / "go").touch()
        assert futures[1].result().status == "succeeded"
    assert killer.status == "failed" and killer.error and len(runs()) == 2
    assert killer.error["error"].startswith("1 workers died, one after the other, while they executed it")
    assert not [*killer.folder.glob("*.log")]


def test_a_cluster_that_dies(project: Path, tmp_path: Path) -> None:
    """Without workers or a scheduler, what was begun is interrupted, and nothing more is begun."""
    source, meeting = waiting_notebook(project)
    with new_cluster(tmp_path, "a") as cluster:
        with opened(cluster.address, source, patience=1.0) as executor:
            begun, waiting = submit(executor, source, [{"seed": 0}, {"seed": 1}])
            marks(meeting, 1)
            cluster.kill("a")
            gone = f"All workers of the cluster at {cluster.address} have gone"
            assert (run := begun.result()).status == "interrupted"
            assert run.error and run.error["error"].startswith(gone) and run.seconds
            with pytest.raises(ClusterError, match=rf"{gone}.* Resume the sweep"):
                waiting.result()
        with pytest.raises(ClusterError, match="has no worker that answers within 1 s"):
            opened(cluster.address, source, patience=1.0).__enter__()
        cluster.start_worker("b")
        wait_for(lambda: "Registered to" in cluster.log("b"), "the other worker")
        with opened(cluster.address, source, patience=2.0) as executor:
            begun, waiting = submit(executor, source, [{"seed": 2}, {"seed": 3}])
            mark = marks(meeting, 2)[-1]
            cluster.scheduler.kill()
            run = begun.result()
            assert run.status == "interrupted" and run.error
            assert run.error["error"] == f"The connection to the cluster at {cluster.address} was lost."
            with pytest.raises(ClusterError, match=r"was lost\. Resume the sweep"):
                waiting.result()
        wait_for(lambda: not alive(mark["kernel"]), "the end of the kernel")
    assert [run.trial for run in runs()] == [0, 0]


def test_a_sweep_is_resumed_on_a_cluster(project: Path, cluster: Cluster) -> None:
    """As a user has it executed there, stops it, and goes on with it from the command line."""
    source, meeting = waiting_notebook(project)
    code = "import nbprod; nbprod.sweep('nbs/wait.ipynb', {'seed': [0, 1, 2]}, "
    code += f"executor={cluster.address!r})"
    driver = start_driver(code, project)
    marks(meeting, 2)
    driver.send_signal(signal.SIGINT)
    driver.communicate()
    assert {(run.trial, run.status) for run in runs()} == {(0, "cancelled"), (1, "cancelled")}
    (meeting / "go").touch()
    command = ["nbprod", "sweep", str(source.path), "--resume", str(runs()[0].sweep), "--json"]
    resumed = subprocess.run([*command, "--executor", cluster.address], capture_output=True, text=True)
    found = json.loads(resumed.stdout)["runs"]
    assert [run["params"]["seed"] for run in found] == [0, 1, 2]
    assert {run["status"] for run in found} == {"succeeded"}
    assert resumed.returncode == 0 and len(runs()) == 5


def test_what_fails_is_executed_again_by_the_worker(project: Path, cluster: Cluster) -> None:
    """Each attempt comes back in the folder of its run."""
    cell = f"""
from pathlib import Path
mark = Path({str(project.parent)!r}) / f"tried {{seed}}"
again = mark.exists()
mark.touch()
assert again or seed
"""
    source = open_source(write_notebook(project / "nbs" / "moody.ipynb", "seed = 0", cell))
    with opened(cluster.address, source, retries=1) as executor:
        moody, good = (each.result() for each in submit(executor, source, [{"seed": 0}, {"seed": 1}]))
    assert (moody.status, good.status, good.attempts) == ("succeeded", "succeeded", [])
    assert [attempt["status"] for attempt in moody.attempts] == ["failed"] and len(runs()) == 2
    assert "AssertionError" in (moody.folder / "attempts" / "1" / "notebook.ipynb").read_text()


def test_models_become_versions_here(project: Path, cluster: Cluster) -> None:
    """What a run on a worker stages arrives with it, and what follows a success happens at the driver."""
    cell = """
from sklearn.dummy import DummyClassifier
import pandas as pd, nbprod
rows = pd.DataFrame({"hour": [1, 2, 3, 4]})
model = DummyClassifier(strategy="constant", constant=seed % 2).fit(rows, [0, 1, 0, 1])
nbprod.log_model(model, "constant", rows, [0, 1, 0, 1])
"""
    source = open_source(write_notebook(project / "nbs" / "model.ipynb", "seed = 1", cell))
    code = f"""
import threading, nbprod
from nbprod.experiment.cluster import open_cluster
from nbprod.experiment.execution import open_source
nbprod.join_rooms()
source = open_source({str(source.path)!r})
how = {{"sweep": "s1", "sweep_plan": {{}}, "cancelled": threading.Event()}}
with open_cluster({cluster.address!r}, source, **how) as executor:
    run = executor.submit({{"seed": 1}}, 0).result()
found = [model.tag for model in nbprod.models("constant")]
print(run.status, run.model, found, nbprod.load_model(run.model).run)
"""
    output, errors = start_driver(code, project).communicate()
    [run] = runs()
    assert output == f"succeeded constant:{run.id} ['constant:{run.id}'] {run.id}\n", errors
    assert not [*cluster.folder.glob("bentoml/models/*")] and not (run.folder / "model").exists()


def test_dask_is_imported_by_those_who_use_it(project: Path) -> None:
    source = open_source(write_notebook(project / "nbs" / "train.ipynb", "depth = 1"))
    code = f"""
import sys, threading
from nbprod.experiment.cluster import open_cluster
from nbprod.experiment.execution import open_source
assert not {{"dask", "distributed"}} & set(sys.modules)
sys.modules["distributed"] = None
with open_cluster("tcp://here", open_source({str(source.path)!r}), sweep="", sweep_plan={{}}, cancelled=None):
    pass
"""
    _, errors = start_driver(code, project).communicate()
    assert errors.endswith("A cluster needs the package distributed: pip install 'nbprod[dask]'.\n")
