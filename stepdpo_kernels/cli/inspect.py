"""`stepdpo inspect`: what is in a file of step pairs, what sharing saves on it, and what a packed batch looks like.

The pairs themselves are shown by `pairs_view.py`, a batch is drawn by `picture.py`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from stepdpo_kernels.cli.pairs_view import (
    Sort,
    View,
    choose,
    html_page,
    print_views,
    read_records,
    token_logps,
    views_of,
    write_whole,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from stepdpo_kernels.data import LoadReport
    from stepdpo_kernels.types import StepPair

HTML_PAIRS = 100  # where --show names no number
PADDED = 8  # pairs of a padded batch to compare with
COLOURS = {"prefix": "dim", "chosen": "green", "rejected": "red"}


class Share(StrEnum):
    TREE = "tree"
    PAIR = "pair"
    NONE = "none"


class Boundary(StrEnum):
    JOINT = "joint"
    SEPARATE = "separate"


class Unit(StrEnum):
    STEP = "step"
    SOLUTION = "solution"


class Cost(NamedTuple):
    """What one way of laying out all pairs takes.

    tokens:   tokens that are encoded, padding included
    batches:  how many batches they fill
    fill:     real tokens as a share of the room in those batches
    rows:     loss rows, R
    """

    tokens: int
    batches: int
    fill: float
    rows: int


def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSONL, JSON, Parquet, a folder of these, or a hub id.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub id with the tokenizer of the model to train.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="Prompt format: chat, alpaca, deepseek-math, qwen2-boxed or none.")
    ] = "chat",
    boundary: Annotated[Boundary, typer.Option(help="How a step is cut from its prefix.")] = Boundary.JOINT,
    unit: Annotated[Unit, typer.Option(help="What is preferred: a step, or a whole solution (DPO).")] = Unit.STEP,
    max_length: Annotated[
        int, typer.Option(help="Longest prefix and step in tokens; longer pairs are left out.")
    ] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Budget of a packed batch in tokens.")] = 8192,
    share: Annotated[
        Share, typer.Option(help="Which prefixes are encoded once, in optimiser steps and in the picture.")
    ] = Share.TREE,
    pairs_per_step: Annotated[int, typer.Option(min=1, help="Pairs of an optimiser step, over all processes.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Read only the first so many records.")] = None,
    output: Annotated[Path | None, typer.Option(help="Draw a packed batch to this PNG file.")] = None,
    pairs: Annotated[
        int, typer.Option(min=1, max=32, help="How many pairs to draw, at most: those of one problem.")
    ] = 4,
    show: Annotated[int, typer.Option(min=0, help="Print so many pairs, their steps side by side.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write pairs to this HTML file: --show many, or 100.")] = None,
    ids: Annotated[str | None, typer.Option(help="Show these pairs: ids with commas between them.")] = None,
    sort: Annotated[
        Sort, typer.Option(help="Which pairs are shown first: margin begins with what the model gets most wrong.")
    ] = Sort.FILE,
    seed: Annotated[int, typer.Option(help="Of --sort random.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Show the log-prob of every token under this model: folder, GGUF or hub id.")
    ] = None,
) -> None:
    """Print what is in step pairs, what would be left out and why, and what sharing prefixes saves; show pairs."""
    from stepdpo_kernels.data import load_step_pairs
    from stepdpo_kernels.types import StepDPOError

    tokenizer = tokenizer or model
    shown = Shown(show, html, ids, sort, seed)
    if html is not None:
        _check_output(html, ".html")
    if tokenizer is None and shown.wanted:
        _show(shown, views_of(read_records(data, unit.value, limit)), data, None)
        return
    if tokenizer is None:
        raise StepDPOError(
            "stepdpo inspect: lengths are counted in tokens, so --tokenizer is needed: "
            "the folder or hub id of the model that you want to train (--show and --html do without it)"
        )
    if output is not None:
        _check_output(output, ".png")

    from rich.console import Console

    from stepdpo_kernels.trainer import load_model, load_tokenizer

    console = Console(highlight=False)
    tokens_of = load_tokenizer(tokenizer)
    with _quiet():  # the report is printed below
        dataset = load_step_pairs(
            data,
            tokens_of,
            template=template,
            boundary=boundary.value,
            unit=unit.value,
            max_length=max_length,
            max_tokens=max_tokens,
            limit=limit,
        )
    assert dataset.report is not None
    print_report(console, dataset.report)
    console.print(lengths_table(dataset))
    costs = sharing_costs(dataset, max_tokens)
    in_steps = step_costs(dataset, max_tokens, share.value, pairs_per_step)
    console.print(sharing_table(costs | in_steps, dataset, max_tokens))
    print_verdict(console, costs, in_steps, share.value, pairs_per_step)
    if shown.wanted:
        logps = None if model is None else token_logps(load_model(model, "float32"), dataset, max_tokens)
        _show(shown, views_of(read_records(data, unit.value, limit), dataset, tokens_of, logps), data, model)
    else:
        print_pair(console, dataset[0], tokens_of)
    if output is not None:
        from stepdpo_kernels.cli.picture import draw
        from stepdpo_kernels.packing import build_batch

        chosen = pairs_to_draw(dataset, pairs)
        batch = build_batch(dataset, chosen, share.value)
        draw(batch, lambda ids: _decode(tokens_of, ids, skip_special_tokens=True), output)
        drawn = f"{len(chosen)} pair{'s' if len(chosen) > 1 else ''} of one problem"
        console.print(f"\nThe picture of {drawn} is in {output}", markup=False, soft_wrap=True)


class Shown(NamedTuple):
    """Which pairs are shown, and where: the options of the same names."""

    show: int
    html: Path | None
    ids: str | None
    sort: Sort
    seed: int

    @property
    def wanted(self) -> bool:
        return bool(self.show or self.html or self.ids)


def _show(shown: Shown, views: list[View], data: str, model: str | None) -> None:
    from rich.console import Console

    chosen = choose(views, shown.show or HTML_PAIRS, shown.sort, shown.ids, shown.seed)
    if shown.show or shown.ids:
        print_views(Console(highlight=False, markup=False), chosen)
    if shown.html is not None:
        write_whole(shown.html, html_page(chosen, data, model))
        typer.echo(f"\n{len(chosen)} pairs are in {shown.html}")


def _check_output(path: Path, suffix: str) -> None:
    from stepdpo_kernels.types import StepDPOError

    option = "--output" if suffix == ".png" else "--html"
    if path.suffix.lower() != suffix:
        what = "the picture is a PNG" if suffix == ".png" else "the page is HTML"
        raise StepDPOError(f"{option} {str(path)!r}: {what}, so the name must end in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise StepDPOError(f"{option} {str(path)!r}: {problem}; name a file in a folder that exists")


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("stepdpo_kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def print_report(console: Console, report: LoadReport) -> None:
    """Records read, kept and left out, with the first of each reason by name."""
    console.print(report.source, style="bold", markup=False, soft_wrap=True)
    console.print(f"  {report.records:,} records read, {report.kept:,} pairs kept")
    for reason, count in report.dropped.items():
        console.print(f"  {count:,} left out: {reason.replace('_', ' ')}", style="yellow")
        names = report.first[reason][:3]
        for name in (*names, f"and {count - len(names):,} more") if count > len(names) else names:
            console.print(f"    {name}", markup=False, soft_wrap=True)


def lengths_table(pairs: Sequence[StepPair]) -> Table:
    """Tokens of prefixes and steps, and how many pairs a problem has."""
    import numpy as np

    per_problem = Counter(pair.group or index for index, pair in enumerate(pairs))
    table = _table("length in tokens", "min", "median", "mean", "95%", "max")
    for name, values in (
        ("prefix", [pair.prefix_ids.size for pair in pairs]),
        ("chosen", [pair.chosen_ids.size for pair in pairs]),
        ("rejected", [pair.rejected_ids.size for pair in pairs]),
        ("pairs of a problem", list(per_problem.values())),
    ):
        median, high = np.percentile(values, [50, 95])
        numbers = (f"{min(values):,}", f"{median:,.0f}", f"{np.mean(values):,.1f}", f"{high:,.0f}", f"{max(values):,}")
        table.add_row(name, *numbers, end_section=name == "rejected")
    return table


def sharing_costs(pairs: Sequence[StepPair], max_tokens: int) -> dict[str, Cost]:
    """Cost of padded batches ("padded") and of packing with each `share`, all branches of all pairs encoded.

    Padded batches hold 8 pairs drawn at random (seed 0), each branch with its own prefix. A pair whose two branches
    exceed `max_tokens` where nothing is shared gets a batch of its own.
    """
    import numpy as np

    from stepdpo_kernels.packing import padded_tokens

    order = np.random.default_rng(0).permutation(len(pairs))
    padded = padded_tokens([pairs[i] for i in order], PADDED)
    steps = sum(pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs)
    costs = {"padded": Cost(padded, -(-len(pairs) // PADDED), unshared_tokens(pairs) / padded, steps)}
    return costs | {share: packed_cost([pairs], max_tokens, share) for share in ("none", "pair", "tree")}


def packed_cost(steps: Sequence[Sequence[StepPair]], max_tokens: int, share: str) -> Cost:
    """Cost of packing each step on its own; a pair over the budget gets a batch of its own."""
    from stepdpo_kernels.packing import pack_pairs, savings, tokens_of_pair

    batches = []
    for pairs in steps:
        sizes = [tokens_of_pair(pair, share) for pair in pairs]
        fitting = [p for p, size in zip(pairs, sizes, strict=True) if size <= max_tokens]
        batches += pack_pairs(fitting, max_tokens, share=share)
        for pair, size in zip(pairs, sizes, strict=True):
            if size > max_tokens:
                batches += pack_pairs([pair], size, share=share)
    total = savings(batches)
    room = sum(max(batch.num_tokens, max_tokens) for batch in batches)
    return Cost(int(total["tokens"]), len(batches), total["tokens"] / room, int(total["rows"]))


def step_costs(pairs: Sequence[StepPair], max_tokens: int, share: str, pairs_per_step: int) -> dict[str, Cost]:
    """Cost of the optimiser steps of an epoch (seed 0), "shuffle"d or "grouped" by problem."""
    from stepdpo_kernels.packing import SAMPLING_MODES, epoch_order

    costs = {}
    for sampling in SAMPLING_MODES:
        order = epoch_order(pairs, 0, sampling, pairs_per_step=pairs_per_step)
        steps = [[pairs[i] for i in order[at : at + pairs_per_step]] for at in range(0, len(order), pairs_per_step)]
        costs[sampling] = packed_cost(steps, max_tokens, share)
    return costs


def unshared_tokens(pairs: Sequence[StepPair]) -> int:
    """Tokens of all branches, each with its own prefix, without padding."""
    return sum(2 * pair.prefix_ids.size + pair.chosen_ids.size + pair.rejected_ids.size for pair in pairs)


def sharing_table(costs: dict[str, Cost], pairs: Sequence[StepPair], max_tokens: int) -> Table:
    """What each layout takes, against the tokens of all branches on their own."""
    unshared = unshared_tokens(pairs)
    table = _table("share", "tokens", "batches", "fill", "fewer", "loss rows", "of all")
    table.caption = (
        f"All branches, each on its own, have {unshared:,} tokens. Packed batches hold at most {max_tokens:,}; share: "
        "what is encoded once, with all pairs at hand; steps: what training packs; fill: tokens over room; fewer: "
        "unshared tokens over tokens; loss rows: the tokens to predict; of all: loss rows over unshared tokens."
    )
    names = {"padded": f"{PADDED} pairs, padded", "shuffle": "steps, shuffled", "grouped": "steps, by problem"}
    for share, cost in costs.items():
        table.add_row(
            names.get(share, share),
            f"{cost.tokens:,}",
            f"{cost.batches:,}",
            f"{cost.fill:.1%}",
            f"{unshared / cost.tokens:.2f}×",
            f"{cost.rows:,}",
            f"{cost.rows / unshared:.1%}",
            end_section=share in ("padded", "tree"),
        )
    return table


def print_verdict(
    console: Console, costs: dict[str, Cost], in_steps: dict[str, Cost], share: str, pairs_per_step: int
) -> None:
    """What an epoch of training encodes, against other layouts of the same pairs."""
    shuffled, grouped = in_steps["shuffle"], in_steps["grouped"]
    others = {f"padded batches of {PADDED} pairs": "padded", "no padding": "none", "sharing within pairs": "pair"}
    compared = ", ".join(
        f"{costs[name].tokens / shuffled.tokens:.1f}× fewer than with {words}"
        for words, name in others.items()
        if name != share
    )
    console.print(
        f"Packed with share={share} in shuffled steps of {pairs_per_step} pairs, an epoch encodes "
        f"{shuffled.tokens:,} tokens in {shuffled.batches:,} batch{'es' if shuffled.batches > 1 else ''}: {compared}.",
        style="bold",
        markup=False,
    )
    if grouped.tokens < shuffled.tokens:
        console.print(
            f"With train_sampling_strategy=grouped, problem by problem, {grouped.tokens:,} in {grouped.batches:,}: "
            f"{shuffled.tokens / grouped.tokens:.1f}× fewer again, but other steps than plain shuffling draws.",
            markup=False,
        )


def print_pair(console: Console, pair: StepPair, tokenizer: PreTrainedTokenizerBase) -> None:
    """The pair decoded, and the tokens on both sides of the boundary one by one."""
    from rich.text import Text

    console.print(Text(f"\nThe first pair, {pair.id}", style="bold"))
    for name in ("prefix", "chosen", "rejected"):
        ids = getattr(pair, f"{name}_ids").tolist()
        console.print(Text(f"\n{name}, {len(ids)} tokens", style=f"bold {COLOURS[name]}"))
        console.print(Text(_decode(tokenizer, ids), style=COLOURS[name]))
    console.print(Text("\nAt the boundary, token by token", style="bold"))
    for name in ("chosen", "rejected"):
        before, after = pair.prefix_ids[-4:].tolist(), getattr(pair, f"{name}_ids")[:4].tolist()
        line = _tokens(tokenizer, before, "prefix")
        console.print(line.append(" ┃ ", style="bold").append_text(_tokens(tokenizer, after, name)))


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], name: str) -> Text:
    from rich.text import Text

    return Text(" ").join(Text(repr(_decode(tokenizer, [i])), style=COLOURS[name]) for i in ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


def _table(first: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", header_style="bold", padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def pairs_to_draw(pairs: Sequence[StepPair], most: int) -> list[int]:
    """Indices of at most so many pairs of one problem: where steps nest most and, of those, the shortest.

    Within a problem, pairs that begin after different steps come before pairs that begin where another does.
    """
    groups: dict[str | int, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.group or index, []).append(index)

    def selection(members: list[int]) -> list[int]:
        seen: Counter[bytes] = Counter()
        rounds = []
        for index in sorted(members, key=lambda i: (pairs[i].prefix_ids.size, i)):
            key = pairs[index].prefix_ids.tobytes()
            rounds.append((seen[key], index))
            seen[key] += 1
        return sorted(index for _, index in sorted(rounds)[:most])

    def rank(members: list[int]) -> tuple[int, int, int]:
        depths = len({pairs[i].prefix_ids.tobytes() for i in members})
        return -len(members), -depths, sum(pairs[i].prefix_ids.size for i in members)

    return min((selection(members) for members in groups.values()), key=lambda members: (rank(members), members))
