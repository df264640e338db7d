"""A document of headings, paragraphs, tables and quoted texts, as Markdown and as a page of HTML.

Texts are a model's or a data set's: everything is escaped, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """header: its cells; rows: cells of each, the first of them a name, the others mostly numbers"""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Quoted:
    """Texts as they are, each under a name, folded under a title. kind: "right", "wrong" or "" for neither."""

    title: str
    texts: Sequence[tuple[str, str]]
    kind: str = ""


Block = Heading | Paragraph | Table | Quoted


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    return "\n\n".join([f"# {_escaped(title)}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {_escaped(block.text)}"
    if isinstance(block, Paragraph):
        return f"**{_escaped(block.text)}**" if block.bold else _escaped(block.text)
    if isinstance(block, Table):
        lines = [list(map(_escaped, row)) for row in (block.header, *block.rows)]
        lines.insert(1, ["---"] + ["---:"] * (len(block.header) - 1))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [f"### {_escaped(block.title)}"]
    for name, text in block.texts:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
        parts.append(f"{_escaped(name)}:\n\n{fence}text\n{text}\n{fence}")
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """One line of plain words. Dots and dashes are left alone: no line begins with a cell or a name of ours."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae1; --soft: #f4f6f8;
  --right: #0072b2; --wrong: #c04a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15181c; --line: #363c44; --soft: #1e2329;
  --right: #6cb8e6; --wrong: #f0975a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
details { border: 1px solid var(--line); border-left: 4px solid var(--line); border-radius: 4px; margin: .6rem 0;
  padding: .4rem .8rem; }
details.right { border-left-color: var(--right); } details.wrong { border-left-color: var(--wrong); }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: 4px;
  font: 14px/1.45 ui-monospace, monospace; }
.name { margin: .6rem 0 .2rem; font-size: .85rem; opacity: .8; }
"""


def to_html(title: str, blocks: Iterable[Block]) -> str:
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *map(_html, blocks)])
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Paragraph):
        text = html.escape(block.text)
        return f"<p><strong>{text}</strong></p>" if block.bold else f"<p>{text}</p>"
    if isinstance(block, Table):
        rows = [_cells("th", block.header), *(_cells("td", row) for row in block.rows)]
        return '<div class="table"><table>\n' + "\n".join(rows) + "\n</table></div>"
    texts = "".join(
        f'<div class="name">{html.escape(name)}</div><pre>{html.escape(text)}</pre>' for name, text in block.texts
    )
    return f'<details class="{block.kind}"><summary>{html.escape(block.title)}</summary>{texts}</details>'


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
