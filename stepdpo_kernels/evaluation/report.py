"""What came of a run, to look at: `report.md`, `report.html`, and the numbers in `metrics.json`."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from stepdpo_kernels.evaluation.compare import Comparison, compare
from stepdpo_kernels.evaluation.documents import Block, Heading, Paragraph, Quoted, Table, to_html, to_markdown
from stepdpo_kernels.evaluation.metrics import Estimate, ItemScore, Row, Summary, summarise
from stepdpo_kernels.evaluation.run import Item, read_items, read_settings

REPORT_FILES = ("report.md", "report.html")
METRICS_FILE = "metrics.json"
SHOWN = 5  # wrong items in a report, and as many right ones
LONGEST = 6000  # characters of a text that is shown


@dataclass(frozen=True)
class Results:
    """What came of a run.

    settings:  what it was made with, what was counted and left out
    scores:    of every item, in order
    right, wrong:  a few items whose first sample is so or not, those with the smallest hashes of their ids: drawn at
                   random, yet always the same ones
    """

    folder: Path
    settings: dict[str, Any]
    scores: list[ItemScore]
    summary: Summary
    right: list[Item]
    wrong: list[Item]


def read_results(folder: str | PathLike[str], shown: int = SHOWN) -> Results:
    """Raises StepDPOError as `read_items` does, and for a run without items."""
    scores = []
    kept: dict[bool, list[tuple[int, int, Item]]] = {True: [], False: []}
    for number, item in enumerate(read_items(folder)):
        scores.append(item.score)
        key = -int.from_bytes(hashlib.sha256(item.id.encode()).digest()[:8])
        heap = kept[item.samples[0].verdict == "right"]
        heapq.heappush(heap, (key, -number, item))
        if len(heap) > shown:
            heapq.heappop(heap)
    right, wrong = ([item for *_, item in sorted(kept[is_right], reverse=True)] for is_right in (True, False))
    return Results(Path(folder), read_settings(folder), scores, summarise(scores), right, wrong)


def write_report(results: Results, other: Results | None = None) -> tuple[Path, ...]:
    """Writes the reports and the numbers into the run's folder, each wholly or not at all.

    other: another run, to compare with. Raises StepDPOError where it is on other items.
    """
    compared = compare(results.scores, other.scores) if other is not None else None
    title = f"{results.settings['title']}: {results.settings['generator']}"
    blocks = list(_blocks(results, other, compared))
    numbers: dict[str, Any] = {"settings": results.settings, **numbers_of(results.summary)}
    if other is not None and compared is not None:
        numbers["comparison"] = {"with": other.settings["generator"], **_plain(compared)}
    texts = {
        REPORT_FILES[0]: to_markdown(title, blocks),
        REPORT_FILES[1]: to_html(title, blocks),
        METRICS_FILE: json.dumps(numbers, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        new = results.folder / (name + ".new")
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        new.replace(results.folder / name)
    return tuple(results.folder / name for name in texts)


def numbers_of(summary: Summary) -> dict[str, Any]:
    """As JSON can hold it: nan is null."""
    return dict(_plain(summary))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---- words ----------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def points(value: float) -> str:
    """Of a standard error, in points of percent; "unknown" for nan."""
    return "unknown" if math.isnan(value) else f"{100 * value:.2f}"


def interval(found: Estimate) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def score_rows(summary: Summary) -> Iterator[tuple[str, Estimate]]:
    """The results of a run by name. Pass@1 is the mean over samples."""
    yield ("accuracy" if summary.samples == 1 else f"mean over {summary.samples} samples"), summary.accuracy
    if summary.majority is not None:
        yield f"maj@{summary.samples}", summary.majority
    for k, found in summary.pass_at.items():
        if k > 1:
            yield f"pass@{k}", found


def names_of(a: Results, b: Results) -> tuple[str, str]:
    """What two runs are called: their models, or their folders where it is one model."""
    models = str(a.settings["generator"]), str(b.settings["generator"])
    return models if models[0] != models[1] else (str(a.folder), str(b.folder))


def verdict_words(compared: Comparison, a: str, b: str) -> str:
    """One sentence about a comparison."""
    gained = compared.difference
    change = f"{100 * gained.value:+.1f} points (standard error {points(gained.standard_error)})"
    test = "McNemar's exact test" if compared.test == "McNemar" else "exact sign test"
    return (
        f"{a} against {b} on the same {compared.items:,} items: {change}; better on {compared.better:,}, worse on "
        f"{compared.worse:,}; {test}, two-sided: p = {compared.p_value:.3g}."
    )


def _blocks(results: Results, other: Results | None, compared: Comparison | None) -> Iterator[Block]:
    summary, settings = results.summary, results.settings
    accuracy = summary.accuracy
    of = f"{summary.items:,} items" + (f", {summary.samples} samples each" if summary.samples > 1 else "")
    yield Paragraph(
        f"Accuracy {percent(accuracy.value)}, standard error {points(accuracy.standard_error)} points, 95% interval "
        f"{interval(accuracy)}, on {of}.",
        bold=True,
    )
    if other is not None and compared is not None:
        yield Heading("Comparison")
        names = names_of(results, other)
        yield Paragraph(verdict_words(compared, *names))
        rows = [
            (name, percent(found.value), points(found.standard_error), interval(found))
            for name, found in zip(names, (compared.a, compared.b), strict=True)
        ]
        gained = compared.difference
        difference = (f"{100 * gained.value:+.1f}", points(gained.standard_error), interval(gained))
        yield Table(("", "accuracy", "standard error", "95% interval"), [*rows, ("difference", *difference)])
    yield Heading("Results")
    yield Table(
        ("", "value", "standard error", "95% interval"),
        [(name, percent(f.value), points(f.standard_error), interval(f)) for name, f in score_rows(summary)],
    )
    yield Table(("share of samples", ""), list(_shares(results)))
    if summary.samples > 1:
        yield Paragraph(
            "The items are the clusters of the standard errors. maj@n counts 1/t where the right answer is one of t "
            "with most votes."
        )
    for words, rows_ in (("By subject", summary.subjects), ("By level", summary.levels)):
        if rows_:
            yield Heading(words)
            yield table_of(rows_)
    for words, kind, items in (("Not right", "wrong", results.wrong), ("Right", "right", results.right)):
        if items:
            yield Heading(f"{words}: some items, drawn at random")
            for item in items:
                yield _quoted(item, kind, settings["beginning"])
    yield Heading("Settings")
    yield Table(("setting", "value"), list(_settings(settings)))


def table_of(rows: Sequence[Row]) -> Table:
    header = ("", "items", "accuracy", "standard error", "unfinished", "no answer")
    return Table(
        header,
        [
            (
                row.name,
                f"{row.items:,}",
                percent(row.accuracy.value),
                points(row.accuracy.standard_error),
                percent(row.unfinished),
                percent(row.no_answer),
            )
            for row in rows
        ],
    )


def _shares(results: Results) -> Iterator[tuple[str, str]]:
    summary = results.summary
    most = results.settings["sampling"]["max_new_tokens"]
    yield f"unfinished: cut off at {most:,} tokens, counted as not right", percent(summary.unfinished)
    yield "ended without an answer", percent(summary.no_answer)
    if summary.failed:
        yield "failed: the model gave nothing, counted as not right", percent(summary.failed)


def _quoted(item: Item, kind: str, beginning: str) -> Quoted:
    sample = item.samples[0]
    found = "no answer" if sample.prediction is None else f"answered {sample.prediction}"
    if sample.verdict in ("unfinished", "failed"):
        found = sample.verdict
    texts = [("Problem", item.prompt), ("Right answer", item.answer), ("Solution", beginning + sample.text)]
    return Quoted(f"{item.id}: {found}, right is {item.answer}", [(name, _cut(text)) for name, text in texts], kind)


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sampling = settings["sampling"]
    for name, value in settings.items():
        if name in ("counts", "title"):
            continue
        if name == "sampling":
            draw = "greedy" if sampling["temperature"] == 0 else f"temperature {sampling['temperature']}"
            nucleus = "" if sampling["temperature"] == 0 else f", top-p {sampling['top_p']}, seed {sampling['seed']}"
            yield "samples of each item", f"{sampling['n']}, {draw}{nucleus}"
            yield "most tokens of a sample", f"{sampling['max_new_tokens']:,}"
        elif name == "skipped":
            for reason, count in value.items():
                yield f"left out: {reason}", f"{count:,}"
        elif value not in (None, ""):
            yield name, value if isinstance(value, str) and "\n" not in value else json.dumps(value)
    for name, count in settings["counts"].items():
        if name.startswith("compared in vain"):
            yield name, f"{count:,}"
