"""The documentation site: Sphinx over Markdown pages and docstrings; `make docs`. Nothing is fetched."""

from __future__ import annotations

import re
from typing import Any

from spear_fast import __version__

project, author, release = "spear_fast", "spear_fast authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = f"spear_fast {release}"
html_show_sphinx = False
default_role = "code"
autodoc_member_order = "bysource"
# an extra that building the pages does without
autodoc_mock_imports = ["ray"]
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

REPOSITORY = "https://github.com/lucidrains/spear-tts-pytorch/blob/0.4.8/spear_tts_pytorch"
# "reference line 620", "reference trainer.py:77"
LINE = re.compile(r"reference (?:lines? (?P<line>\d+)|(?P<file>\w+\.py):(?P<number>\d+))")
# "scores: `[B, R]` float32, …" and what is indented below
FIELD = re.compile(r"(?P<names>[a-z_][\w`]*(?:, [a-z_][\w`]*)*): ")


def linked(text: str) -> str:
    """Returns reST with the reference's lines as links to its sources."""

    def link(found: re.Match[str]) -> str:
        name, number = found["file"] or "spear_tts_pytorch.py", found["line"] or found["number"]
        return f"`{found[0]} <{REPOSITORY}/{name}#L{number}>`__"

    return LINE.sub(link, text)


def escaped(text: str) -> str:
    """Returns text with what reST would read as markup escaped, and the reference's lines linked."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*|\\]|\b_|_\b)", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [linked(part) for part in plain]
    return "".join(parts)


def as_rest(lines: list[str]) -> list[str]:
    """Returns a docstring of this project as reST: `name: text` lines become a list, indented paragraphs code."""
    found: list[str] = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        rows = paragraph.splitlines()
        if all(row.startswith("    ") for row in rows):
            found += ["", "::", "", *rows]
            continue
        items: list[list[str]] = []
        for row in rows:
            field = FIELD.match(row)
            if field or not items:
                items.append([row.strip()])
            else:
                items[-1].append(row.strip())
        found.append("")
        for item in items:
            text, field = " ".join(item), FIELD.match(item[0])
            names = f"**{field['names'].replace('`', '')}**: " if field else ""
            found += [f"{'* ' if field else ''}{names}{escaped(text[field.end() if field else 0 :])}", ""]
    return found


def process_docstring(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = as_rest(lines)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process_docstring)
