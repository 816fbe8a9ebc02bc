"""`bench quality`: what the codecs' arithmetic is worth; no ranks, no clock, all follows from the seed.

Four parts: the error of one average against the distance of the models; whether the check of a lattice
bucket fails exactly where a decoding did; whether rounding at random is without bias; and how gamma and rho
of the lattice do when ranks gossip.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpi_dasgd.bench.bias import biases
from mpi_dasgd.bench.codec_error import METHODS, errors
from mpi_dasgd.bench.detection import cases, detection
from mpi_dasgd.bench.gossip import LAWS, PHASES, Setting, gossip
from mpi_dasgd.bench.sample_store import DIRECTORY, samples_path, write_samples
from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.kernels import native

__all__ = ["PARTS", "detection", "main"]

DISTANCES = [10 ** (-step / 2) for step in range(2, 13)]
PAIR_BUCKETS = 512
GRID = [
    Setting(f"lattice{bits}", gamma, rho)
    for bits, gammas in ((8, (1.2, 1.5, 2.0, 3.0)), (4, (1.2, 1.5, 2.0)))
    for gamma in gammas
    for rho in (0.9, 0.95, 0.99)
]
"""4 bits allow no gamma of 3."""
OTHERS = [Setting("fp16"), Setting("qsgd8")]

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark.

    Raises:
        UserError: an argument is wrong.
    """
    options = _parser().parse_args(arguments)
    for name, least in (("buckets", 1), ("messages", 2), ("rounds", 2), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"bench quality: --{name} must be at least {least}, got {value}")
    for flag, chosen, valid in (("parts", options.parts, PARTS), ("laws", options.laws, LAWS)):
        for name in chosen:
            if name not in valid:
                raise UserError(
                    f"bench quality: --{flag}: {name!r} is not known{nearest(name, valid)} "
                    f"(valid: {', '.join(map(repr, valid))})"
                )
    report: dict[str, Any] = {"seed": options.seed, "kernels": native.status(), "samples": {}}
    for name in dict.fromkeys(options.parts):
        part = PARTS[name]
        path = samples_path(f"quality-{name}", options.out)
        rows = part.measure(options)
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        write_samples(path, name, columns, settings | {"kernels": native.status()})
        report["samples"][name] = str(path)
        report[name] = part.summarize(rows)
        if not options.json:
            print("\n".join([*part.table(report[name]), f"raw samples: {path}", ""]), flush=True)
    if options.json:
        print(json.dumps(report), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench quality",
        description="Errors, checks and bias of the codecs; choice of gamma and rho. One core, minutes.",
    )
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), help=f"some of {', '.join(PARTS)} [all]")
    add("--buckets", type=int, default=2_500_000, help="for detection [2,500,000]")
    add("--messages", type=int, default=4000, help="of each method, for bias [4000]")
    add("--rounds", type=int, default=60, help="turns of each rank in a phase of gossip [60]")
    add("--laws", nargs="+", default=list(LAWS), help=f"some of {', '.join(LAWS)} [all]")
    add("--seed", type=int, default=0, help="of everything random [0]")
    add("--out", metavar="DIR", help=f"directory for the raw samples [{DIRECTORY}]")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


# --- measure ---


def _errors(options: argparse.Namespace) -> Rows:
    return [
        error._asdict()
        for distance in DISTANCES
        for error in errors(distance, PAIR_BUCKETS, options.seed)
    ]


def _detection(options: argparse.Namespace) -> Rows:
    return [case._asdict() for case in cases(options.buckets, options.seed)]


def _bias(options: argparse.Namespace) -> Rows:
    return [bias._asdict() for bias in biases(options.messages, options.seed)]


def _gossip(options: argparse.Namespace) -> Rows:
    return [
        phase._asdict()
        for law in options.laws
        for phase in gossip(law, [*GRID, *OTHERS], options.rounds, options.seed)
    ]


# --- summarize ---


