"""The pieces of HTML the report is made of, and its style sheet; text is escaped here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b2530; --soft: #5b6772; --paper: #ffffff;
  --panel: #f5f7f9; --line: #dde3e8; --accent: #2f6fb3; --bad: #c2452d; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ea; --soft: #98a4af; --paper: #14181d;
  --panel: #1d232a; --line: #333c45; --accent: #76aee6; --bad: #ef8a72; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.page { display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); gap: 0 2.5rem;
  max-width: 1240px; margin: 0 auto; padding: 0 1.5rem 4rem; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto;
  padding: 2.6rem 0 1rem; font-size: 14px; }
nav ol { list-style: none; margin: 0; padding: 0; border-left: 2px solid var(--line); }
nav a { display: block; padding: .22rem .8rem; color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--accent); }
header { padding: 2.2rem 0 .4rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line);
  font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
.lead, .note, figcaption { color: var(--soft); }
.lead { margin: .4rem 0 0; }
.note { font-size: 14px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: .5rem 0; padding: .8rem 1rem; overflow-x: auto; background: var(--panel);
  border-radius: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr));
  gap: 1rem 1.4rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; font-size: 13px; }
.scroll { overflow-x: auto; }
.scroll > svg { display: block; width: 100%; min-width: 30rem; height: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
.bar { display: inline-block; width: 7rem; height: .55rem; background: var(--panel);
  vertical-align: baseline; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar b { display: block; height: 100%; background: var(--accent); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr));
  gap: .8rem; margin: 1rem 0 1.2rem; padding: 0; }
.numbers div { padding: .7rem .9rem; background: var(--panel); border-radius: 8px; }
.numbers dt { color: var(--soft); font-size: 13px; }
.numbers dd { margin: 0; font-size: 1.4rem; line-height: 1.3; white-space: nowrap; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.numbers small { display: block; white-space: normal; line-height: 1.35; color: var(--soft);
  font-size: 12px; font-weight: 400; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr));
  gap: 1rem; }
.card { padding: .7rem .9rem .9rem; background: var(--panel); border-radius: 8px; min-width: 0;
  break-inside: avoid; }
.card h3 { margin: 0; }
.card p { margin: .35rem 0 .15rem; color: var(--soft); font-size: 13px; }
.row { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 3px;
  margin-top: .15rem; }
.thumb { position: relative; display: block; aspect-ratio: 1; overflow: hidden; border-radius: 2px;
  background-image: var(--sheet); background-size: var(--size); background-repeat: no-repeat;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.crisp .thumb { image-rendering: pixelated; }
.off { outline: 2px solid var(--bad); outline-offset: -2px; }
.off::after { content: "\\00d7"; position: absolute; right: 0; bottom: 0; width: 1.1em;
  color: #fff; background: var(--bad); font: 700 11px/1.1em system-ui, sans-serif;
  text-align: center; }
.strips { display: grid; gap: .7rem; max-width: 62rem; }
.strip { display: grid; gap: 4px;
  grid-template-columns: minmax(0, 1fr) .5rem repeat(var(--k), minmax(0, 1fr));
  break-inside: avoid; font-size: 12px; line-height: 1.25; }
.strip span { display: block; padding-top: .1rem; color: var(--soft); text-align: center;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.strip .query span { color: var(--ink); font-weight: 600; }
.strip > b { border-right: 2px solid var(--line); }
.strip .x { color: var(--bad); font-weight: 600; }
.map { display: block; width: 100%; max-width: 50rem; height: auto; }
details { margin: .35rem 0; }
summary { cursor: pointer; }
@media (max-width: 900px) { .page { display: block; padding: 0 1rem 3rem; }
  nav { position: static; max-height: none; padding: 1rem 0 0; }
  nav ol { display: flex; flex-wrap: wrap; border: 0; gap: 0 .2rem; }
  nav a { padding: .15rem .7rem .15rem 0; } header { padding-top: 1rem; }
  .bar { width: 4rem; } }
@media (max-width: 600px) { .row { grid-template-columns: repeat(var(--m), minmax(0, 1fr)); }
  .strip { grid-template-columns: minmax(0, 1fr) .5rem repeat(5, minmax(0, 1fr)); }
  .strip > :nth-child(n + 8) { display: none; } td:last-child:not(.n) { min-width: 11rem; } }
@media print { .page { display: block; max-width: none; padding: 0; } nav { display: none; }
  :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #f3f4f6; --line: #ccc;
  --accent: #2f6fb3; --bad: #b03018; color-scheme: light; }
  body { font-size: 10pt; } h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the page; id is its anchor in the table of contents."""

    id: str
    title: str
    body: str


def page(title: str, *, lead: str, sections: Sequence[Section]) -> str:
    """Return the whole page: it refers to nothing outside itself and runs no script."""
    contents = "".join(f'<li><a href="#{s.id}">{escape(s.title)}</a></li>' for s in sections)
    parts = "".join(
        f'<section id="{s.id}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # else browsers ask for favicon.ico
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<div class="page"><nav aria-label="Contents"><ol>{contents}</ol></nav><main>'
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>'
        f"{parts}</main></div></body></html>\n"
    )


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph; a note is set smaller and greyer."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[int]) -> str:
    """Return a table; cells are escaped unless Markup. numeric: columns set to the right."""
    side = {i: ' class="n"' for i in numeric}
    top = "".join(f"<th{side.get(i, '')}>{escape(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{side.get(i, '')}>{_cell(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    body = f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll">{body}</div>'


class Markup(str):
    """HTML made by this module, as against text that is still to be escaped."""


def _cell(value: object) -> str:
    return value if isinstance(value, Markup) else escape(str(value))


def bar(share: float) -> Markup:
    """Return a bar filled to a share in [0, 1]."""
    return Markup(f'<span class="bar"><b style="width:{100 * share:.1f}%"></b></span>')


def numbers(items: Iterable[tuple[str, str, str]]) -> str:
    """Return headline numbers from (name, value, remark)."""
    made = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(remark)}</small>" if remark else "")
        + "</dd></div>"
        for name, value, remark in items
    )
    return f'<dl class="numbers">{"".join(made)}</dl>'


def figures(drawn: Iterable[str]) -> str:
    """Return figures side by side, as many in a row as the screen has room for."""
    return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in drawn)}</div>'


def details(summary: str, body: str) -> str:
    """Return a part that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def listing(items: Iterable[str]) -> str:
    """Return a bulleted list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def duration(seconds: float) -> str:
    """Return seconds as people say them: 3.2 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: 1 file, 1,200 files."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def percent(share: float) -> str:
    """Return a share in [0, 1] in percent: 14.1 %."""
    return f"{100 * share:.1f} %"


def plain(value: object) -> str:
    """Return a number or text short enough for a table: 4 significant digits, 1,000s separated."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
