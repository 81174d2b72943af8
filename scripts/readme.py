"""README.md from nbs/index.ipynb: `make readme` writes it, and a test compares it."""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
LINK = re.compile(r"""(\]\(|\b(?:src|href)=")(?!\w+:|[#/])([^)"\s]+)""")
HIDDEN = re.compile(r"\s*(#\|\s*hide\b|\Z)")
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
STYLE = re.compile(r"<style\b.*?</style>\s*", re.DOTALL)
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def from_root(link: re.Match[str]) -> str:
    """A link that is relative to nbs/, as seen from the repository's root."""
    return link[1] + posixpath.normpath(posixpath.join("nbs", link[2]))


def tidy(text: str) -> str:
    """Markdown without styles, which GitHub shows as text, and with one blank line where there are more."""
    parts = FENCED.split(STYLE.sub("", text))
    parts[::2] = [re.sub(r"\n(\s*\n){2,}", "\n\n", part) for part in parts[::2]]
    return "\n".join(line.rstrip() for line in "".join(parts).splitlines()).strip() + "\n"


def readme(path: Path = INDEX) -> str:
    """The notebook as Markdown: without cells that `#| hide`, its links seen from the repository's root.

    Pictures belong in nbs/images and are linked to; an output that is one is refused, for Markdown cannot
    hold it.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if not HIDDEN.match(cell.source)]
    for cell in notebook.cells:
        pattern, replacement = (LINK, from_root) if cell.cell_type == "markdown" else (DIRECTIVE, "")
        cell.source = pattern.sub(replacement, cell.source)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources["outputs"]:
        raise ValueError(f"{path} shows a picture as output: save it in nbs/images and link to it.")
    return tidy(text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
