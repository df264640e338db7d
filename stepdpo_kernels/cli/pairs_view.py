"""Step pairs as a person wants to read them: the problem, the earlier steps, the two steps side by side."""

from __future__ import annotations

import html
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from stepdpo_kernels._errors import StepDPOError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stepdpo_kernels.data.records import StepRecord
    from stepdpo_kernels.types import StepPair

LONG = 1500  # characters of a text; the rest is folded, or left out in a terminal
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Sort(StrEnum):
    FILE = "file"
    RANDOM = "random"
    MARGIN = "margin"


@dataclass(frozen=True)
class Step:
    """text: of the step; tokens: each with its log-prob, empty without a model; logp: their sum."""

    text: str
    tokens: tuple[tuple[str, float], ...] = ()
    logp: float | None = None


@dataclass(frozen=True)
class View:
    """One pair. boundary: the last tokens of the prefix, as text, where a tokenizer is known."""

    id: str
    group: str
    prompt: str
    before: str
    chosen: Step
    rejected: Step
    boundary: tuple[str, ...] = ()

    @property
    def margin(self) -> float | None:
        """Log-prob of the chosen step less that of the rejected one."""
        if self.chosen.logp is None or self.rejected.logp is None:
            return None
        return self.chosen.logp - self.rejected.logp


def read_records(data: str, unit: str, limit: int | None) -> list[StepRecord]:
    """The records of the first `limit` lines. Raises StepDPOError for one that is malformed."""
    from stepdpo_kernels.data.records import check_record
    from stepdpo_kernels.data.sources import open_source

    return [check_record(raw, unit) for raw in islice(open_source(data, "train").records, limit)]


def views_of(
    records: Sequence[StepRecord],
    pairs: Sequence[StepPair] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    logps: dict[str, tuple[list[float], list[float]]] | None = None,
) -> list[View]:
    """pairs: those that the records became, which alone are shown where there are some; logps: of their tokens."""
    found = {pair.id: pair for pair in pairs}
    views = []
    for record in records:
        pair = found.get(record.id)
        if pairs and pair is None:
            continue
        chosen, rejected = Step(record.chosen), Step(record.rejected)
        boundary: tuple[str, ...] = ()
        if pair is not None and tokenizer is not None:
            boundary = tuple(_decode(tokenizer, [i]) for i in pair.prefix_ids[-4:].tolist())
            if logps is not None:
                of_chosen, of_rejected = logps[pair.id]
                chosen = _scored(tokenizer, pair.chosen_ids.tolist(), of_chosen, record.chosen)
                rejected = _scored(tokenizer, pair.rejected_ids.tolist(), of_rejected, record.rejected)
        before = record.initial_reason_steps
        views.append(View(record.id, record.group, record.prompt, before, chosen, rejected, boundary))
    return views


def _scored(tokenizer: PreTrainedTokenizerBase, ids: list[int], values: list[float], text: str) -> Step:
    return Step(text, tuple((_decode(tokenizer, [i]), v) for i, v in zip(ids, values, strict=True)), sum(values))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def token_logps(
    model: PreTrainedModel, pairs: Sequence[StepPair], max_tokens: int = 8192
) -> dict[str, tuple[list[float], list[float]]]:
    """Log-probs in nats of the tokens of both steps of each pair, by its id, from packed forests."""
    import torch

    from stepdpo_kernels.model import head_options, packed_forward
    from stepdpo_kernels.ops.linear_logprob import linear_logprob
    from stepdpo_kernels.packing import pack_pairs, tokens_of_pair

    head = model.get_output_embeddings()
    options = head_options(model)
    budget = max([max_tokens, *(tokens_of_pair(pair, "tree") for pair in pairs)])
    result: dict[str, tuple[list[float], list[float]]] = {}
    model.eval()
    with torch.no_grad():
        for batch in pack_pairs(pairs, budget):
            batch = batch.to(model.device)
            hidden = packed_forward(model, batch)[batch.rows.index]
            values = linear_logprob(hidden, head.weight, batch.targets, bias=getattr(head, "bias", None), **options)
            values = values.cpu()
            branches = values[batch.branches.index.cpu()].split(batch.branches.lengths.tolist())
            for id_, chosen, rejected in zip(
                batch.pair_ids, batch.chosen.tolist(), batch.rejected.tolist(), strict=True
            ):
                result[id_] = (branches[chosen].tolist(), branches[rejected].tolist())
    return result


def choose(views: Sequence[View], count: int, sort: Sort, ids: str | None = None, seed: int = 0) -> list[View]:
    """Which are shown: those of the ids, or the first `count` in the order asked for.

    sort: "margin" puts those first that the model gets most wrong
    Raises StepDPOError for an id that is not there, and for margins without a model.
    """
    if ids is not None:
        known = {view.id: view for view in views}
        wanted = [name.strip() for name in ids.split(",") if name.strip()]
        for name in wanted:
            if name not in known:
                raise StepDPOError(f"--ids: there is no pair {name!r} among the {len(known)} that were read")
        return [known[name] for name in wanted]
    views = list(views)
    if sort is Sort.MARGIN:
        if any(view.margin is None for view in views):
            raise StepDPOError("--sort margin: margins need --model")
        views.sort(key=lambda view: view.margin or 0.0)
    elif sort is Sort.RANDOM:
        random.Random(seed).shuffle(views)
    return views[:count]


# ---- terminal -----------------------------------------------------------------------------------------------------


