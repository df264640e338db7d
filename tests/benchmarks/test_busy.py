"""`python -m benchmarks busy`: gaps of a trace, and the training that is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import busy
from benchmarks.__main__ import main


def test_gaps_lie_where_no_stream_is_busy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def event(category: str, start: float, length: float, name: str) -> dict[str, object]:
        return {"ph": "X", "cat": category, "ts": start, "dur": length, "name": name}

    events = [
        event("cpu_op", 0, 1000, "host"),
        event("kernel", 300, 100, "b"),
        event("kernel", 100, 100, "a"),
        event("gpu_memcpy", 320, 20, "copy"),  # within b, on another stream
        event("kernel", 450, 50, "a"),
        {"ph": "M", "name": "process_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = busy.gpu_events(tmp_path / "trace.json")
    assert [event.name for event in found] == ["a", "b", "copy", "a"]
    assert busy.gaps(found) == [busy.Gap(100, "a", "b"), busy.Gap(50, "b", "a")]
    busy.show(found, Console(width=200))
    told = capsys.readouterr().out
    assert "busy for 62.5% of 0.000 s" in told  # 250 of 400
    assert told.index("100") < told.index("50 ")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_without_a_gpu_it_says_so(mode: str, tmp_path: Path) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    sizes = ["--model", "tiny", "--pairs-per-step", "2", "--max-tokens", "1200"]
    with pytest.raises(SystemExit, match="needs one"):
        main(["busy", "--mode", mode, *sizes, "--trace", str(tmp_path / "trace.json")])
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_model_of_no_known_size_is_refused() -> None:
    with pytest.raises(SystemExit, match="no model GPT-9; there are tiny, llama-21M"):
        main(["busy", "--model", "GPT-9"])
