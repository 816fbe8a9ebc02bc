"""The HTML of the report page, as a Jinja template."""

from __future__ import annotations

__all__ = ["TEMPLATE"]

CSS = """
:root { color-scheme: light dark; --page: #f5f7f9; --card: #fff; --ink: #1f2933; --muted: #5f6b77;
  --line: #e2e7ec; --accent: #0072b2; --best: #e6f2ea; --warn: #b54708; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1d232a; --ink: #e6eaee;
  --muted: #9aa6b2; --line: #323b45; --accent: #6cb6e8; --best: #20402c; --warn: #f4a261; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0; }
.subtitle { color: var(--muted); margin: 4px 0 0; }
.verdict { font-size: 1.14rem; margin: 20px 0 28px; padding: 16px 20px; background: var(--card);
  border-left: 4px solid var(--accent); border-radius: 4px 10px 10px 4px; }
h2 { font-size: 1.12rem; margin: 36px 0 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { padding: 8px 18px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; font-weight: 500; }
thead th { font-weight: 650; border-bottom: 2px solid var(--line); white-space: normal;
  min-width: 8em; }
.unit { color: var(--muted); font-weight: 400; margin-left: 0.35em; }
.best { font-weight: 650; background: var(--best); }
.dot { display: inline-block; width: 0.72em; height: 0.72em; border-radius: 50%;
  margin-right: 0.45em; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
figure { margin: 0; overflow: hidden; display: flex; flex-direction: column; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
figure:last-child:nth-child(odd) img { max-width: 560px; margin: 0 auto; }
figure div { background: #fff; padding: 14px 14px 6px; flex: 1; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: 10px 18px 13px; color: var(--muted); font-size: 0.88rem;
  border-top: 1px solid var(--line); }
.note { color: var(--muted); font-size: 0.9rem; }
details { margin-top: 12px; }
summary { padding: 12px 18px; cursor: pointer; font-weight: 600; }
details > div { padding: 0 18px 16px; }
details h3 { font-size: 0.95rem; margin: 14px 0 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0;
  font-size: 0.88rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; padding: 12px 14px; overflow-x: auto; background: var(--page); border-radius: 8px;
  font: 0.84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
.lost { color: var(--warn); }
footer { margin-top: 40px; color: var(--muted); font-size: 0.85rem; }
@media (max-width: 760px) { main { padding: 24px 14px 40px; }
  .figures { grid-template-columns: 1fr; }
  h1 { font-size: 1.5rem; } th, td { padding: 7px 12px; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

TEMPLATE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - mpi_dasgd</title>
<style>"""
    + CSS
    + """</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
{% if subtitle %}
<p class="subtitle">{{ subtitle }}</p>
{% endif %}
<p class="verdict">{{ verdict }}</p>
</header>

<section>
<div class="card scroll">
<table>
<thead>
<tr><th scope="col">run</th>
{% for run in runs %}
<th scope="col"><span class="dot" style="background:{{ run.colour }}"></span>{{ run.name }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for line in lines %}
<tr><th scope="row">{{ line.name }}<span class="unit">{{ line.unit }}</span></th>
{% for text in line.texts %}
<td{% if line.best == loop.index0 %} class="best"{% endif %}>{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

<section>
<h2>Figures</h2>
<div class="figures">
{% for figure in figures %}
<figure class="card">
<div><img alt="{{ figure.title }}" src="data:image/svg+xml;base64,{{ figure.data }}"></div>
<figcaption>{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% if missing %}
<p class="note">Not recorded by these runs: {{ missing | join(", ") }}.</p>
{% endif %}
</section>

<section>
<h2>Ranks, configuration and provenance</h2>
{% for run in runs %}
<details class="card">
<summary><span class="dot" style="background:{{ run.colour }}"></span>{{ run.name }}
<span class="unit">{{ run.status }}</span></summary>
<div>
{% for rank, why in run.lost.items() %}
<p class="lost">Rank {{ rank }} is lost: {{ why }}</p>
{% endfor %}
<h3>Ranks</h3>
<div class="scroll">
<table>
<thead><tr>{% for name in run.ranks[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for rank in run.ranks %}
<tr>{% for name, value in rank.items() %}
{% if loop.first %}<th scope="row">{{ value }}</th>
{% elif value is none %}<td>-</td>
{% elif value is float %}<td>{{ "{:,.6g}".format(value) }}</td>
{% elif value is number %}<td>{{ "{:,}".format(value) }}</td>
{% else %}<td>{{ value }}</td>
{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if run.config %}
<h3>Configuration</h3>
<pre>{{ run.config }}</pre>
{% endif %}
<h3>Provenance</h3>
<dl>
<dt>run directory</dt><dd>{{ run.path }}</dd>
{% for name, value in run.provenance.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</div>
</details>
{% endfor %}
</section>
<footer>Written by mpi_dasgd from the HDF5 files of the runs. Accuracies are of the test set;
the best of a row is highlighted.</footer>
</main>
</body>
</html>
"""
)
