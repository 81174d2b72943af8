"""Sweeps: several runs at once, some of which fail, and a user who has seen enough."""

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from running import ENDLESS, alive, start_driver, wait_for, write_notebook

from nbprod.cli import main
from nbprod.errors import RunError, SettingsError
from nbprod.experiment.runs import runs
from nbprod.experiment.search_space import log_uniform, uniform
from nbprod.experiment.sweeps import sweep

RECORD = "from nbprod.experiment.recording import log_metrics\n"


def test_failures_do_not_stop_the_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = RECORD + "log_metrics(share=1 / depth)"
    notebook = write_notebook(project / "nbs" / "train.ipynb", "depth = 1", train)
    tried = sweep(notebook, {"depth": [0, 1, 2, 4]}, jobs=2, progress=True)
    assert [run.params["depth"] for run in tried] == [0, 1, 2, 4]
    assert [run.status for run in tried] == ["failed", "succeeded", "succeeded", "succeeded"]
    assert tried[0].error == {
        "cell": 5,
        "line": "log_metrics(share=1 / depth)",
        "error": "ZeroDivisionError: division by zero",
    }
    assert tried.best("share").params == {"depth": 1}
    assert "4/4" in (progress := capsys.readouterr().err) and "failed=1" in progress
    assert {run.sweep for run in runs()} == {tried[0].sweep} and len(runs()) == 4


def test_runs_share_the_machine(project: Path) -> None:
    """Two at a time do overlap, since each waits for the other, and each is told its share of the cores."""
    meeting = project.parent / "meeting"
    meeting.mkdir()
    cell = f"""{RECORD}
import os, time
from pathlib import Path
meeting = Path({str(meeting)!r})
(meeting / str(seed)).touch()
latest = time.monotonic() + 60
while len(list(meeting.iterdir())) < 2 and time.monotonic() < latest:
    time.sleep(0.05)
log_metrics(met=len(list(meeting.iterdir())), threads=float(os.environ["OMP_NUM_THREADS"]))
"""
    notebook = write_notebook(project / "nbs" / "meet.ipynb", "seed = 0", cell)
    first, second = (run.metrics for run in sweep(notebook, {"seed": [0, 1]}, jobs=2))
    assert first["met"] == second["met"] == 2
    assert first["threads"] == second["threads"] >= 1


def test_unwritable_store(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "train.ipynb", "depth = 1")
    (project / ".nbprod").write_text("a file where the store should be")
    with pytest.raises(RunError, match="The store cannot be written"):
        sweep(notebook, {"depth": [1, 2]}, jobs=2)


def test_interrupt_ends_the_runs_under_way(project: Path) -> None:
    notebook = write_notebook(project / "nbs" / "endless.ipynb", "seed = 0", ENDLESS)
    code = "from nbprod.experiment.sweeps import sweep; "
    code += f"sweep({str(notebook)!r}, {{'seed': [0, 1, 2, 3]}}, jobs=2, progress=False)"
    driver = start_driver(code, project)
    kernels = wait_for(
        lambda: (found := [*project.glob(".nbprod/runs/*/kernel")]) and len(found) == 2 and found, "two runs"
    )
    wait_for(lambda: all(path.read_text() for path in kernels), "two kernels")
    pids = [json.loads(path.read_text()) for path in kernels]
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=40)
    assert driver.returncode == -signal.SIGINT and not any(alive(pid) for pid in pids)
    assert [run.status for run in runs()] == ["cancelled", "cancelled"]


GRADED = "log_metrics(auc=1 - abs(rate - 0.3) - abs(depth - 5) / 50)"


def graded(project: Path, *before: str) -> Path:
    """A notebook that logs an AUC which is best at a rate of 0.3 and a depth of 5."""
    return write_notebook(
        project / "nbs" / "graded.ipynb", "rate: float = 0.1\ndepth: int = 4", RECORD, *before, GRADED
    )


