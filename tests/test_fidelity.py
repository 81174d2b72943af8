"""A run gives the notebook that papermill gives: the same cells, outputs and errors, times aside."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import alive, mounted, start_driver, wait_for, write_notebook

from nbprod.experiment.execution import execute, open_source
from nbprod.experiment.recording import METADATA_KEY
from nbprod.experiment.runs import Run, runs
from nbprod.experiment.sweeps import sweep

BIG = """
from IPython.display import HTML, display
for _ in range(500): display(HTML("<p>" + "y" * 2_000 + "</p>"))
"""
TASK = """
task = asyncio.create_task(asyncio.sleep(0, "done"))
print(await task)
await asyncio.gather(task, task)
"""
FAILING_THREAD = """
def fail():
    raise ValueError("in a thread")
threading.excepthook = lambda told: print(told.exc_value)
worker = threading.Thread(target=fail)
worker.start()
worker.join()
"""
CORPUS = {
    "figures": [
        "import matplotlib.pyplot as plt\nimport numpy as np",
        "figure, axes = plt.subplots()\naxes.plot(np.arange(5))\naxes.set_title('über')",
        "plt.plot([1, 2]); plt.show(); print('after')",
        "import matplotlib; matplotlib.get_backend()",
    ],
    "html": [
        "import pandas as pd\nfrom IPython.display import HTML, Markdown, display",
        "HTML('<b>bold</b>')",
        "pd.DataFrame({'a': [1, 2], 'b': ['x', None]})",
        "display(Markdown('*x*'), {'text/plain': 'raw'}, raw=False)\n3",
    ],
    "updates": [
        "from IPython.display import clear_output, display, update_display",
        "handle = display('first', display_id='here')",
        "update_display('second', display_id='here')\nhandle.update('third')",
        "print('gone'); clear_output(); print('stays')",
        "print('gone'); clear_output(wait=True); print('stays')",
        "clear_output(wait=True)",
        "for number in range(50): display(number, display_id=f'n{number % 3}', update=number > 2)",
        "update_display('from a later cell', display_id='here')",
    ],
    "streams": [
        "import sys, warnings, logging, os",
        "print('out'); sys.stdout.flush(); print('err', file=sys.stderr)",
        "warnings.warn('careful')",
        "logging.warning('logged'); logging.getLogger('a').error('once')",
        "os.write(1, b'below\\n'); os.system('echo shell')",
    ],
    "sklearn": [
        "import numpy as np\nfrom sklearn.linear_model import LogisticRegression\nimport logging",
        "inputs = np.arange(40.0).reshape(20, 2) ** 3",
        "LogisticRegression(max_iter=1).fit(inputs, np.arange(20) % 2).coef_.round(3)",
        "logging.getLogger('sklearn').warning('from its log')",
        "LogisticRegression()",
    ],
    "errors": ["def share(a):\n    return 1 / a", "print('before')\nshare(0)", "print('never')"],
    "library error": ["import json", "json.loads('{')"],
    "chained error": [
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('→ ü') from error",
    ],
    "rendered error": [
        "class Wrong(Exception):\n    def _render_traceback_(self): return ['own words']\nraise Wrong"
    ],
    "interrupted": ["raise KeyboardInterrupt"],
    "exit": ["import sys", "print('bye'); sys.exit(0)"],
    "import error": ["import json, no_such_library_of_ours\njson"],
    "syntax error": ["1 +"],
    "async": [
        "import asyncio",
        "await asyncio.sleep(0.01)\nasyncio.get_running_loop().is_running()",
        "async def count():\n    for number in range(3):\n        yield number\n"
        "async for number in count(): print(number)",
        TASK,
        "async with asyncio.timeout(0.01):\n    await asyncio.sleep(9)",
    ],
    "magics": [
        "%matplotlib inline\nimport math",
        "%%capture caught\nprint('hidden')",
        "caught.stdout, %pwd",
        "%lsmagic\n%who",
        "%%bash\necho from bash; echo wrong >&2",
        "_1 if False else In[1], len(Out)",
        "%%html\n<b>bold</b>",
        "%%javascript\n1",
        "%%script sh\nprintf 'from sh'",
        "%env SOME_NAME=value\n%config InlineBackend.figure_formats\n%xmode Plain",
        "%run -i nothing_of_this_name.py",
    ],
    "shell": [
        "!echo one && echo two >&2",
        "lines = !printf 'a\\nb'\nlines",
        "!exit 3\n_exit_code",
        "!cat /dev/null; pwd | wc -l",
    ],
    "processes": [
        "import subprocess, sys, multiprocessing",
        "subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True).stdout",
        "subprocess.run(['sh', '-c', 'echo its own standard output'], check=True)",
        "print(subprocess.run([sys.executable, '-c', 'raise SystemExit(4)']).returncode)",
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))",
        "sys.argv[0].rpartition('/')[2], len(sys.argv), sys.path[0], sys.flags.safe_path, __name__",
    ],
    "threads": [
        "import threading, time\nfrom concurrent.futures import ThreadPoolExecutor",
        "print(list(ThreadPoolExecutor(2).map(abs, [-1, -2])), threading.active_count())",
        "worker = threading.Thread(target=lambda: print('from a thread'))\nworker.start()\nworker.join()",
        FAILING_THREAD,
    ],
    "input": ["input('name? ')"],
    "getpass": ["import getpass\ngetpass.getpass('word? ')"],
    "stdin": ["import sys\nsys.stdin.read()", "sys.stdin.readline()"],
    "unicode": [
        "print('Zürich → 北京 🎉 \\x1b[31mred\\x1b[0m')",
        "'\\u2028 line', 'é'",
        "print('\\x00 \\r over')",
        "'נ ' + chr(0x1F468) + chr(0x200D)",
    ],
    "large": ["print('x' * 3_000_000)", "for number in range(20_000): print(number)", BIG],
    "widgets": [
        "import ipywidgets\nfrom tqdm.auto import tqdm",
        "slider = ipywidgets.IntSlider(3, description='depth')\nslider",
        "slider.value = 5\nslider.observe(lambda change: print(change['new']), 'value')\nslider.value = 6",
        "tqdm.__module__",
        "for _ in tqdm(range(3), desc='epochs'): pass",
    ],
    "surroundings": [
        "import os, signal, sys",
        # The last of these is set by papermill's command line for itself, and so inherited.
        "ours = {'NBPROD_RUN', 'OMP_WAIT_POLICY', '_', 'PYDEVD_DISABLE_FILE_VALIDATION'}",
        "sorted(set(os.environ) - ours)",
        "signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD), os.getpgid(0) == os.getpid()",
        "os.path.basename(os.getcwd()), sys.stdin.isatty(), sys.stdout.isatty(), sys.stdout.encoding",
        "sorted(int(name) for name in os.listdir('/proc/self/fd') if int(name) < 3)",
        "'papermill' in sys.modules, 'nbclient' in sys.modules, 'tqdm' in sys.modules",
    ],
}
VARYING = {
    r"0x[0-9a-f]{6,}": "ADDRESS",
    r"/tmp/ipykernel_\d+/\d+\.py": "CELL",
    r"sk-container-id-\d+|sk-estimator-id-\d+": "ESTIMATOR",
    r"(IPY_MODEL_|\b)[0-9a-f]{32}\b": "MODEL",
    r"\x1b\[[0-9;]*m": "",
    r"\d\d:\d\d&lt;\d\d:\d\d,\s[0-9.?]+it/s": "SPEED",
}


def plain(outputs: list[dict[str, Any]]) -> Any:
    """Outputs without what is different in any two executions by papermill.

    Outputs with text reach it in the order in which threads and pipes of the kernel let them go. Of nine
    executions of one notebook on a busy machine, up to four differed from the first: in where a stream is
    cut; in whether `os.system` comes before or after the result of its cell; in the order of what goes to
    standard output and to standard error. So a stream is one text here, at the place of its first piece,
    and standard error is the last; the rest is compared in its order.
    """
    joined: list[dict[str, Any]] = []
    for output in outputs:
        output = dict(output)
        if output["output_type"] == "stream":
            output["text"] = "".join(output["text"])
            same = [each for each in joined if each.get("name") == output["name"]]
            if same:
                same[-1]["text"] += output["text"]
                continue
        joined.append(output)
    text = json.dumps(sorted(joined, key=lambda each: each.get("name") == "stderr"), sort_keys=True)
    text = json.dumps(json.loads(text), ensure_ascii=False)
    for pattern, name in VARYING.items():
        text = re.sub(pattern.replace(r"\x1b", r"\\u001b"), name, text)
    return json.loads(text)


def cells_of(path: Path) -> list[dict[str, Any]]:
    """Type, source, count and outputs of each cell of an executed notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        {
            "type": cell["cell_type"],
            "source": "" if "seed = " in "".join(cell["source"]) else "".join(cell["source"]),
            "count": cell.get("execution_count"),
            "outputs": plain(cell.get("outputs") or []),
        }
        for cell in cells
    ]


