"""The HTML page of a run: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root{color-scheme:light dark;
--page:#f4f5f7;--card:#ffffff;--ink:#1b1e24;--muted:#5b626e;--grid:#d9dce2;--note:#fff4d6;
--note-edge:#b07900;--s1:#0072b2;--s2:#c24e00;--s3:#00806a;--s4:#a5478a;--s5:#8a6d00;--s6:#4f5d75}
@media (prefers-color-scheme:dark){:root{
--page:#14161a;--card:#1d2026;--ink:#e9ebef;--muted:#a4abb8;--grid:#3a3f49;--note:#3a2f12;
--note-edge:#e0a92e;--s1:#5ab4ea;--s2:#ff9350;--s3:#35c4a2;--s4:#e292c8;--s5:#e0bd3a;--s6:#b3bfd6}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.45;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header{max-width:1040px;margin:0 auto;padding:0 16px}
header{padding-top:24px}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:32px 0 12px}
p{margin:4px 0 0}
.sub{color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(47%,150px),1fr));gap:12px;
margin:20px 0 0;padding:0}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:10px 12px;
display:flex;flex-direction:column}
.tile dt{color:var(--muted);font-size:.82rem;order:2}
.tile dd{margin:0;font-size:1.3rem;font-weight:600;order:1;font-variant-numeric:tabular-nums}
.notes{list-style:none;margin:20px 0 0;padding:0;display:grid;gap:8px}
.notes li{background:var(--note);border-left:4px solid var(--note-edge);border-radius:6px;
padding:8px 12px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px;
align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;
padding:12px 14px;min-width:0}
figure h3{font-size:.98rem;margin:0 0 6px}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:inherit!important}
figcaption{color:var(--muted);font-size:.86rem;margin-top:6px}
details{margin-top:8px;font-size:.86rem}
summary{cursor:pointer;color:var(--muted)}
.scroll{overflow-x:auto;max-height:340px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-top:6px}
th,td{padding:2px 10px 2px 0;text-align:right;white-space:nowrap}
th{font-weight:600;color:var(--muted)}
th:first-child,td:first-child{text-align:left}
footer{color:var(--muted);font-size:.84rem;max-width:1040px;margin:32px auto;padding:0 16px}
"""


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure: a head, and rows of cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Card:
    """A figure of the page.

    Attributes:
        title: Its heading.
        caption: What it shows and how to read it.
        svg: The figure.
        table: Its numbers.
    """

    title: str
    caption: str
    svg: str
    table: Table | None = None


def page(
    title: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    notes: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Card]]],
    footer: str,
) -> str:
    """The whole page.

    Args:
        title: Of the run.
        subtitle: What kind of run it is.
        tiles: Labels and values of the numbers on top.
        notes: What the reader should know about.
        sections: Headings with figures.
        footer: How the page came about.
    """
    shown = [(heading, cards) for heading, cards in sections if cards]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f'<header><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p></header><main>',
    ]
    if tiles:
        parts.append('<dl class="tiles">')
        parts += [
            f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'
            for label, value in tiles
        ]
        parts.append("</dl>")
    if notes:
        parts.append('<ul class="notes">')
        parts += [f"<li>{escape(note)}</li>" for note in notes]
        parts.append("</ul>")
    for heading, cards in shown:
        parts.append(f'<section><h2>{escape(heading)}</h2><div class="figures">')
        parts += map(_card, cards)
        parts.append("</div></section>")
    parts.append(f"</main><footer>{escape(footer)}</footer></body></html>")
    return "\n".join(parts) + "\n"


def _card(card: Card) -> str:
    table = "" if card.table is None else _table(card.table)
    return (
        f"<figure><h3>{escape(card.title)}</h3>{card.svg}"
        f"<figcaption>{escape(card.caption)}</figcaption>{table}</figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        '<details><summary>Numbers</summary><div class="scroll" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
