"""The repository agrees with itself: notebooks, exported code, README, lock, the rooms' arrows."""

import filecmp
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

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
    different = differences(exported | present, tmp_path)
    assert not different, "Not what the notebooks give; edit those, then: make format"


def test_notebooks_are_clean(tmp_path: Path) -> None:
    names = sources("nbs/**.ipynb", f"{TEMPLATES}/**.ipynb")
    copy([*names, "pyproject.toml"], tmp_path)
    for folder in ("nbs", TEMPLATES):
        run("nbdev-clean", "--fname", folder, cwd=tmp_path)
    assert not differences(set(names), tmp_path), "Not clean; run: make format"


def conflicts() -> Iterator[str]:
    """Cells with a conflict marker: nbdev's merge driver writes them into cells of a valid notebook."""
    for name in sources("**.ipynb"):
        for number, cell in enumerate(nbformat.read(ROOT / name, as_version=4).cells, start=1):
            if re.search(r"^(<{7}|>{7})( |$)", cell.source, re.MULTILINE):
                yield f"{name}, cell {number}"


def test_notebooks_hold_no_conflict() -> None:
    assert not list(conflicts())


def test_readme_is_the_index() -> None:
    text = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["readme"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "README.md is old; run: make readme"


def settings() -> ConfigParser:
    """settings.ini, read as setup.py reads it."""
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser


def requirements() -> Iterator[Requirement]:
    """What settings.ini asks for, with every extra."""
    found = settings()
    extras = [found["extras"][name] for name in found["extras"] if name not in found.defaults()]
    for line in "\n".join([found["DEFAULT"]["requirements"], *extras]).splitlines():
        if line.strip():
            yield Requirement(line)


def locked() -> dict[str, list[str]]:
    """The versions that requirements.lock has of each package; more than one where Pythons differ."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            pin = Requirement(line.removesuffix("\\"))
            found.setdefault(canonicalize_name(pin.name), []).extend(part.version for part in pin.specifier)
    return found


def test_lock_has_what_settings_ask_for() -> None:
    versions = locked()
    for asked in requirements():
        found = versions.get(canonicalize_name(asked.name), [])
        fits = found and all(asked.specifier.contains(version) for version in found)
        assert fits, f"settings.ini asks for {asked}, requirements.lock has {found}; run: make lock"


# Folders of somebody's machine, and the address that a package came from.
PRIVATE = re.compile(r"/(?:root|home/\w+|Users/\w+|work)/|(?:index[-_]url|find[-_]links)\b|/simple[/]")


def test_nothing_is_of_one_machine() -> None:
    found = []
    for name in sources():
        text = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
        for hit in PRIVATE.finditer(text):
            found.append(f"{name}, line {text.count(chr(10), 0, hit.start()) + 1}: {hit[0]}")
    assert not found