def about(path: Path) -> Any:
    """The language of an executed notebook, and the state of its widgets, whose ids are drawn by lot."""
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    widgets = metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    states = plain([{"output_type": "state", **state} for state in widgets.get("state", {}).values()])
    return metadata["language_info"], sorted(json.dumps(state, sort_keys=True) for state in states)


def by_papermill(notebook: Path, output: Path, project: Path) -> None:
    """Execute with papermill's command line, in an ordinary kernel that has the project on its path."""
    code = "import os, sys; os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [sys.argv.pop(), "
    code += "os.environ.get('PYTHONPATH')])); from papermill.__main__ import papermill; papermill()"
    command = [sys.executable, "-c", code, str(notebook), str(output), "--no-progress-bar"]
    command += ["-k", "python3", "-l", "python", "-p", "seed", "0", "--cwd", str(notebook.parent)]
    subprocess.run([*command, str(project)], capture_output=True)


def warm_runs(notebook: Path) -> list[Run]:
    """A sweep of two runs, both of them with a warm kernel."""
    tried = list(sweep(notebook, {"seed": [0, 1]}, jobs=1, progress=False))
    for run in tried:
        kernel = json.loads(run.path.read_text())["metadata"][METADATA_KEY]["kernel"]
        assert kernel["warm"], kernel
    return tried


