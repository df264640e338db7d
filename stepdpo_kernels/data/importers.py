r"""Step pairs out of what other people have, as records of the released schema (see `pipeline/rectify.py`).

    prm800k      rows of PRM800K in its native format (Lightman et al. 2023, arXiv 2305.20050; openai/prm800k).
                 At a step where one completion has rating +1 and another -1 after the same earlier steps, each such two
                 make a pair; a step that the labeler wrote counts as +1. Rating 0, no rating and flagged completions
                 are left out. The steps before are those that the labeler chose, up to one that is not right. Quality
                 control, screening and broken problems are left out
    step-dpo     Math-Step-DPO-10K as it is distributed: a line break is put before a "Step 1:" that has none, a space
                 before a step that has none, and the initial steps are taken off a `full_chosen` that repeats them
    preference   `prompt`, `chosen`, `rejected` as text or as messages (TRL's formats, also without `prompt`): what the
                 two answers have in common are whole steps at their beginning; the first that differ are the pair

What is irregular is counted by name, and so is what is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice, product
from os import PathLike
from typing import Any, NamedTuple

from stepdpo_kernels.data.pipeline.stage import Chunk, StageReport, run_stage, stage_input
from stepdpo_kernels.data.records import UNITS, RawRecord, check_record, shorten
from stepdpo_kernels.data.steps import StepFormat
from stepdpo_kernels.types import StepDPOError

OPENING = "Let's think step by step."
LAST_MARKER = re.compile(r"Step (\d+):\s*\Z")
BROKEN = re.compile(r"(?m)^[ \t]*Step 1:")
UNBROKEN = re.compile(r"(?<=\S)[ \t]*(Step 1:)")
KEPT = ("dataset", "id", "group", "weight", "chosen_logp", "rejected_logp")
CHUNK = 256


class _Row(NamedTuple):
    id: str
    where: str
    value: dict[str, Any]


class _Made(NamedTuple):
    """records, without `id` and `dataset`; counts: what was irregular, or why there are none"""

    records: list[dict[str, Any]]
    counts: Counter[str]


def import_pairs(
    source: str | PathLike[str],
    output: str | PathLike[str],
    format: str,
    *,
    steps: StepFormat | None = None,
    max_pairs: int | None = None,
    split: str = "train",
    limit: int | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Writes the step pairs of a file, folder or hub dataset as JSON lines, one row after the other.

    format:     "prm800k", "step-dpo", "preference"
    steps:      for preferences: how answers are cut into steps
    max_pairs:  for prm800k: at most so many pairs of a step; None for all
    The rest is as in `run_stage`, which also says what is raised: rows that lack what their format has are bad records.
    """
    if format not in FORMATS:
        raise StepDPOError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if max_pairs is not None and max_pairs < 1:
        raise StepDPOError(f"max_pairs must be at least 1, got {max_pairs!r}")
    cut = steps or StepFormat()

    def work(rows: list[_Row]) -> Chunk:
        records, counts = [], Counter[str]()
        for row in rows:
            made = FORMATS[format](row, cut, max_pairs)
            counts.update(made.counts)
            for index, record in enumerate(made.records):
                id_ = row.id if format == "step-dpo" else f"{row.id}/{index}"
                records.append({"dataset": format, "id": id_, **record})
        return Chunk(records, counts)

    return run_stage(
        "import",
        stage_input(source, output, split, limit),
        output,
        settings={"format": format, "steps": asdict(cut), "max_pairs": max_pairs, "limit": limit},
        parse=lambda raw: _parse(raw, format),
        work=work,
        chunk=CHUNK,
        on_bad=on_bad,
        overwrite=overwrite,
        progress=progress,
    )


def _parse(raw: RawRecord, format: str) -> _Row:
    if not isinstance(raw.value, dict):
        raise StepDPOError(f"{raw.where}: a record must be an object, got {shorten(raw.value)}")
    row = _Row(_text(raw.value.get("id")) or raw.id, raw.where, raw.value)
    CHECKS[format](row)
    return row


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _pair(
    prompt: str, before: str, chosen: str, rejected: str, step: int, answer: str = "", **more: Any
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "initial_reason_steps": before,
        "chosen": chosen,
        "rejected": rejected,
        "full_chosen": "",
        "full_rejected": "",
        "answer": answer,
        "step_index": step,
        "chosen_logp": None,
        "rejected_logp": None,
    } | more


