"""The site: built without warnings, complete, and without anything from another host."""

from __future__ import annotations

import ast
import builtins
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import griffe
import pytest

import mpi_dasgd
from mpi_dasgd.config.schema import Config
from mpi_dasgd.storage import schema
from tests.support.mpi_ranks import ROOT, missing

pytestmark = pytest.mark.slow

# Attributes by which a page has the browser load something, or go somewhere.
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
FOLLOWS = ("a", "href")


class Links(HTMLParser):
    """The addresses and anchors of a page.

    Attributes:
        loaded: addresses that the browser fetches by itself.
        followed: addresses that a reader may follow.
        anchors: names that a link to this page may end with.
    """

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.followed: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is not None and (tag, name) in LOADS:
                self.loaded.append(value)
            elif value is not None and (tag, name) == FOLLOWS:
                self.followed.append(value)
            elif value is not None and name in ("id", "name"):
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with proxies that lead nowhere: nothing can be fetched."""
    if find_spec("mkdocs") is None:
        missing("no mkdocs: `make test` installs it")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    """All pages with their links."""
    return {page: Links(page) for page in site.rglob("*.html")}


def test_decentralized_has_its_parameters_on_its_page(site: Path) -> None:
    text = (site / "api" / "decentralized.html").read_text()
    for name in list(inspect.signature(mpi_dasgd.Decentralized).parameters):
        assert f"<code>{name}</code>" in text or f">{name}</span>" in text, name
    for method in ("step", "close", "average", "finished"):
        assert f'id="mpi_dasgd.training.decentralized.Decentralized.{method}"' in text


def _every_key() -> Iterator[str]:
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert model is not None
        for key in model.model_fields:
            yield f"{section}.{key}"


def test_every_key_of_the_configuration_stands_on_its_page(site: Path) -> None:
    text = (site / "api" / "config.html").read_text()
    missing = [key for key in _every_key() if f"<code>{key}</code>" not in text]
    assert not missing


def test_every_column_of_the_results_stands_on_its_page(site: Path) -> None:
    text = (site / "api" / "storage.html").read_text()
    for table in (*schema.TABLES.values(), schema.RANKS, schema.CONSENSUS):
        assert not [c.name for c in table if f"<code>{c.name}</code>" not in text]


def _described(members: Iterable[griffe.Object]) -> Iterator[tuple[str, str, set[str]]]:
    """Yield each parameter and attribute that a docstring describes, and the names that exist."""
    for member in members:
        exists = {parameter.name.lstrip("*") for parameter in getattr(member, "parameters", ())}
        if member.is_class:
            exists |= set(member.all_members)
            # griffe leaves out those that are set together, as in ``self.rank, self.size = ...``.
            exists |= set(re.findall(r"self\.(\w+)(?=[\w., =]*\s=\s)", member.source))
        for section in member.docstring.parsed if member.docstring else ():
            if section.kind.value in ("parameters", "attributes") and not member.is_module:
                for entry in section.value:
                    yield member.path, entry.name.lstrip("*"), exists
        if member.is_class or member.is_module:
            yield from _described(m for m in member.members.values() if not m.is_alias)


def test_docstrings_describe_only_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from build_site import MarkdownDocstrings

    package = griffe.load(
        "mpi_dasgd",
        search_paths=[ROOT],
        extensions=griffe.load_extensions(MarkdownDocstrings),
        docstring_parser="google",
        docstring_options={"warnings": False},
    )
    described = list(_described([package]))
    assert len(described) > 500
    assert not [f"{path}: {name}" for path, name, exists in described if name not in exists]


# Names of MPI, which the package only writes about.
FOREIGN = {"accumulate_ops", "Iallreduce"}


def _prose_and_names(source: str) -> tuple[list[str], set[str]]:
    """Return the docstrings and comments of a module, and every word of its code."""
    tree = ast.parse(source)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    texts = [node for node in strings if isinstance(node, ast.Constant)]
    prose, lines = [str(node.value) for node in texts], {node.lineno for node in texts}
    names: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            prose.append(token.string)
        elif token.type != tokenize.STRING or token.start[0] not in lines:
            names |= set(re.findall(r"\w+", token.string))
    return prose, names


def test_names_in_backticks_exist_in_the_code() -> None:
    names = {*FOREIGN, *dir(builtins)}
    for path in (ROOT / "mpi_dasgd" / "kernels").rglob("*.[hc]*"):
        names |= set(re.findall(r"\w+", path.read_text())) if path.suffix != ".pyc" else set()
    prose = {}
    for path in (ROOT / "mpi_dasgd").rglob("*.py"):
        names |= {path.stem, path.parent.name}
        prose[path], words = _prose_and_names(path.read_text())
        names |= words
    quoted = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)")
    found = [
        (path, name) for path in prose for text in prose[path] for name in quoted.findall(text)
    ]
    assert len(found) > 500
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in found
        if not set(name.removesuffix(".py").split(".")) <= names
    ]
    assert not missing


def test_files_that_the_guides_name_exist() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    path = re.compile(r"(?<![\w/.-])((?:\w+/)*\w+\.(?:py|h|cpp|cu|sbatch|md))\b")
    guides = [file for file in files if file.endswith(".md") and not file.startswith(".")]
    named = [(guide, p) for guide in guides for p in path.findall((ROOT / guide).read_text())]
    assert len(named) > 50
    placeholders = {"my_script.py", "train.py", "digits.py", "mpi_dasgd/algorithms/NAME.py"}
    ends = {"/".join(file.split("/")[-n:]) for file in files for n in range(1, 5)}
    assert not [(guide, p) for guide, p in named if p not in ends | placeholders]


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Links]) -> None:
    loaded = [(page.name, url) for page, links in pages.items() for url in links.loaded]
    assert loaded
    assert not [(page, url) for page, url in loaded if urlsplit(url).netloc]
    for style in site.rglob("*.css"):
        text = style.read_text()
        assert "url(http" not in text and "url(//" not in text and "@import" not in text


def test_all_links_within_the_site_lead_somewhere(pages: dict[Path, Links]) -> None:
    broken, checked = [], 0
    for page, links in pages.items():
        if page.name == "404.html":
            continue  # has addresses from the root of a server
        for url in links.loaded + links.followed:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in pages[target].anchors):
                broken.append((page.name, url))
    assert checked > 500
    assert not broken
