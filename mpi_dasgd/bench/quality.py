"""`bench quality`: arithmetic quality of the codecs, without ranks or clocks, from a seed only.

It has four parts: the error of one average against the distance of the models; whether the check of
a lattice bucket fails exactly where its decoding failed; whether stochastic rounding is unbiased;
and the effect of the lattice's scale_margin and scale_decay when ranks gossip.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpi_dasgd.bench.bias import measure_bias
from mpi_dasgd.bench.codec_error import METHODS, measure_errors
from mpi_dasgd.bench.detection import measure_detection
from mpi_dasgd.bench.gossip import PHASES, CodecSetting, measure_gossip
from mpi_dasgd.bench.gossip_gradients import DISTRIBUTIONS
from mpi_dasgd.bench.options import add_output_options, validate_names
from mpi_dasgd.bench.sample_store import columns_of, samples_path, write_samples
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native

__all__ = ["PARTS", "main"]

DISTANCES = [10 ** (-step / 2) for step in range(2, 13)]
"""RMS distances of the models whose average is measured."""
PAIR_BUCKETS = 512
"""Buckets of these models."""
LATTICE_SETTINGS = [
    CodecSetting(f"lattice{bits}", margin, decay)
    for bits, margins in ((8, (1.2, 1.5, 2.0, 3.0)), (4, (1.2, 1.5, 2.0)))
    for margin in margins
    for decay in (0.9, 0.95, 0.99)
]
"""Lattice codecs in the gossip; 4 bits do not allow a margin of 3."""
OTHER_SETTINGS = [CodecSetting("fp16"), CodecSetting("qsgd8")]

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    Raises:
        UserError: an argument is wrong.
    """
    options = _parser().parse_args(arguments)
    for name, least in (("buckets", 1), ("messages", 2), ("rounds", 2), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"bench quality: --{name} must be at least {least}, got {value}")
    validate_names("bench quality: --parts", options.parts, PARTS, repr)
    validate_names("bench quality: --laws", options.laws, DISTRIBUTIONS, repr)
    report: dict[str, Any] = {"seed": options.seed, "kernels": native.status(), "samples": {}}
    for name in dict.fromkeys(options.parts):
        part = PARTS[name]
        path = samples_path(f"quality-{name}", options.out)
        rows = part.measure(options)
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        write_samples(path, name, columns_of(rows), settings | {"kernels": native.status()})
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
        description="Errors, checksums and bias of the codecs; choice of the scale's parameters.",
    )
    add = parser.add_argument
    laws = ", ".join(DISTRIBUTIONS)
    add("--parts", nargs="+", default=list(PARTS), help=f"some of {', '.join(PARTS)} [all]")
    add("--buckets", type=int, default=2_500_000, help="random buckets, for detection [2,500,000]")
    add("--messages", type=int, default=4000, help="messages per method, for bias [4000]")
    add("--rounds", type=int, default=60, help="turns of each rank per phase, for gossip [60]")
    add(
        "--laws",
        nargs="+",
        default=list(DISTRIBUTIONS),
        help=f"distributions of the gradients, some of {laws} [all]",
    )
    add("--seed", type=int, default=0, help="seed of everything random [0]")
    add_output_options(parser)
    return parser


# --- raw samples ---


def _errors(options: argparse.Namespace) -> Rows:
    return [
        result._asdict()
        for distance in DISTANCES
        for result in measure_errors(distance, PAIR_BUCKETS, options.seed)
    ]


def _detection(options: argparse.Namespace) -> Rows:
    return [result._asdict() for result in measure_detection(options.buckets, options.seed)]


def _bias(options: argparse.Namespace) -> Rows:
    return [result._asdict() for result in measure_bias(options.messages, options.seed)]


def _gossip(options: argparse.Namespace) -> Rows:
    settings = [*LATTICE_SETTINGS, *OTHER_SETTINGS]
    return [
        result._asdict()
        for law in options.laws
        for result in measure_gossip(law, settings, options.rounds, options.seed)
    ]


# --- rows of the report ---


def _nan_to_none(rows: Rows) -> Rows:
    """Return the rows with None for NaN, which JSON does not have."""
    return [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _sum_blocks(rows: Rows) -> Rows:
    """Return the sums over the blocks of each combination, and last the sums over all blocks."""
    keys = ("bits", "law", "operation")
    all_blocks = ("all",) * len(keys)
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        for values in (tuple(row[key] for key in keys), all_blocks):
            total = sums.setdefault(values, dict(zip(keys, values, strict=True)))
            for name in row:
                if name not in keys:
                    total[name] = total.get(name, 0) + row[name]
    last = sums.pop(all_blocks)
    return [*sums.values(), last]


# --- printed tables ---


def _error_table(rows: Rows) -> list[str]:
    lines = []
    for column, title in (
        ("error", "RMS(what moved / weight - (x - y)) / RMS(x - y)"),
        ("ends", "RMS(x - y) after both have moved / before"),
    ):
        # Two lines of heads: the codec, and how it is used.
        heads = [method.partition(" ")[::2] for method in METHODS]
        lines.append(f"{title}, against RMS(x - y)")
        lines += ["".join([f"{'':<9}", *(f"{head[n]:>17}" for head in heads)]) for n in range(2)]
        for start in range(0, len(rows), len(METHODS)):
            line = rows[start : start + len(METHODS)]
            lines.append(
                f"{line[0]['distance']:<9.1e}" + "".join(f"{row[column]:>17.2g}" for row in line)
            )
    rejected = sum(row["rejected"] for row in rows)
    return [*lines, f"{rejected} buckets were rejected"]


def _detection_table(rows: Rows) -> list[str]:
    return [
        f"{'bits':<6}{'distances':<11}{'operation':<11}{'failing':>10}{'by 1 element':>14}"
        f"{'sound':>10}{'undetected':>12}{'false alarms':>14}",
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
            f"{row['deviation']:>16.1e}{row['z']:>+7.2f}{row['element_z2']:>20.2f}"
            f"{row['largest_z']:>13.2f}"
            for row in rows
        ),
    ]


def _gossip_table(rows: Rows) -> list[str]:
    """Return one line per setting and distribution, with the phases side by side."""
    lines = [
        "in each phase of the learning rate: % of buckets rejected, median error, and disagreement "
        "over",
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
    """One part of the benchmark.

    Attributes:
        measure: returns the raw samples, given the command-line options.
        summarize: returns the rows of the report, given the raw samples.
        table: returns the lines of the printed table, given the rows of the report.
    """

    measure: Callable[[argparse.Namespace], Rows]
    summarize: Callable[[Rows], Rows]
    table: Callable[[Rows], Iterable[str]]


PARTS: Mapping[str, _Part] = {
    "errors": _Part(_errors, _nan_to_none, _error_table),
    "detection": _Part(_detection, _sum_blocks, _detection_table),
    "bias": _Part(_bias, _nan_to_none, _bias_table),
    "gossip": _Part(_gossip, _nan_to_none, _gossip_table),
}