# ---- PRM800K ------------------------------------------------------------------------------------------------------


def _check_prm800k(row: _Row) -> None:
    question, label = row.value.get("question"), row.value.get("label")
    if not isinstance(question, dict) or not isinstance(question.get("problem"), str):
        raise StepDPOError(f"{row.where}: field 'question' must hold a 'problem', got {shorten(question)}")
    if not isinstance(label, dict) or not isinstance(label.get("steps"), list):
        raise StepDPOError(f"{row.where}: field 'label' must hold a list 'steps', got {shorten(label)}")
    for k, step in enumerate(label["steps"], start=1):
        completions = (step.get("completions") or []) if isinstance(step, dict) else None
        if not isinstance(completions, list):
            raise StepDPOError(f"{row.where}: step {k}: must hold a list 'completions', got {shorten(step)}")
        for completion in completions:
            if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
                raise StepDPOError(f"{row.where}: step {k}: a completion must hold a 'text', got {shorten(completion)}")
        chosen = step.get("chosen_completion")
        if chosen is not None and not (isinstance(chosen, int) and 0 <= chosen < len(completions)):
            raise StepDPOError(f"{row.where}: step {k}: field 'chosen_completion' is {shorten(chosen)}, which is none")


def _prm800k(row: _Row, steps: StepFormat, max_pairs: int | None) -> _Made:
    question, label = row.value["question"], row.value["label"]
    for field in ("is_quality_control_question", "is_initial_screening_question"):
        if row.value.get(field):
            return _Made([], Counter({"rows for quality control": 1}))
    if label.get("finish_reason") == "bad_problem":
        return _Made([], Counter({"broken problems": 1}))
    records, before = [], OPENING
    for k, step in enumerate(label["steps"], start=1):
        completions = step.get("completions") or []
        usable = [c for c in completions if not c.get("flagged") and c["text"].strip()]
        right = [c["text"].strip() for c in usable if c.get("rating") == 1]
        wrong = [c["text"].strip() for c in usable if c.get("rating") == -1]
        written = _human(step.get("human_completion"))
        right += [written] if written else []
        before += f"\nStep {k}:"
        both = product(dict.fromkeys(right), dict.fromkeys(wrong))
        records += [
            _pair(question["problem"], before, f" {a}", f" {b}", k, _text(question.get("ground_truth_answer")))
            for a, b in islice(((a, b) for a, b in both if a != b), max_pairs)
        ]
        chosen = step.get("chosen_completion")
        taken = written if chosen is None else completions[chosen]["text"].strip()
        if not taken or (chosen is not None and completions[chosen].get("rating") == -1):
            break
        before += f" {taken}"
    return _Made(records, Counter() if records else Counter({"rows without a pair": 1}))


def _human(completion: Any) -> str:
    text = completion.get("text") if isinstance(completion, dict) else completion
    return text.strip() if isinstance(text, str) else ""


# ---- Math-Step-DPO-10K --------------------------------------------------------------------------------------------


def _check_step_dpo(row: _Row) -> None:
    for unit in UNITS:
        check_record(RawRecord(row.where, row.id, row.value), unit)


