"""Step pairs as other trainers read them.

    trl            messages: the problem, and the answer through the step; for TRL and what reads its formats
    trl-text       text: `prompt` (problem and earlier steps in a prompt template), `chosen`, `rejected`
    llama-factory  the ranking format "sharegpt" of LLaMA-Factory, and the entry for its dataset_info.json beside it

In `trl` and `llama-factory` both answers begin with the earlier steps. That changes no DPO loss: what they have in
common cancels. But such a trainer ends every answer with an end-of-turn token, also in the middle of a solution; to
train without it, use this package's trainer or its integrations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from stepdpo_kernels.data.pipeline.stage import Chunk, StageReport, run_stage, stage_input
from stepdpo_kernels.data.records import StepRecord, check_record
from stepdpo_kernels.data.templates import TEMPLATES, separator
from stepdpo_kernels.types import StepDPOError

FORMATS = ("trl", "trl-text", "llama-factory")
CHUNK = 256


def export_pairs(
    source: str | PathLike[str],
    output: str | PathLike[str],
    format: str,
    *,
    template: str = "none",
    split: str = "train",
    limit: int | None = None,
    on_bad: str = "stop",
    overwrite: bool = False,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Writes step pairs as JSON lines in another format; ids, groups and answers go along where the format allows it.

    template: of `trl-text`: "alpaca", "deepseek-math", "qwen2-boxed" or "none"
    The rest is as in `run_stage`, which also says what is raised.
    """
    if format not in FORMATS:
        raise StepDPOError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if template not in TEMPLATES:
        raise StepDPOError(f"template must be one of {', '.join(TEMPLATES)}; got {template!r}")

    def work(batch: list[StepRecord]) -> Chunk:
        return Chunk([_record(record, format, template) for record in batch], Counter())

    report = run_stage(
        "export",
        stage_input(source, output, split, limit),
        output,
        settings={"format": format, "template": template, "limit": limit},
        parse=check_record,
        work=work,
        chunk=CHUNK,
        on_bad=on_bad,
        overwrite=overwrite,
        progress=progress,
    )
    if format == "llama-factory":
        _write_dataset_info(Path(output))
    return report


def _record(record: StepRecord, format: str, template: str) -> dict[str, Any]:
    answers = (record.initial_reason_steps + record.chosen, record.initial_reason_steps + record.rejected)
    named = {"id": record.id, "group": record.group}
    if format == "trl-text":
        before, after, *_ = TEMPLATES[template]
        steps = record.initial_reason_steps
        prompt = before + record.prompt + after + (separator(template) + steps if steps else "")
        return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected} | named
    if format == "trl":
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
        return {"prompt": [{"role": "user", "content": record.prompt}], "chosen": chosen, "rejected": rejected} | named
    chosen_value, rejected_value = ({"from": "gpt", "value": text} for text in answers)
    talk = [{"from": "human", "value": record.prompt}]
    return {"conversations": talk, "chosen": chosen_value, "rejected": rejected_value} | named


def _write_dataset_info(output: Path) -> None:
    """`<output>.dataset_info.json`: the entry that LLaMA-Factory's dataset_info.json needs."""
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {output.stem: {"file_name": output.name, "formatting": "sharegpt", "ranking": True, "columns": columns}}
    file = output.with_name(output.name + ".dataset_info.json")
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(entry, indent=2) + "\n")
    new.replace(file)
