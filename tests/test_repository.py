"""The repository agrees with itself: notebooks, exported code, README, lock, the rooms' arrows."""

import ast
import filecmp
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TEMPLATES = "nbprod/templates"
PLAIN = ("nbprod/templates/", "nbprod/widgets/static/", "nbprod/py.typed")


def run(*command: str, cwd: Path = ROOT) -> str:
    """What one of this environment's commands prints; where it fails, the test does."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def none_of(found: Iterable[str], advice: str) -> None:
    """The test fails, with what to do, if anything was found."""
    listed = sorted(set(found))
    if listed:
        pytest.fail("\n  ".join([f"{advice}:", *listed]), pytrace=False)


def sources(*patterns: str) -> list[str]:
    """The repository's files: what git has, and what it would take."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", *patterns)
    return sorted(name for name in listed.splitlines() if (ROOT / name).is_file())


def copy(names: list[str], folder: Path) -> None:
    """A copy of these files of the repository in `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def differences(names: set[str], folder: Path) -> list[str]:
    """Those of `names` that `folder` does not have, or has with another content, than the repository."""
    _, changed, missing = filecmp.cmpfiles(ROOT, folder, names, shallow=False)
    return sorted(changed + missing)


@pytest.mark.parametrize(
    "command",
    [
        "ruff check . nbprod/templates",
        "ruff format --check . nbprod/templates",
        "mypy",
        "lint-imports --no-logo",
    ],
)
def test_checker(command: str) -> None:
    run(*command.split())


def test_notebooks_are_exported(tmp_path: Path) -> None:
    """The modules in nbprod/ are what the notebooks give: nothing edited, missing or extra."""
    copy([*sources("nbs"), "pyproject.toml"], tmp_path)
    run("nbdev-export", cwd=tmp_path)
    exported = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("nbprod/**/*.py")}
    present = {name for name in sources("nbprod") if not name.startswith(PLAIN)}
    none_of(differences(exported | present, tmp_path), "Edit the notebook, then `make format`")


def test_notebooks_are_clean(tmp_path: Path) -> None:
    names = sources("nbs/**.ipynb", f"{TEMPLATES}/**.ipynb")
    copy([*names, "pyproject.toml"], tmp_path)
    for folder in ("nbs", TEMPLATES):
        run("nbdev-clean", "--fname", folder, cwd=tmp_path)
    none_of(differences(set(names), tmp_path), "Not clean: `make format`")


def conflicts() -> Iterator[str]:
    """Cells with a conflict marker: nbdev's merge driver writes them into cells of a valid notebook."""
    for name in sources("**.ipynb"):
        for number, cell in enumerate(nbformat.read(ROOT / name, as_version=4).cells, start=1):
            if re.search(r"^(<{7}|>{7})( |$)", cell.source, re.MULTILINE):
                yield f"{name}, cell {number}"


def test_notebooks_hold_no_conflict() -> None:
    none_of(conflicts(), "Conflicts that a merge left")


def test_readme_is_the_index() -> None:
    text = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["readme"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, (
        "nbs/index.ipynb has changed: `make readme`"
    )


def settings() -> ConfigParser:
    """settings.ini, read as setup.py reads it."""
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser


def requirements(*extras: str) -> Iterator[Requirement]:
    """What settings.ini asks for, with these extras."""
    found = settings()
    texts = [found["DEFAULT"]["requirements"], *(found["extras"][name] for name in extras)]
    for line in "\n".join(texts).splitlines():
        if line.strip():
            yield Requirement(line)


def locked() -> tuple[dict[str, list[str]], set[str]]:
    """What requirements.lock has: the versions of each package, and the packages that settings.ini asked for.

    A package has more than one version where those differ between Pythons.
    """
    versions: dict[str, list[str]] = {}
    direct: set[str] = set()
    for entry in re.split(r"^(?=\w)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.M)[
        1:
    ]:
        pin = Requirement(entry.partition("\n")[0].removesuffix("\\"))
        versions.setdefault(canonicalize_name(pin.name), []).extend(part.version for part in pin.specifier)
        if "nbprod (setup.py)" in entry:
            direct.add(canonicalize_name(pin.name))
    return versions, direct


# The lock has the build of the same module that does not bring hundreds of megabytes for GPUs along.
TWINS = {"xgboost": "xgboost-cpu"}


def test_lock_is_what_settings_ask_for() -> None:
    versions, direct = locked()
    extras = set(settings()["extras"]) - set(settings().defaults())
    asked = {canonicalize_name(requirement.name): requirement for requirement in requirements(*extras)}
    old = [f"{name} is no requirement any more" for name in direct - asked.keys()]
    for name, requirement in asked.items():
        found = versions.get(TWINS.get(name, name), [])
        if not found or not all(requirement.specifier.contains(version) for version in found):
            old.append(f"{requirement} is asked for, {', '.join(found) or 'nothing'} is locked")
    none_of(old, "settings.ini and requirements.lock differ: `make lock`")


def imported(path: Path) -> Iterator[str]:
    """The packages that a module imports, inside its functions too; not those of Python or of nbprod."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "nbprod":
                yield top


def test_settings_ask_for_what_is_imported() -> None:
    """What nbprod imports is a requirement with a range of its own, if only of an extra."""
    extras = set(settings()["extras"]) - set(settings().defaults()) - {"dev"}
    asked = {canonicalize_name(requirement.name) for requirement in requirements(*extras)}
    owners = packages_distributions()
    missing = [
        f"{package}, in {name}"
        for name in sources("nbprod/**.py")
        if not name.startswith(PLAIN)
        for package in imported(ROOT / name)
        if not asked & set(map(canonicalize_name, owners.get(package, [package])))
    ]
    none_of(missing, "Not among the requirements in settings.ini")


def test_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Who installs nbprod gets the templates, the widgets' JavaScript and the licence too."""
    copy(sources(), tmp_path / "source")
    run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", "..", cwd=tmp_path / "source")
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    none_of(set(sources("nbprod")) - packed, "Not in the wheel: see package_data in setup.py")
    assert any(name.endswith("licenses/LICENSE") for name in packed)


# Folders of somebody's machine, and the address that a package came from.
PRIVATE = re.compile(r"/(?:root|home/(?!me/)\w+|Users/\w+|work)/|(?:index[-_]url|find[-_]links)\b|/simple[/]")


def test_nothing_is_of_one_machine() -> None:
    found = []
    for name in sources():
        text = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
        for hit in PRIVATE.finditer(text):
            found.append(f"{name}, line {text.count(chr(10), 0, hit.start()) + 1}: {hit[0]}")
    none_of(found, "Of one machine")
