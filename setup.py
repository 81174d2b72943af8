"""Package metadata lives in settings.ini; this file hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SETTINGS = ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
METADATA = SETTINGS["DEFAULT"]
EXTRAS = [name for name in SETTINGS["extras"] if name not in SETTINGS.defaults()]


def lines(text: str) -> list[str]:
    """One entry a line, blank lines dropped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


setup(
    name=METADATA["lib_name"],
    version=METADATA["version"],
    description=METADATA["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=METADATA["author"],
    license_expression=METADATA["license"],
    license_files=["LICENSE"],
    keywords=METADATA["keywords"].split(),
    classifiers=lines(METADATA["classifiers"]),
    python_requires=f">={METADATA['min_python']}",
    packages=find_packages(include=["nbprod", "nbprod.*"]),
    package_data={"nbprod": ["py.typed", "widgets/static/*", "templates/**/*", "templates/**/.*"]},
    install_requires=lines(METADATA["requirements"]),
    extras_require={name: lines(SETTINGS["extras"][name]) for name in EXTRAS},
    entry_points={
        "console_scripts": ["nbprod=nbprod.cli:main"],
        "papermill.engine": ["nbprod=nbprod.experiment.engine:NotebookEngine"],
    },
)
