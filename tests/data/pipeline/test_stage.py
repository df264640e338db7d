"""A stage writes every record once, whenever it is killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stepdpo_kernels.data.pipeline.stage import Chunk, SeenKeys, check_complete, run_file, run_stage, stage_input
from stepdpo_kernels.data.records import RawRecord
from stepdpo_kernels.data.sources import MAX_LINE, open_source
from stepdpo_kernels.types import StepDPOError

ROOT = Path(__file__).resolve().parents[3]


class Word(NamedTuple):
    id: str
    text: str


def parse(raw: RawRecord) -> Word:
    if "text" not in raw.value:
        raise StepDPOError(f"{raw.where}: field 'text' is missing")
    return Word(raw.value.get("id", raw.id), raw.value["text"])


def work(words: list[Word]) -> Chunk:
    """Two records of each word, none of the empty one."""
    records = [{"id": f"{w.id}/{i}", "text": w.text * i} for w in words if w.text for i in (1, 2)]
    return Chunk(records, Counter(words=len(words)))


def stops_at(moment: int) -> Callable[[list[Word]], Chunk]:
    """`work` that is interrupted in its call of this number, from 0."""
    calls = itertools.count()

    def stop(items: list[Word]) -> Chunk:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return work(items)

    return stop


def write(path: Path, values: list[Any]) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


@pytest.fixture
def words(tmp_path) -> Path:
    return write(tmp_path / "words.jsonl", [{"id": f"w{i}", "text": "x" * (i % 5)} for i in range(23)])


def run(source: Path, output: Path, **options: Any) -> Any:
    options = {"settings": {"a": 1}, "parse": parse, "work": work, "chunk": 4} | options
    return run_stage("test", open_source(source, "train", columns=None, keep_bad=True).records, output, **options)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.open()]


def test_every_record_once_in_order(words, tmp_path):
    seen = []
    report = run(words, tmp_path / "out.jsonl", progress=lambda report: seen.append((report.read, report.written)))
    assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == [
        f"w{i}/{j}" for i in range(23) if i % 5 for j in (1, 2)
    ]
    assert (report.read, report.written, report.counts, report.complete) == (23, 36, {"words": 23}, True)
    assert [read for read, _ in seen] == [4, 8, 12, 16, 20, 23]
    assert "23 records read, 36 written" in str(report)


@pytest.mark.parametrize("moment", range(6))
@pytest.mark.parametrize(("torn", "chunk"), [(b"", 4), (b'{"id": "w', 4), (b'{"id": "torn"}\n', 4), (b"", 3)])
def test_goes_on_where_it_was_stopped(words, tmp_path, moment, torn, chunk):
    run(words, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(words, output, work=stops_at(moment))
    with output.open("ab") as file:
        file.write(torn)  # of a chunk that was being written
    with pytest.raises(StepDPOError, match="not come to its end"):
        check_complete(output)
    again: list[Any] = []
    report = run(words, output, replay=again.append, chunk=chunk)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert again == lines(output)[: len(again)]
    assert len(again) == sum(2 for i in range(4 * moment) if i % 5)
    assert (report.read, report.written, report.resumed, report.counts) == (23, 36, 4 * moment, {"words": 23})
    check_complete(output)


def test_running_it_again_changes_nothing_and_new_records_are_added(words, tmp_path):
    output = tmp_path / "out.jsonl"
    run(words, output)
    before = output.read_bytes()
    assert run(words, output).written == 36
    assert output.read_bytes() == before
    with words.open("a") as file:
        file.write('{"id": "new", "text": "n"}\n')
    assert run(words, output).written == 38
    assert output.read_bytes().startswith(before)


KILLED = """
import sys, time
from pathlib import Path
import tests.data.pipeline.test_stage as t
def slowly(items):
    time.sleep(0.01)
    return t.work(items)