def _as_they_are(rows: Rows) -> Rows:
    """Return the rows as JSON can hold them."""
    return [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _sums(rows: Rows) -> Rows:
    """Return the sums of the blocks of each kind, and of all."""
    kinds = ("bits", "law", "operation")
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        for key in (tuple(row[kind] for kind in kinds), ("all",) * 3):
            total = sums.setdefault(key, dict(zip(kinds, key, strict=True)))
            for name in row:
                if name not in kinds:
                    total[name] = total.get(name, 0) + row[name]
    every = sums.pop(("all",) * 3)
    return [*sums.values(), every]


# --- tables ---


def _error_table(rows: Rows) -> list[str]:
    lines = []
    for column, title in (
        ("error", "RMS(what moved / weight - (x - y)) / RMS(x - y)"),
        ("ends", "RMS(x - y) after both have moved / before"),
    ):
        words = [[*method.split()[:1], " ".join(method.split()[1:])] for method in METHODS]
        lines.append(f"{title}, against RMS(x - y)")
        lines += ["".join([f"{'':<9}", *(f"{word[n]:>17}" for word in words)]) for n in range(2)]
        for start in range(0, len(rows), len(METHODS)):
            line = rows[start : start + len(METHODS)]
            lines.append(
                f"{line[0]['distance']:<9.1e}" + "".join(f"{row[column]:>17.2g}" for row in line)
            )
    rejected = sum(row["rejected"] for row in rows)
    return [*lines, f"{rejected} buckets were rejected"]


def _detection_table(rows: Rows) -> list[str]:
    return [
        f"{'bits':<6}{'distances':<11}{'operation':<11}{'failing':>10}{'by 1 element':>14}{'sound':>10}"
        f"{'undetected':>12}{'false alarms':>14}",
        *(
            f"{row['bits']:<6}{row['law']:<11}{row['operation']:<11}{row['failing']:>10}"
            f"{row['single']:>14}{row['sound']:>10}{row['undetected']:>12}{row['false_alarms']:>14}"
            for row in rows
        ),
    ]


def _bias_table(rows: Rows) -> list[str]:
    return [
        f"{'':<20}{'messages':>9}{'RMS error':>11}{'mean / RMS':>12}{'standard error':>16}{'z':>7}"
        f"{'elements: mean z^2':>20}{'largest |z|':>13}",
        *(
            f"{row['method']:<20}{row['messages']:>9}{row['rms']:>11.2g}{row['mean']:>+12.1e}"
            f"{row['deviation']:>16.1e}{row['z']:>+7.2f}{row['element_z2']:>20.2f}{row['largest_z']:>13.2f}"
            for row in rows
        ),
    ]


def _gossip_table(rows: Rows) -> list[str]:
    """Return a line for each setting and law, with the phases side by side."""
    lines = [
        "in each phase of the learning rate: % of buckets rejected, median error, and disagreement over",
        "that of codec none; in brackets: of the elements with small gradients",
    ]
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["law"], row["codec"], row["gamma"], row["rho"], row["weight"])
        groups.setdefault(key, {})[row["phase"]] = row
    head = f"{'gradients':<13}{'codec':<10}{'gamma':>6}{'rho':>6}"
    lines.append(head + "".join(f"{phase:>36}" for phase in PHASES))
    for (law, codec, gamma, rho, _), phases in groups.items():
        if codec == "none":
            continue
        cells = []
        for row in phases.values():
            cell = f"{100 * row['rejected']:.2f} %{row['error']:>7.2g}{row['apart']:>9.3g}"
            small = f"({row['apart_small']:.3g})" if "mixed" in law else ""
            cells.append(f"{cell}{small:>11}")
        name = f"{law:<13}{codec:<10}{gamma or '-':>6}{rho or '-':>6}"
        lines.append(name + "".join(f"{cell:>36}" for cell in cells))
    return lines


class _Part(NamedTuple):
    """How to measure, to sum up and to show."""

    measure: Callable[[argparse.Namespace], Rows]
    summarize: Callable[[Rows], Rows]
    table: Callable[[Rows], Iterable[str]]


PARTS: Mapping[str, _Part] = {
    "errors": _Part(_errors, _as_they_are, _error_table),
    "detection": _Part(_detection, _sums, _detection_table),
    "bias": _Part(_bias, _as_they_are, _bias_table),
    "gossip": _Part(_gossip, _as_they_are, _gossip_table),
}

if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