def _step_dpo(row: _Row, steps: StepFormat, max_pairs: int | None) -> _Made:
    value, counts = row.value, Counter[str]()
    before = value["initial_reason_steps"]
    if not BROKEN.search(before):
        before = UNBROKEN.sub(r"\n\1", before, count=1)
    counts["no line break before Step 1"] += before != value["initial_reason_steps"]
    mark, markers = LAST_MARKER.search(before), re.findall(r"(?m)^[ \t]*Step (\d+):", before)
    counts["no marker at the end of the steps"] += mark is None
    counts["misnumbered markers"] += markers != [str(i) for i in range(1, len(markers) + 1)]
    texts = {}
    for name in ("chosen", "rejected"):
        text = value[name]
        bare = mark is not None and before.endswith(":") and text.strip() and not text[:1].isspace()
        counts["steps without a space before them"] += bool(bare)
        texts[name] = f" {text}" if bare else text
        full = value.get(f"full_{name}") or ""
        shorter = full.removeprefix(value["initial_reason_steps"])
        counts["solutions with the initial steps"] += shorter != full
        counts[f"no full_{name}"] += not full.strip()
        texts[f"full_{name}"] = f" {shorter}" if bare and shorter.strip() and not shorter[:1].isspace() else shorter
    answer = _text(value.get("answer"))
    record = _pair(value["prompt"], before, texts["chosen"], texts["rejected"], len(markers), answer)
    kept = {name: value[name] for name in KEPT if value.get(name) is not None}
    return _Made([record | texts | kept], +counts)


# ---- preferences --------------------------------------------------------------------------------------------------


def _check_preference(row: _Row) -> None:
    _texts(row)


def _texts(row: _Row) -> tuple[str, str, str] | str:
    """(prompt, chosen, rejected), or why the schema cannot hold them."""
    prompt, chosen, rejected = (row.value.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            raise StepDPOError(f"{row.where}: field 'prompt' must be text beside text, got {shorten(prompt)}")
        return prompt, chosen, rejected
    talks = [_messages(row, name, row.value.get(name)) for name in ("prompt", "chosen", "rejected")]
    if not talks[0]:  # the prompt is what both begin with
        shared = 0
        while shared < min(len(talks[1]), len(talks[2])) and talks[1][shared] == talks[2][shared]:
            shared += 1
        talks = [talks[1][:shared], talks[1][shared:], talks[2][shared:]]
    asked, one, other = talks
    if [role for role, _ in asked] != ["user"] or any([role for role, _ in t] != ["assistant"] for t in (one, other)):
        return "conversations of other than a question and an answer"
    return asked[0][1], one[0][1], other[0][1]


def _messages(row: _Row, name: str, value: Any) -> list[tuple[str, str]]:
    if value is None and name == "prompt":
        return []
    if isinstance(value, str):
        return [("user" if name == "prompt" else "assistant", value)]
    if not isinstance(value, list):
        raise StepDPOError(f"{row.where}: field {name!r} must be text or messages, got {shorten(value)}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise StepDPOError(
                f"{row.where}: field {name!r}: a message must hold 'role' and 'content', got {shorten(message)}"
            )
    return [(message["role"], message["content"]) for message in value]


def _preference(row: _Row, steps: StepFormat, max_pairs: int | None) -> _Made:
    texts = _texts(row)
    if isinstance(texts, str):
        return _Made([], Counter({texts: 1}))
    prompt, chosen, rejected = texts
    one, other = steps.split(chosen), steps.split(rejected)
    shared = 0
    while shared < min(len(one.steps), len(other.steps)) and one.steps[shared] == other.steps[shared]:
        shared += 1
    if min(len(one.steps), len(other.steps)) <= shared or one.opening != other.opening:
        reason = "the same answers" if chosen == rejected else "answers without two steps to compare"
        return _Made([], Counter({reason: 1}))
    k = shared + 1
    if one.steps[shared].marker != other.steps[shared].marker:
        return _Made([], Counter({"steps that begin with different markers": 1}))
    a, b = one.steps[shared].text, other.steps[shared].text
    if a.strip() == b.strip():
        return _Made([], Counter({"answers without two steps to compare": 1}))
    whole = {"full_chosen": one.after(k), "full_rejected": other.after(k)}
    return _Made([_pair(prompt, one.before(k), a, b, k, _text(row.value.get("answer")), **whole)], Counter())


FORMATS: dict[str, Callable[[_Row, StepFormat, int | None], _Made]] = {
    "prm800k": _prm800k,
    "step-dpo": _step_dpo,
    "preference": _preference,
}
CHECKS: dict[str, Callable[[_Row], None]] = {
    "prm800k": _check_prm800k,
    "step-dpo": _check_step_dpo,
    "preference": _check_preference,
}