print("begun", flush=True)
t.run(Path(sys.argv[1]), Path(sys.argv[2]), work=slowly, chunk=2)
"""


def test_killed_at_random_moments(tmp_path):
    """SIGKILL, at moments that fall into writing, too."""
    source = write(tmp_path / "words.jsonl", [{"id": f"w{i}", "text": "y" * 20_000} for i in range(60)])
    run(source, tmp_path / "whole.jsonl", chunk=2)
    output, kills, draw = tmp_path / "out.jsonl", 0, random.Random(0)
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source), str(output)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=draw.uniform(0.02, 0.3) if kills < 3 else 60)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        finally:
            process.stdout.close()
    assert process.returncode == 0
    assert kills >= 2
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


FULL = """
import resource, signal, sys
from pathlib import Path
import tests.data.pipeline.test_stage as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    t.run(Path(sys.argv[1]), Path(sys.argv[2]))
except t.StepDPOError as error:
    print(error)
"""


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for it: writes fail in the middle of a chunk."""
    source = write(tmp_path / "words.jsonl", [{"id": f"w{i}", "text": "z" * 1000} for i in range(20)])
    run(source, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    said = subprocess.run(
        [sys.executable, "-c", FULL, str(source), str(output), "40000"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert "cannot be written: File too large; what the stage had done before is kept" in said.stdout
    run(source, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("bad", "reason", "words_of_error"),
    [
        ('{"id": "w1", "text"', "unreadable", "malformed JSON"),
        ({"id": "w1"}, "unreadable", "field 'text' is missing"),
        ({"id": "w0", "text": "again"}, "duplicate ids", "'w0' came before"),
        ("x" * (MAX_LINE + 10), "unreadable", f"{MAX_LINE + 11:,} bytes in one line"),
        ("\udcff", "unreadable", "not UTF-8"),
    ],
)
def test_bad_records_stop_or_are_counted(tmp_path, bad, reason, words_of_error):
    values = [{"id": "w0", "text": "a"}, bad, {"id": "w2", "text": "b"}]
    text = "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)
    source = tmp_path / "words.jsonl"
    source.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StepDPOError, match="line 2") as error:
        run(source, tmp_path / "stopped.jsonl")
    assert words_of_error in str(error.value)
    report = run(source, tmp_path / "out.jsonl", on_bad="skip")
    assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == ["w0/1", "w0/2", "w2/1", "w2/2"]
    assert (report.read, report.skipped) == (3, {reason: 1})


def test_a_run_that_a_bad_record_stopped_goes_on_without_it(tmp_path):
    values = [*({"id": f"w{i}", "text": "a"} for i in range(6)), {"id": "bad"}, {"id": "last", "text": "b"}]
    source = write(tmp_path / "words.jsonl", values)
    run(source, tmp_path / "whole.jsonl", on_bad="skip")
    output = tmp_path / "out.jsonl"
    with pytest.raises(StepDPOError, match="or leave such records out with --on-bad skip"):
        run(source, output)
    report = run(source, output, on_bad="skip")
    assert (report.resumed, report.read, report.skipped) == (4, 8, {"unreadable": 1})
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(StepDPOError, match="begun with on_bad 'skip', and now it is 'stop'"):
        run(source, output)


def test_skipped_records_are_counted_once_when_it_goes_on(tmp_path):
    values = [{"id": f"w{i // 2}", "text": "a"} for i in range(20)]  # every id twice
    source = write(tmp_path / "words.jsonl", values)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out.jsonl", work=stops_at(1), on_bad="skip")
    report = run(source, tmp_path / "out.jsonl", on_bad="skip")
    assert (report.read, report.skipped, report.counts) == (20, {"duplicate ids": 10}, {"words": 10})
    assert len(lines(tmp_path / "out.jsonl")) == 20


def test_another_run_is_not_continued(words, tmp_path):
    output = tmp_path / "out.jsonl"
    run(words, output)
    for options, said in (
        ({"settings": {"a": 2}}, "begun with a 1, and now it is 2"),
        ({"settings": {"a": 1, "b": "x"}}, "begun with b None, and now it is 'x'"),
    ):
        with pytest.raises(StepDPOError, match=said):
            run(words, output, **options)
    changed = write(tmp_path / "changed.jsonl", [{"id": f"w{i}", "text": "x"} for i in range(23)])
    with pytest.raises(StepDPOError, match="begun with another input: its records have changed"):
        run(changed, output)
    shorter = write(tmp_path / "shorter.jsonl", words.read_text().splitlines()[:20])
    with pytest.raises(StepDPOError, match="23 records then and has 20 now"):
        run(shorter, output)
    with pytest.raises(StepDPOError, match="written by stage 'test', not other"):
        run_stage("other", iter(()), output, settings={}, parse=parse, work=work, chunk=4)
    assert run(changed, output, overwrite=True).written == 46
    output.write_text("")
    with pytest.raises(StepDPOError, match="0 bytes where the run before left"):
        run(changed, output)


def test_a_run_that_has_done_nothing_takes_other_settings(words, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(words, output, work=stops_at(0))
    assert run(words, output, settings={"a": 2}).written == 36
    with pytest.raises(StepDPOError, match="begun with a 2, and now it is 1"):
        run(words, output)


def test_what_is_not_ours_is_left_alone(words, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(StepDPOError, match="no stage wrote it"):
        run(words, output)
    assert output.read_text() == "mine\n"
    with pytest.raises(StepDPOError, match="there is no folder"):
        run(words, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(StepDPOError, match="is a folder"):
        run(words, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StepDPOError, match="or a device"):
        run(words, tmp_path / "pipe")
    run_file(output).write_text("{}")
    with pytest.raises(StepDPOError, match="not the run file of a stage"):
        run(words, output)


def test_two_processes_do_not_write_one_output(words, tmp_path):
    output = tmp_path / "out.jsonl"

    def nested(items: list[Word]) -> Chunk:
        with pytest.raises(StepDPOError, match="being written by another process"):
            run(words, output)
        return work(items)

    assert run(words, output, work=nested).complete


def test_memory_does_not_grow_with_the_data(tmp_path):
    """200,000 records of 100 bytes: ids and records would take 60 MB if they were kept."""
    source = tmp_path / "words.jsonl"
    with source.open("w") as file:
        for i in range(200_000):
            file.write(json.dumps({"id": f"a-rather-long-identifier-{i}", "text": "x" * 50}) + "\n")
    code = (
        "import resource, sys; from pathlib import Path; import tests.data.pipeline.test_stage as t;"
        "usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; before = usage();"
        "t.run(Path(sys.argv[1]), Path(sys.argv[2]), chunk=20000, work=lambda w: t.Chunk([], t.Counter()));"
        "print(usage() - before)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out.jsonl")], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert float(said.stdout) < 40


def test_an_output_is_not_its_own_input(words, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "words.jsonl").write_bytes(words.read_bytes())
    link = tmp_path / "link.jsonl"
    link.symlink_to(words)
    for source, output in ((words, words), (words, link), (folder, folder / "out.jsonl"), (folder, folder / "a.json")):
        with pytest.raises(StepDPOError, match="is what is to be read: name another file"):
            stage_input(source, output)
    for source, output in ((words, tmp_path / "out.jsonl"), (folder, tmp_path / "out.jsonl"), (folder, folder / "out")):
        assert len(list(stage_input(source, output))) == 23
    run(folder / "words.jsonl", folder / "out")
    assert len(list(stage_input(folder, tmp_path / "x.jsonl", limit=5))) == 5  # the run file is no data
    assert len(list(stage_input(folder, tmp_path / "x.jsonl"))) == 23
    (folder / "train.jsonl").write_bytes(words.read_bytes())
    assert len(list(stage_input(folder, folder / "out.jsonl"))) == 23  # which is not of the split
    with pytest.raises(StepDPOError, match="is what is to be read"):
        stage_input(folder, folder / "train-2.jsonl")


def test_seen_keys():
    seen = SeenKeys()
    assert seen.add("a", "b")
    assert not seen.add("a", "b")
    assert seen.add("ab", "")
    assert seen.add("a", "b", "")
    seen.close()
