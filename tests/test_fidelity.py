"""A warm run gives the notebook that papermill gives: the same cells, outputs and errors, times aside."""

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
from running import alive, start_driver, wait_for, write_notebook

from nbprod.experiment.recording import METADATA_KEY
from nbprod.experiment.runs import Run, runs
from nbprod.experiment.sweeps import sweep

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
    "exit": ["import sys", "print('bye'); sys.exit(0)"],
    "import error": ["import json, no_such_library_of_ours\njson"],
    "syntax error": ["1 +"],
    "async": ["import asyncio", "await asyncio.sleep(0.01)\nasyncio.get_running_loop().is_running()"],
    "magics": [
        "%matplotlib inline\nimport math",
        "%%capture caught\nprint('hidden')",
        "caught.stdout, %pwd",
        "%lsmagic\n%who",
        "%%bash\necho from bash; echo wrong >&2",
        "_1 if False else In[1], len(Out)",
    ],
    "shell": ["!echo one && echo two >&2", "lines = !printf 'a\\nb'\nlines", "!exit 3\n_exit_code"],
    "processes": [
        "import subprocess, sys, multiprocessing",
        "subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True).stdout",
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))",
        "sys.argv[0].rpartition('/')[2], len(sys.argv), sys.path[0], sys.flags.safe_path, __name__",
    ],
    "threads": [
        "import threading, time\nfrom concurrent.futures import ThreadPoolExecutor",
        "print(list(ThreadPoolExecutor(2).map(abs, [-1, -2])), threading.active_count())",
        "worker = threading.Thread(target=lambda: print('from a thread'))\nworker.start()\nworker.join()",
    ],
    "input": ["input('name? ')"],
    "unicode": ["print('Zürich → 北京 🎉 \\x1b[31mred\\x1b[0m')", "'\\u2028 line', 'é'"],
    "large": ["print('x' * 3_000_000)", "for number in range(20_000): print(number)"],
    "widgets": [
        "import ipywidgets\nfrom tqdm.auto import tqdm",
        "ipywidgets.IntSlider(3)",
        "tqdm.__module__",
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
    r"\b[0-9a-f]{32}\b": "MODEL",
    r"\x1b\[[0-9;]*m": "",
}


def plain(outputs: list[dict[str, Any]]) -> Any:
    """Outputs without what is different in any two executions; a stream is one text, however it was cut."""
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
def test_warm_run_equals_papermill(project: Path, name: str) -> None:
    notebook = write_notebook(project / "nbs" / "cells.ipynb", "seed = 0", *CORPUS[name])
    expected = project / "nbs" / "expected.ipynb"
    by_papermill(notebook, expected, project)
    for run in warm_runs(notebook):
        assert cells_of(run.path) == cells_of(expected)


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


def test_papermill_finds_the_engine(tmp_path: Path) -> None:
    """`papermill --engine nbprod` on a notebook of no project."""
    notebook = write_notebook(tmp_path / "any.ipynb", "seed = 0", "print(seed + 1)")
    command = ["papermill", "--engine", "nbprod", "-k", "python3", "-l", "python", "-p", "seed", "41"]
    subprocess.run([*command, str(notebook), str(tmp_path / "out.ipynb")], check=True, capture_output=True)
    assert cells_of(tmp_path / "out.ipynb")[-1]["outputs"][0]["text"] == "42\n"