def test_ranges_are_drawn_again_by_their_seed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = graded(project)
    options = ["-p", "rate=0.001..1:log", "-p", "depth=2..9", "--trials", "3", "--json"]
    assert main(["sweep", str(notebook), *options]) == 0
    first = json.loads(capsys.readouterr().out)
    plan = first["runs"][0]["lineage"]["plan"]
    assert plan["search"] == "random" and plan["space"]["rate"] == {"low": 0.001, "high": 1.0, "log": True}
    drawn = [run["params"] for run in first["runs"]]
    assert len({each["rate"] for each in drawn}) == 3
    assert all(0.001 <= each["rate"] <= 1 and 2 <= each["depth"] <= 9 for each in drawn)
    again = sweep(
        notebook,
        {"rate": log_uniform(0.001, 1), "depth": uniform(2, 9)},
        trials=3,
        search_seed=plan["seed"],
        progress=False,
    )
    assert [run.params for run in again] == drawn


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", "rate=0.1..1"], "say how many trials"),
        (["-p", "depth=0.5..2", "--trials", "2"], "depth must be int"),
        (["-p", "rate=1..0.1", "--trials", "2"], "must begin below its end"),
        (["-p", "rate=0..1:log", "--trials", "2"], "must begin above 0"),
        (["-p", "rate=0.1,0.2", "--trials", "0"], "at least 1"),
        (["-p", "rate=0.1..1", "--trials", "2", "--maximize", "a", "--minimize", "b"], "one goal"),
        (["-f", "trials.csv"], "trials.csv, line 3, column 'depth': Parameter depth must be int, not 'deep'"),
        (["-f", "trials.yaml"], "trials.yaml, line 2: There is no parameter 'dept'. Did you mean 'depth'?"),
        (["-f", "good.csv", "--trials", "2"], "as it stands"),
        (["-f", "good.csv", "-p", "rate=0.1,0.2"], "one value only"),
        (["--executor", "somewhere"], "must be local, or the address of a Dask scheduler"),
        (["--timeout", "0"], "above 0"),
        (["--resume", "20260101"], "belongs to a sweep '20260101'"),
    ],
)
def test_nothing_starts_for_what_cannot_be(
    project: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    notebook = graded(project)
    (project / "trials.csv").write_text("rate,depth\n0.1,4\n0.2,deep\n")
    (project / "trials.yaml").write_text("- depth: 4\n- dept: 5\n")
    (project / "good.csv").write_text("depth\n4\n")
    assert main(["sweep", str(notebook), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (project / ".nbprod" / "runs").exists()


def test_executor_is_a_setting(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = graded(project)
    monkeypatch.setenv("NBPROD_EXECUTOR", "somewhere")
    with pytest.raises(SettingsError, match="NBPROD_EXECUTOR"):
        sweep(notebook, {"depth": [1]})


def test_a_list_of_trials_with_a_timeout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = graded(project, "import time\nwhile depth == 9:\n    time.sleep(0.1)")
    (project / "trials.yaml").write_text("- {depth: 9}\n- {depth: 5, rate: 0.3}\n")
    options = ["-f", "trials.yaml", "--timeout", "15", "--jobs", "2", "--json"]
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(notebook), *options])
    late, good = json.loads(capsys.readouterr().out)["runs"]
    assert late["status"] == "failed" and "longer than 15 s" in late["error"]["error"]
    assert good["metrics"]["auc"] == 1.0 and good["lineage"]["plan"]["search"] == "list"


def test_an_adaptive_search_goes_on_after_failures(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is quiet but for the bar, and what comes back draws itself."""
    notebook = graded(project, "assert depth != 2")
    tried = sweep(
        notebook,
        {"rate": uniform(0, 1), "depth": list(range(2, 9))},
        trials=24,
        maximize="auc",
        search_seed=3,
        jobs=2,
        progress=True,
    )
    said = capfd.readouterr()
    assert [run.trial for run in tried] == list(range(24))
    assert {run.status for run in tried} == {"succeeded", "failed"}
    assert f"best auc={tried.best('auc').metrics['auc']:.4g}" in said.err and "24/24" in said.err
    assert "Warning" not in said.err and "study" not in said.err and said.out == ""
    assert tried.best("auc").metrics["auc"] > 0.8
    shown = tried._repr_html_()
    assert shown.index("<svg") < shown.index("<table") and "AssertionError" in shown
    assert "<svg" in runs().plot("auc")._repr_html_()


def test_a_trial_without_the_metric_says_so(
    project: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    notebook = graded(project)
    options = ["-p", "rate=0..1", "--trials", "2", "--maximize", "aucc", "--json"]
    with pytest.raises(SystemExit, match="1"):
        main(["sweep", str(notebook), *options])
    made = json.loads(capsys.readouterr().out)["runs"]
    assert [run["status"] for run in made] == ["succeeded", "succeeded"]
    for run in made:
        assert "logged no metric 'aucc', to maximize. Did you mean 'auc'?" in run["error"]["error"]
        assert f"run {run['id']} (trial " in caplog.text


WAITING = """
import os, time
from pathlib import Path
with open("started.txt", "a") as file:
    print(depth, os.getpid(), file=file, flush=True)
while depth >= 2 and not Path("go").exists():
    time.sleep(0.05)
"""


def started(project: Path) -> list[tuple[int, int]]:
    """Depth and process of each kernel that has begun, in their order."""
    path = project / "nbs" / "started.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(depth), int(pid)) for depth, pid in map(str.split, lines)]


def interrupted_sweep(
    project: Path, how: signal.Signals, options: str = "{'depth': [0, 1, 2, 3, 4, 5]}"
) -> str:
    """The id of a sweep that was stopped with two of its six trials finished and two under way."""
    code = "from nbprod.experiment.sweeps import sweep; "
    code += f"sweep('nbs/graded.ipynb', {options}, jobs=2, progress=False)"
    driver = start_driver(code, project)
    wait_for(lambda: len(started(project)) == 4, "two kernels after two runs")
    driver.send_signal(how)
    said = driver.communicate(timeout=60)[1]
    wait_for(lambda: not any(alive(pid) for _, pid in started(project)), "the end of the kernels")
    (project / "nbs" / "go").touch()
    [identity] = {run.sweep for run in runs()}
    assert identity is not None
    assert (f"sweep {identity} was interrupted" in said) == (how == signal.SIGINT)
    return identity


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_goes_on_where_it_was_interrupted(
    project: Path, how: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    graded(project, WAITING)
    identity = interrupted_sweep(project, how)
    assert main(["sweep", "nbs/graded.ipynb", "--resume", identity[:18], "--json"]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["id"] == identity
    assert [(run["trial"], run["params"]["depth"]) for run in resumed["runs"]] == [(n, n) for n in range(6)]
    assert Counter(depth for depth, _ in started(project)) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 1, 5: 1}
    cut = "interrupted" if how == signal.SIGKILL else "cancelled"
    assert Counter(run.status for run in runs()) == {"succeeded": 6, cut: 2}
    assert {run.sweep for run in runs()} == {identity}
    again = sweep("nbs/graded.ipynb", {"depth": [0, 1, 2, 3, 4, 5]}, resume=identity)
    assert [run.id for run in again] == [run["id"] for run in resumed["runs"]] and len(runs()) == 8


def test_an_adaptive_search_goes_on(project: Path) -> None:
    """It repeats what was cut short, and knows what had ended."""
    graded(
        project,
        WAITING.replace("depth >= 2", "Path('third').exists()") + "Path('third').touch(exist_ok=True)",
    )
    options = "{'rate': [0.1, 0.2, 0.3, 0.4], 'depth': [4, 5, 6]}, trials=6, maximize='auc', search_seed=1"
    code = "from nbprod.experiment.sweeps import sweep; "
    code += f"sweep('nbs/graded.ipynb', {options}, jobs=1, progress=False)"
    driver = start_driver(code, project)
    wait_for(lambda: len(started(project)) == 2, "a second run")
    driver.kill()
    driver.communicate(timeout=60)
    wait_for(lambda: not any(alive(pid) for _, pid in started(project)), "the end of the kernels")
    (project / "nbs" / "go").touch()
    cut, first = runs()
    assert (first.status, cut.status) == ("succeeded", "interrupted") and first.sweep is not None
    resumed = sweep("nbs/graded.ipynb", resume=first.sweep, jobs=1, progress=False)
    assert resumed[0].id == first.id and resumed[1].params == cut.params and len(resumed) == 6
    assert resumed.goal is not None and resumed.goal.metric == "auc"


def test_failed_trials_are_answers_unless_asked_again(project: Path) -> None:
    notebook = graded(project, "from pathlib import Path\nassert depth or Path('mended').exists()")
    first = sweep(notebook, {"depth": [0, 1]}, progress=False)
    assert [run.status for run in first] == ["failed", "succeeded"]
    assert [run.id for run in sweep(notebook, resume=first.id, progress=False)] == [run.id for run in first]
    (project / "nbs" / "mended").touch()
    again = sweep(notebook, resume=first.id, retry_failed=True, progress=False)
    assert [run.status for run in again] == ["succeeded", "succeeded"] and again[1].id == first[1].id


def test_only_the_same_sweep_goes_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = graded(project)
    other = write_notebook(project / "nbs" / "other.ipynb", "depth = 1")
    first = sweep(notebook, {"depth": [4]}, progress=False)

    def refused(path: Path, *options: str) -> str:
        assert main(["sweep", str(path), "--resume", first.id, *options]) == 2
        return capsys.readouterr().err

    assert "space was {'depth': [4]}, not {'depth': [4, 5]}" in refused(notebook, "-p", "depth=4,5")
    assert "maximize was not set, not auc" in refused(notebook, "--maximize", "auc")
    assert "one of nbs/graded.ipynb, not of nbs/other.ipynb" in refused(other)
    notebook.write_text(notebook.read_text().replace("0.3", "0.4"))
    assert "nbs/graded.ipynb has changed since sweep" in refused(notebook)
    assert len(runs()) == 1


def test_two_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sweeps in one project do not disturb each other, and nobody else resumes one meanwhile."""
    graded(project, WAITING)
    code = "from nbprod.experiment.sweeps import sweep; "
    code += "sweep('nbs/graded.ipynb', {'depth': [0, 2, 3]}, jobs=1, progress=False)"
    drivers = [start_driver(code, project) for _ in range(2)]
    wait_for(lambda: len(started(project)) == 4, "two sweeps")
    for identity in {run.sweep for run in runs()}:
        assert main(["sweep", "nbs/graded.ipynb", "--resume", str(identity)]) == 2
        assert "is being executed by another process" in capsys.readouterr().err
    (project / "nbs" / "go").touch()
    assert [driver.wait(timeout=60) for driver in drivers] == [0, 0]
    for driver in drivers:
        driver.communicate()
    found = runs()
    assert sorted(Counter(run.sweep for run in found).values()) == [3, 3]
    assert {run.status for run in found} == {"succeeded"} and not [
        *(project / ".nbprod" / "sweeps").iterdir()
    ]


def test_a_grid_loads_nothing_heavy(project: Path) -> None:
    graded(project)
    code = "import sys; from nbprod.experiment.sweeps import sweep; "
    code += "sweep('nbs/graded.ipynb', {'depth': [4, 5]}, progress=False); "
    heavy = ["pandas", "numpy", "optuna", "yaml", "sqlalchemy", "papermill", "distributed"]
    code += f"print({{*{heavy}}} & {{*sys.modules}})"
    driver = start_driver(code, project)
    assert driver.communicate(timeout=60)[0].strip() == "set()"
