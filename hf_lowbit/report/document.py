"""The page: all sections under one style, in one file."""

from __future__ import annotations

from hf_lowbit import page as shell
from hf_lowbit.report import palette, sections
from hf_lowbit.report.facts import Facts

STYLE = """
:root { --width: 74rem; }
header { margin: 0 0 3rem; }
.over { margin: 0 0 .4rem; font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; color: var(--muted); }
h1 { font-size: clamp(1.9rem, 5vw, 2.9rem); letter-spacing: -.02em; margin: 0 0 .5rem; font-weight: 700; }
h2 { font-size: 1.45rem; letter-spacing: -.01em; margin: 0 0 .35rem; }
.lead { color: var(--muted); margin: 0 0 1.2rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead b { color: var(--ink); font-weight: 600; }
section { margin: 0 0 3.2rem; }
small { color: var(--muted); font-size: .82em; font-weight: 400; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: 1rem 1.1rem; margin: 0;
  min-width: 0; }
.card + .card { margin-top: 1rem; } .pair .card, .cards .card { margin-top: 0; }
figcaption { margin: 0 0 .7rem; } figcaption small { margin-left: .4rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.6rem 0 0;
  padding: 0;
  background: var(--line); border: 1px solid var(--line); border-radius: .7rem; overflow: hidden; }
.tiles div { background: var(--card); padding: 1rem 1.1rem; flex: 1 1 10.5rem; }
.tiles dt { color: var(--muted); font-size: .85rem; }
.tiles dd { margin: .1rem 0 0; font-size: 1.75rem; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tiles small { display: block; letter-spacing: 0; font-size: .8rem; line-height: 1.35; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  align-items: start; }
.pair + .card { margin-top: 1rem; } .card p { margin: 0 0 .6rem; } .card p:last-child { margin-bottom: 0; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.scroll { overflow-x: auto; }
.chart { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; overflow: visible; }
.chart.small { max-width: 26rem; }
.chart text { font-family: inherit; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; } .base { stroke: var(--muted); stroke-width: .7; opacity: .6; }
.axis { font-weight: 600; }
.frontier { fill: none; stroke: var(--accent); stroke-width: 1.5; opacity: .55; }
.point circle { stroke: var(--card); stroke-width: 1.2; }
.point.own circle { fill: var(--warm); } .point.best circle { fill: var(--accent); }
.point.other circle { fill: var(--card); stroke: var(--muted); stroke-width: 1.5; }
.label { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
.chart .label.own { fill: var(--warm); font-weight: 700; } .chart .label.best { fill: var(--ink); }
.after { fill: var(--accent); opacity: .42; } .before { fill: none; stroke: var(--warm); stroke-width: 1.6;
  stroke-linejoin: round; }
.levels { stroke: var(--accent); stroke-width: 1.6; fill: none; }
.legend { font-size: .88rem; color: var(--muted); margin: 0 0 .8rem; }
.swatch { display: inline-block; width: 1.1em; height: .7em; margin: 0 .4em 0 .9em; border-radius: 2px; }
.swatch:first-child { margin-left: 0; } .swatch.after { background: var(--accent); }
.swatch.before { height: 0; border-top: 2px solid var(--warm); vertical-align: middle; background: none; }
.swatch.levels { width: 2px; height: 1em; vertical-align: -.15em; background: var(--accent); }
table { font-variant-numeric: tabular-nums; }
.rows { width: 100%; font-size: .9rem; }
.rows th, .rows td { padding: .38rem .8rem .38rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.rows th:first-child { text-align: left; font-weight: 400; white-space: normal; overflow-wrap: anywhere;
  min-width: 9rem; }
.rows thead th { color: var(--muted); font-weight: 600; font-size: .82rem; }
.rows tr:last-child th, .rows tr:last-child td { border-bottom: 0; } .rows tr > :last-child { padding-right: 0; }
.rows tr.own th, .rows tr.own td { background: var(--softwarm); } .rows .words { text-align: left; white-space: normal;
  min-width: 15rem; }
.heat { width: 100%; border-collapse: separate; border-spacing: 2px; table-layout: fixed; font-size: .82rem; }
.heat th { font-weight: 500; color: var(--muted); font-size: .74rem; padding: .1rem; text-align: center;
  line-height: 1.15;
  vertical-align: bottom; overflow-wrap: anywhere; }
.heat th:first-child { width: 2.9rem; } .heat td { text-align: center; padding: .42rem 0; border-radius: 3px; }
.heat tbody th { vertical-align: middle; } .heat .none { color: var(--muted); }
.bar { display: flex; gap: 2px; height: 2.2rem; border-radius: .4rem; overflow: hidden; } .bar span { min-width: 2px;
  flex-basis: 0; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .8rem 0 0; padding: 0;
  font-size: .88rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em; }
  .key b { font-weight: 600; }
.map { position: relative; aspect-ratio: 9 / 4; width: 100%; border-radius: .4rem; overflow: hidden; }
.map div { position: absolute; border: 1px solid var(--card); overflow: hidden; container-type: size; }
.map span { display: block; padding: .3rem .45rem; font-size: .78rem; line-height: 1.25; white-space: nowrap; }
.map span { overflow: hidden; text-overflow: ellipsis; } .map b { font-weight: 600; }
.map i { display: block; font-style: normal; }
@container (max-width: 3.9rem) { .map i { display: none; } }
@container (max-width: 2.8rem) { .map span { display: none; } }
@container (max-height: 2.5rem) { .map i { display: none; } }
@container (max-height: 1.4rem) { .map span { display: none; } }
@media (max-width: 40rem) { .map { aspect-ratio: 4 / 5; } .map span { font-size: .68rem; padding: .15rem .25rem; }
  .rows { font-size: .82rem; } .rows th, .rows td { padding-right: .5rem; } .rows th:first-child { min-width: 6.5rem; }
  section { margin-bottom: 2.4rem; }
  .tiles dd { font-size: 1.4rem; } .tiles div, .card { padding: .8rem; } .tiles div { flex-basis: 8.5rem; }
  .heat { font-size: .74rem; } }
details summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: .7rem; }
  .card details { margin-top: .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: Georgia, "Times New Roman", serif;
  font-size: 1.03rem; margin: 0; }
.prompt { color: var(--muted); } mark { background: var(--softwarm); color: inherit; text-decoration: underline;
  text-decoration-color: var(--warm); text-decoration-thickness: 2px; text-underline-offset: 3px; border-radius: 2px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem 1.2rem; }
.facts dt { color: var(--muted); font-size: .82rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.missing { padding-left: 2rem; } .card .note { font-size: .85rem; color: var(--muted); margin: .8rem 0 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
footer { color: var(--muted); font-size: .85rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media print { main { padding: 0; } section, figure, .card { break-inside: avoid; } .scroll { overflow: visible; }
  h2 { break-after: avoid; } }
"""


def document(facts: Facts) -> str:
    """The whole page."""
    parts = [
        sections.header(facts),
        sections.quality(facts),
        sections.layers(facts),
        sections.levels(facts),
        sections.memory(facts),
        sections.generation(facts),
        sections.detector(facts),
        sections.making(facts),
        "<footer>Written by <code>hf-lowbit report</code>. Nothing on this page is loaded from elsewhere.</footer>",
    ]
    return shell.page(f"{facts.name}: low-bit model report", "\n".join(parts), palette.style() + STYLE)