@pytest.mark.parametrize("name", CORPUS)
def test_a_run_equals_papermill(project: Path, name: str) -> None:
    """A single run, and two of a sweep, whose kernels are forked."""
    notebook = write_notebook(project / "nbs" / "cells.ipynb", "seed = 0", *CORPUS[name])
    expected = project / "nbs" / "expected.ipynb"
    by_papermill(notebook, expected, project)
    single = execute(open_source(notebook), {"seed": 0})
    for run in (single, *warm_runs(notebook)):
        assert cells_of(run.path) == cells_of(expected)
        assert about(run.path) == about(expected)


ASKING_WIDGETS = """
page = ipywidgets.Output()
with page:
    print("inside")
@ipywidgets.interact(depth=2)
def show(depth):
    print("depth", depth)
"""


def test_widgets_whose_cells_ask_the_client(project: Path) -> None:
    """papermill itself waits for ever in one of some twenty such cells: there is nothing to compare with."""
    cells = ["import ipywidgets", *[ASKING_WIDGETS] * 100, "'the end'"]
    notebook = write_notebook(project / "nbs" / "asking.ipynb", "seed = 0", *cells)
    for run in (execute(open_source(notebook), {"seed": 0}, timeout=120), *warm_runs(notebook)):
        assert run.status == "succeeded" and "the end" in run.path.read_text()


def test_runs_do_not_draw_the_same_numbers(project: Path) -> None:
    cells = ["import random, numpy as np, uuid", "print(random.random(), np.random.rand(), uuid.uuid4())"]
    first, second = warm_runs(write_notebook(project / "nbs" / "draw.ipynb", "seed = 0", *cells))
    texts = [json.loads(run.path.read_text())["cells"][-1]["outputs"][0]["text"] for run in (first, second)]
    assert all(one != other for one, other in zip(*(text[0].split() for text in texts), strict=True))


def test_code_of_the_project_is_read_anew(project: Path) -> None:
    """The project's library is not imported ahead: each run sees it as it is then."""
    (project / "small").mkdir()
    (project / "small" / "__init__.py").write_text("import os, json\nrun = os.environ['NBPROD_RUN']")
    cells = ["from small import run", "import os\nassert run == os.environ['NBPROD_RUN']"]
    found = warm_runs(write_notebook(project / "nbs" / "ours.ipynb", "seed = 0", *cells))
    assert [run.status for run in found] == ["succeeded", "succeeded"]


def test_exit_handlers_are_called(project: Path) -> None:
    cells = ["import atexit, os", "atexit.register(open, os.environ['NBPROD_RUN'] + '/left', 'w')"]
    for run in warm_runs(write_notebook(project / "nbs" / "exit.ipynb", "seed = 0", *cells)):
        assert (run.folder / "left").exists()


def test_open_files_are_written_at_the_end(project: Path) -> None:
    """As when an interpreter is taken apart: also what only a cycle or a module still holds."""
    (project / "small").mkdir()
    (project / "small" / "__init__.py").write_text("held = []")
    cells = ["import os, small\nfolder = os.environ['NBPROD_RUN']"]
    cells += ["plain = open(folder + '/plain', 'w')\nplain.write('kept')"]
    cells += ["small.held += [open(folder + '/module', 'wb'), small.held]\nsmall.held[0].write(b'kept')"]
    for run in warm_runs(write_notebook(project / "nbs" / "files.ipynb", "seed = 0", *cells)):
        assert [(run.folder / name).read_text() for name in ("plain", "module")] == ["kept", "kept"]


