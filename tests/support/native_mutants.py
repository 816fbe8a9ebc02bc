"""The native protocols with one fault each, compiled from changed sources: tests must find them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from tests.support.mpi_ranks import ROOT, missing

__all__ = ["MUTANTS", "mutant"]

_SOURCES = ROOT / "mpi_dasgd" / "kernels" / "cpu"
_COMPILED = ("node_rank.cpp", "publication.cpp", "inbox.cpp")

MUTANTS: dict[str, tuple[str, str, str]] = {
    "no fence before publishing": (
        "publication.cpp",
        "  fence();  // the payload must be complete before the word says so\n",
        "",
    ),
    "no fence before sending": (
        "inbox.cpp",
        "  fence();  // the payload must be complete before the word says so\n",
        "",
    ),
    "no fence before reading a message": (
        "inbox.cpp",
        "    fence();\n    const Message",
        "    const Message",
    ),
    "old versions are not retired": (
        "publication.cpp",
        "  if (newest_ >= 0) retire(newest_, version_ - 1);\n",
        "",
    ),
    "the first free slot": ("publication.cpp", "= free_.back()", "= free_.front()"),
    "claims are not counted": ("publication.cpp", "++setup_.counters->claims_lost;", ""),
    "one claim more": ("publication.cpp", "< setup_.max_claims", "<= setup_.max_claims"),
    "always the first inbox slot": ("inbox.cpp", "(setup_.rank + sent_[rank] + i)", "i"),
    "unsorted": (
        "inbox.cpp",
        "return a.sender != b.sender ? a.sender < b.sender : a.sequence < b.sequence;",
        "return a.slot > b.slot;",
    ),
    "out of order": ("inbox.cpp", "if (message.sequence == received_[message.sender])", ""),
    "waits for lost numbers": ("inbox.cpp", "if (any_interrupted_) skip_lost();", ""),
    "claims without a swap": (
        "publication.cpp",
        "  if (!swap(rank, publication_word(slot), slot_word(kReady, rank, version),",
        "  if (false && !swap(rank, publication_word(slot), slot_word(kReady, rank, version),",
    ),
    "ignores claims": (
        "publication.cpp",
        "  if (swap(setup_.rank, publication_word(slot), ready, free)) {",
        "  if (swap(setup_.rank, publication_word(slot), ready, free) || true) {",
    ),
    "sends unreserved": (
        "inbox.cpp",
        "slot_word(kClaimed, setup_.rank)))\n      return slot;",
        "slot_word(kClaimed, setup_.rank)) || i == count - 1)\n      return slot;",
    ),
    "reclaims of all": ("publication.cpp", " && holder_of(word) == rank", ""),
}
"""File, text and its replacement, by name."""


def mutant(name: str | None, folder: Path) -> ctypes.CDLL:
    """Compile the native protocols with a fault, or without; return the library."""
    if shutil.which("g++") is None:
        missing("no g++")
    for source in _SOURCES.iterdir():
        if source.suffix in (".h", ".cpp"):
            shutil.copy(source, folder)
    if name is not None:
        file, text, replacement = MUTANTS[name]
        source = (folder / file).read_text()
        assert source.count(text) == 1, f"{file} has changed: {text!r}"
        (folder / file).write_text(source.replace(text, replacement))
    library = folder / "mutant.so"
    command = ["g++", "-O0", "-std=c++17", "-fPIC", "-shared", "-o", str(library), *_COMPILED]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
