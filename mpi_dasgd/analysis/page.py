"""Report of runs: one self-contained HTML page and one overview picture."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from mpi_dasgd.analysis import style
from mpi_dasgd.analysis.page_template import TEMPLATE
from mpi_dasgd.analysis.plots import figures, overview
from mpi_dasgd.analysis.run import Run
from mpi_dasgd.analysis.table import lines
from mpi_dasgd.analysis.verdict import labels, verdict

__all__ = ["write_report"]


def write_report(runs: Sequence[Run], out_dir: str | Path) -> tuple[Path, Path]:
    """Write report.png and report.html of one or several runs.

    The page needs no network, no script and no other file; figures are embedded as SVG.

    Args:
        runs: runs to report, in this order.
        out_dir: directory to write to; created if missing.

    Returns:
        The paths of report.png and report.html.

    Raises:
        UserError: if there are no runs.
    """
    names = labels(runs)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    picture = overview(runs, out / "report.png")
    page = out / "report.html"
    page.write_text(_page(runs, names), encoding="utf-8")
    return picture, page


def _page(runs: Sequence[Run], names: Sequence[str]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    drawn = figures(runs)
    return environment.from_string(TEMPLATE).render(
        title=names[0] if len(runs) == 1 else " vs ".join(names) if len(runs) < 4 else "Runs",
        subtitle=_subtitle(runs),
        verdict=verdict(runs),
        lines=lines(runs),
        figures=[
            {
                "title": topic.title,
                "caption": topic.caption,
                "data": base64.b64encode(svg.encode()).decode(),
            }
            for topic, svg in drawn
            if svg is not None
        ],
        missing=[topic.title.lower() for topic, svg in drawn if svg is None],
        runs=[
            {
                "name": name,
                "colour": style.colour(index),
                "status": run.results.attributes["status"],
                "path": str(run.path.resolve()),
                "ranks": run.report()["per_rank"],
                "config": json.dumps(run.config, indent=2) if run.config else "",
                "provenance": run.provenance,
                "lost": run.results.lost,
            }
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
    )


def _subtitle(runs: Sequence[Run]) -> str:
    """Return what the runs have in common: task, number of ranks, seed."""
    shared = []
    for key, text in (("task", "task {}"), ("world_size", "{} ranks"), ("seed", "seed {}")):
        values = {run.results.attributes.get(key) for run in runs}
        if len(values) == 1 and None not in values:
            shared.append(text.format(values.pop()))
    return ", ".join(shared)