def test_other_kernels_are_not_forked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of this Python with an environment of its own: started as usual, and the record says why."""
    spec = project / "jupyter" / "kernels" / "special"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {"argv": command, "display_name": "S", "language": "python", "env": {"SPECIAL": "yes"}}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "jupyter"))
    cells = ["import os\nprint(os.environ['SPECIAL'])"]
    notebook = write_notebook(
        project / "nbs" / "s.ipynb", "seed = 0", *cells, kernelspec={"name": "special", "display_name": "S"}
    )
    for run in sweep(notebook, {"seed": [0, 1]}, jobs=2, progress=False):
        record = json.loads(run.path.read_text())["metadata"][METADATA_KEY]
        assert run.status == "succeeded" and not record["kernel"]["warm"]
        assert "special" in record["kernel"]["reason"]


ENDLESS = """
import os, subprocess, time
from importlib.metadata import entry_points
from pathlib import Path
child = subprocess.Popen(["sleep", "600"])
Path(os.environ["NBPROD_RUN"], "kernel").write_text(f"{os.getpid()} {os.getppid()} {child.pid}")
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["worker", "kernel", "server", "driver", "driver and worker"])
def test_killed_warm_run(project: Path, victim: str) -> None:
    """Whoever is killed, the record has an end and no process is left."""
    write_notebook(project / "nbs" / "endless.ipynb", "seed = 0", ENDLESS)
    code = "from nbprod.experiment.sweeps import sweep; import sys; "
    code += "found = sweep('nbs/endless.ipynb', {'seed': [0, 1]}, jobs=2, progress=False)"
    driver = start_driver(code, project)
    markers = wait_for(
        lambda: (found := [*project.glob(".nbprod/runs/*/kernel")]) and len(found) == 2 and found, "two runs"
    )
    wait_for(lambda: all(path.read_text().count(" ") == 2 for path in markers), "two kernels")
    kernels = [[int(pid) for pid in path.read_text().split()] for path in markers]
    paths = [marker.with_name("notebook.ipynb") for marker in markers]
    workers = [json.loads(path.read_text())["metadata"][METADATA_KEY]["pid"] for path in paths]
    chosen = {
        "worker": workers,
        "kernel": [pids[0] for pids in kernels],
        "server": [kernels[0][1]],
        "driver": [driver.pid],
        "driver and worker": [driver.pid, *workers],
    }
    for pid in chosen[victim]:
        with contextlib.suppress(ProcessLookupError):  # it may have gone with the one before
            os.kill(pid, signal.SIGKILL)
    driver.communicate(timeout=40)
    ours = [driver.pid, *workers, *(pid for pids in kernels for pid in pids)]
    wait_for(lambda: not any(alive(pid) for pid in ours), f"all of {ours} to go", 15)
    ended = {"kernel": "failed", "server": "failed"}.get(victim, "interrupted")
    wait_for(lambda: {run.status for run in runs()} == {ended}, "the records", 10)


def papermill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """papermill's own command line in a folder."""
    command = ["papermill", *words, "-k", "python3", "-l", "python", "--no-progress-bar"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("cell", ["print(seed + 1, name)", "print('before')\n1 / 0"])
def test_papermill_with_our_engine(tmp_path: Path, cell: str) -> None:
    """On a notebook of no project: what its own engine gives, also of an error, and no file besides."""
    outputs, statuses = [], []
    for engine in ("nbclient", "nbprod"):
        folder = tmp_path / engine
        folder.mkdir()
        write_notebook(folder / "any.ipynb", "seed = 0\nname = ''", "import os", cell)
        words = ["any.ipynb", "out.ipynb", "--engine", engine, "-p", "seed", "41", "-r", "name", "00123"]
        done = papermill(folder, *words)
        statuses.append((done.returncode, "ZeroDivisionError" in done.stderr))
        assert sorted(path.name for path in folder.iterdir()) == ["any.ipynb", "out.ipynb"]
        metadata = json.loads((folder / "out.ipynb").read_text())["metadata"]
        assert metadata["papermill"]["parameters"] == {"seed": 41, "name": "00123"}
        outputs.append((cells_of(folder / "out.ipynb"), about(folder / "out.ipynb"), sorted(metadata)))
    assert outputs[0] == outputs[1] and statuses[0] == statuses[1]
    assert statuses[0] == ((1, True) if "1 / 0" in cell else (0, False))
    if "1 / 0" not in cell:
        assert outputs[1][0][-1]["outputs"][0]["text"] == "42 00123\n"


def test_papermill_with_our_engine_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Neither in the current folder nor beside the notebook is anything made."""
    with mounted(tmp_path / "only-read", "size=1M"):
        write_notebook(tmp_path / "only-read" / "any.ipynb", "seed = 0", "print(seed + 1)")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "only-read")], check=True)
        words = ["any.ipynb", str(tmp_path / "out.ipynb"), "--engine", "nbprod", "-p", "seed", "41"]
        done = papermill(tmp_path / "only-read", *words)
        assert done.returncode == 0, done.stderr
        assert [path.name for path in (tmp_path / "only-read").iterdir()] == ["any.ipynb"]
    assert cells_of(tmp_path / "out.ipynb")[-1]["outputs"][0]["text"] == "42\n"
