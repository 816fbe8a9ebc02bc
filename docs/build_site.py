"""Additions of `mkdocs build` to docs/: other files, generated tables, docstrings as Markdown.

mkdocs calls the functions `on_...`; griffe, which reads the docstrings, uses `MarkdownDocstrings`.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from mpi_dasgd.config.schema import Config
from mpi_dasgd.storage import schema

ROOT = Path(__file__).resolve().parent.parent

# Pages of files that stand outside of docs/, where GitHub and editors look for them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "LICENSE": "license.md",
    **{
        f"examples/{path.name}": f"examples/{path.stem}.md"
        for path in sorted((ROOT / "examples").glob("*.py"))
    },
}
TITLES = {"CITATION.cff": "Citing", "LICENSE": "License"}
LANGUAGES = {".cff": "yaml", ".py": "python", "": "text"}
# What a page of docs/api has in the place of the generated tables.
MARKER = "<!-- generated: {} -->"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES`."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        suffix = Path(source).suffix
        if suffix != ".md":
            title = TITLES.get(source, Path(source).name)
            text = f"# {title}\n\n```{LANGUAGES[suffix]}\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in the generated tables, and link the pages of the repository's files."""
    for name, lines in (("settings", settings), ("columns", columns)):
        if MARKER.format(name) in markdown:
            markdown = markdown.replace(MARKER.format(name), "\n".join(lines()))
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = Path(page.file.src_uri).parent

    def point(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if re.match(r"\w+:", target):
            return link[0]
        linked = (ROOT / source).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        uri = PAGES.get(linked, linked.removeprefix("docs/"))
        return f"]({_relative(uri, here)}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", point, markdown)


def _relative(uri: str, here: Path) -> str:
    return "../" * len(here.parts) + uri


def settings() -> Iterator[str]:
    """Yield a section per section of the configuration, and a row per key, from the schema."""
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        yield from ("", f"## `{section}`", "")
        yield from _header("key", "values", "default", "meaning")
        for key, info in model.model_fields.items():
            default = info.get_default(call_default_factory=True)
            unset = "unset" if default is None else f"`{json.dumps(default)}`"
            values = _values(info.annotation) + _limits(info.metadata)
            yield _row(f"`{section}.{key}`", values, unset, info.description or "")


def _values(annotation: Any) -> str:
    """Return what a key takes: names, or a type and its limits."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        limits = [limit for field in arguments[1:] for limit in getattr(field, "metadata", ())]
        return _values(arguments[0]) + _limits(limits)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(a) for a in arguments if a is not type(None))
    if origin is tuple:
        return f"list of {_values(arguments[0])}"
    return "table" if origin is dict else str(annotation.__name__)


def _limits(metadata: Iterable[Any]) -> str:
    """Return pydantic's limits of a value as text: " > 0", or "" if there are none."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return " " + ", ".join(found) if found else ""


def columns() -> Iterator[str]:
    """Yield a table per table of results.h5, and a row per column, from the schema."""
    tables = {**schema.TABLES, "ranks": schema.RANKS, "consensus": schema.CONSENSUS}
    for table, its_columns in tables.items():
        yield from ("", f"## `/{table}`", "")
        yield from _header("column", "type", "unit", "meaning")
        for column in its_columns:
            unit = "" if column.unit == "1" else column.unit
            yield _row(f"`{column.name}`", column.dtype, unit, column.long_name)


def _header(*names: str) -> Iterable[str]:
    return _row(*names), _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


class MarkdownDocstrings(griffe.Extension):
    """Makes of our docstrings what Markdown and the Google style have for it.

    ``::`` before an indented block becomes ``:``; an entry of several names (``rank, size: ...``)
    becomes one entry per name, so that each gets its type.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring is None:
            return
        text = re.sub(r"^([ \t]*)::$", "", obj.docstring.value, flags=re.M)
        text = re.sub(r"::$", ":", text, flags=re.M)
        text = re.sub(
            r"^(    )(\w+(?:, \w+)+): (.*(?:\n {8,}.*)*)",
            lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")),
            text,
            flags=re.M,
        )
        obj.docstring.value = text