def print_views(console: Console, views: Sequence[View]) -> None:
    """Each pair with its steps side by side, or one below the other where the terminal is narrow."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.text import Text

    for number, view in enumerate(views, start=1):
        console.print()
        console.print(Rule(Text(f"{number}  {_plain(view.id)}", style="bold"), align="left"))
        console.print(Text(_plain(view.prompt), style="bold"))
        console.print(Text(_plain(view.before), style="dim"))
        if view.boundary:
            tokens = " ".join(repr(token) for token in view.boundary)
            console.print(Text(f"{_plain(tokens)} ┃ the steps begin here", style="dim italic"))
        width = max(30, (console.width - 2) // 2)
        panels = [
            Panel(
                _terminal(step),
                title=_title(name, step),
                border_style=colour,
                width=width if console.width > 80 else None,
            )
            for name, step, colour in (("chosen", view.chosen, "green"), ("rejected", view.rejected, "red"))
        ]
        console.print(Columns(panels, padding=0) if console.width > 80 else panels[0])
        if console.width <= 80:
            console.print(panels[1])
        if view.margin is not None:
            likelier = "chosen" if view.margin > 0 else "rejected"
            console.print(Text(f"margin {view.margin:+.3f} nats: the model finds the {likelier} step likelier"))


def _title(name: str, step: Step) -> str:
    return name if step.logp is None else f"{name}, log-prob {step.logp:.3f}, {len(step.tokens)} tokens"


def _terminal(step: Step) -> Text:
    from rich.text import Text

    if not step.tokens:
        return Text(_plain(step.text))
    text = Text()
    for token, logp in step.tokens:
        text.append(_plain(token), style="" if logp > -1 else "yellow" if logp > -4 else "bold red")
    return text


def _plain(text: str) -> str:
    """Without what would move the cursor or turn the writing round, and not longer than fits a screen."""
    text = CONTROL.sub("�", text.replace("\r\n", "\n"))
    return text if len(text) <= LONG else f"{text[:LONG]} ... ({len(text) - LONG:,} more characters)"


# ---- HTML ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #2a7d3f; --bad: #b3362b; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid var(--line); margin: 2rem 0; padding-top: 1rem; }
h2 { font-size: 1rem; overflow-wrap: anywhere; } h3 { font-size: .9rem; margin: .2rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: .4rem 0; unicode-bidi: isolate; }
.before { opacity: .75; border-left: 3px solid var(--line); padding-left: .8rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.two > section { border: 1px solid var(--line); border-top: 4px solid; border-radius: .4rem; padding: .6rem .8rem; }
.chosen { border-top-color: var(--good) !important; } .rejected { border-top-color: var(--bad) !important; }
.facts { font-size: .85rem; opacity: .8; } .boundary { border-left: 2px solid currentColor; padding-left: .1rem; }
.t { border-radius: .15rem; } code { overflow-wrap: anywhere; }
"""


def html_page(views: Sequence[View], source: str, model: str | None) -> str:
    """One file that needs no other: every text escaped, long ones folded, light and dark."""
    words = f"{len(views)} of the pairs in {_escape(source)}"
    words += f", log-probs under {_escape(model)}" if model else ""
    legend = "<p class=facts>The redder a token, the less likely the model finds it.</p>" if model else ""
    body = "\n".join(_article(number, view) for number, view in enumerate(views, start=1))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Step pairs</title><style>{STYLE}</style></head>\n<body><h1>Step pairs</h1><p>{words}</p>{legend}\n"
        f"{body}\n</body></html>\n"
    )


def _article(number: int, view: View) -> str:
    margin = ""
    if view.margin is not None:
        likelier = "chosen" if view.margin > 0 else "rejected"
        margin = f"<p class=facts>margin {view.margin:+.3f} nats: the model finds the {likelier} step likelier</p>"
    boundary = ""
    if view.boundary:
        tokens = " ".join(f"<code>{_escape(repr(token))}</code>" for token in view.boundary)
        boundary = f"<p class=facts>{tokens} <span class=boundary>the steps begin here</span></p>"
    steps = "".join(
        f"<section class={name}><h3>{name}</h3>{_facts(step)}{_step(step)}</section>"
        for name, step in (("chosen", view.chosen), ("rejected", view.rejected))
    )
    return (
        f"<article><h2>{number}. {_escape(view.id)}</h2><p class=facts>group {_escape(view.group)}</p>"
        f"{_folded(view.prompt)}<div class=before>{_folded(view.before)}</div>{boundary}"
        f"<div class=two>{steps}</div>{margin}</article>"
    )


def _facts(step: Step) -> str:
    if step.logp is None:
        return ""
    return f"<p class=facts>log-prob {step.logp:.3f} nats over {len(step.tokens)} tokens</p>"


def _step(step: Step) -> str:
    if not step.tokens:
        return _folded(step.text)
    spans = [
        f"<span class=t title='{logp:.3f}' style='background:rgb(220 60 40 / {min(0.6, -logp / 12):.2f})'>"
        f"{_escape(token)}</span>"
        for token, logp in step.tokens
    ]
    return _fold("".join(spans[:400]), "".join(spans[400:]), f"{len(spans) - 400:,} more tokens")


def _folded(text: str) -> str:
    return _fold(_escape(text[:LONG]), _escape(text[LONG:]), f"{len(text) - LONG:,} more characters")


def _fold(shown: str, rest: str, words: str) -> str:
    more = f"<details><summary>{words}</summary><pre>{rest}</pre></details>" if rest else ""
    return f"<pre dir=auto>{shown}</pre>{more}"


def _escape(text: str) -> str:
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")))


def write_whole(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")
    new.replace(path)
