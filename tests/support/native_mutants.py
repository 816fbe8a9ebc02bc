"""The native protocols with one fault each, compiled from changed sources: tests must find them."""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.support.mpi_ranks import ROOT, missing

__all__ = ["EXCHANGE_MUTANTS", "MUTANTS", "mutant"]

_SOURCES = ROOT / "mpi_dasgd" / "kernels" / "cpu"
_COMPILED = (
    *("node_rank.cpp", "publication.cpp", "inbox.cpp", "pair_exchange.cpp", "adaptive_scale.cpp"),
)

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


EXCHANGE_MUTANTS: dict[str, tuple[str, str, str]] = {
    "publishes what has diverged": (
        "pair_exchange.cpp",
        "    return free_received(*pass) ? kDiverged : kForeignSwap;",
        "    return 0;",
    ),
    "keeps what a model that has diverged received": (
        "pair_exchange.cpp",
        "    return free_received(*pass) ? kDiverged : kForeignSwap;",
        "    return kDiverged;",
    ),
    "keeps the claim of what has diverged": (
        "pair_exchange.cpp",
        "      node_.cancel(pass->claim.rank, pass->place);\n      node_.release(pass->claim);",
        "      node_.cancel(pass->claim.rank, pass->place);",
    ),
    "publishes first": (
        "pair_exchange.cpp",
        "    commit(pass);\n    return publish(pass) ?",
        "    const bool done = publish(pass);\n    commit(pass);\n    return done ?",
    ),
    "releases before it sends": (
        "pair_exchange.cpp",
        "    node_.send(pass.claim.rank, pass.place);\n    node_.release(pass.claim);",
        "    node_.release(pass.claim);\n    node_.send(pass.claim.rank, pass.place);",
    ),
    "measures before the step": ("pair_exchange.cpp", "make_step_alone(*pass);", ""),
    "draws the seeds in another order": (
        "pair_exchange.cpp",
        "++codec_.seeds->drawn);",
        "codec_.seeds->drawn++);",
    ),
    "doubles with 4 bits, too": (
        "adaptive_scale.cpp",
        "scale.doubles_estimate != 0}",
        "true}",
    ),
    "takes the last scales for the publication's": (
        "adaptive_scale.cpp",
        "stats[b].rejected != 0, scales[b], parameters)",
        "stats[b].rejected != 0, scale.last[b], parameters)",
    ),
    "trusts the units of corrupt buckets": (
        "adaptive_scale.cpp",
        "const float unit = stats[b].rejected ? 0.0f : units[b];",
        "const float unit = units[b];",
    ),
    "does not count rejections": (
        "adaptive_scale.cpp",
        "  codec.counts->rejected += rejected;\n",
        "",
    ),
}


_COMMAND = (
    *("g++", "-O0", "-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC"),
    *("-iquote", str(_SOURCES)),
)


def mutant(name: str | None, folder: Path) -> ctypes.CDLL:
    """Compile the native protocols and exchanges with a fault, or without; return the library."""
    objects = dict(_objects())
    if name is not None:
        file, text, replacement = (MUTANTS | EXCHANGE_MUTANTS)[name]
        source = (_SOURCES / file).read_text()
        assert source.count(text) == 1, f"{file} has changed: {text!r}"
        (folder / file).write_text(source.replace(text, replacement))
        objects[file] = _compile(folder / file, folder)
    library = folder / "mutant.so"
    native = _SOURCES.parent / "_native.so"  # has the passes over memory
    _run([*_COMMAND, "-shared", "-o", library, *objects.values(), native])
    return ctypes.CDLL(str(library))


@cache
def _objects() -> dict[str, Path]:
    """Compile the sources as they are; return their objects by name."""
    if shutil.which("g++") is None:
        missing("no g++")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {file: _compile(_SOURCES / file, folder) for file in _COMPILED}


def _compile(source: Path, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _run([*_COMMAND, "-c", source, "-o", made])
    return made


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
