"""Files, folders and hub datasets, and what is said about those that are broken."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepdpo_kernels.data import load, load_step_pairs
from stepdpo_kernels.data.records import check_record
from stepdpo_kernels.data.sources import open_source
from stepdpo_kernels.data.tokenization import StepTokenizer
from stepdpo_kernels.types import StepDPOError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

Write = Callable[..., Path]
Record = Callable[..., dict[str, Any]]


def write_parquet(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=2)
    return file


def ids(dataset: Any) -> list[str]:
    return [pair.id for pair in dataset]


def test_every_format_gives_the_same_pairs(
    tmp_path: Path, tiny_tokenizer: Any, step_records: Any, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = tiny_tokenizer()
    records = [{**record, "id": f"r{i}", "weight": i / 2} for i, record in enumerate(step_records())]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1))
    write_parquet(tmp_path / "d.parquet", records)
    folder = tmp_path / "e"
    folder.mkdir()
    for part in range(4):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[3 * part : 3 * part + 3]))
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(records)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "e")]
    sources: list[str | Path] = [*map(str, names), *names, "somebody/pairs"]
    loaded = [load_step_pairs(source, tokenizer) for source in sources]
    assert len(loaded[0]) == len(records) == 12
    assert {dataset.fingerprint for dataset in loaded} == {loaded[0].fingerprint}
    assert [pair.weight for pair in loaded[0]] == [i / 2 for i in range(12)]


def test_default_ids_name_file_and_place(tmp_path: Path, words: Any, write: Write, record: Record):
    file = write("a.jsonl", record(), "", record(id=None), "  ", record(id=7), record(id="x"))
    assert ids(load_step_pairs(file, words)) == ["a.jsonl:1", "a.jsonl:3", "7", "x"]
    (tmp_path / "b.json").write_text(json.dumps([record(), record()]))
    assert ids(load_step_pairs(tmp_path / "b.json", words)) == ["b.json:1", "b.json:2"]
    write_parquet(tmp_path / "c.parquet", [record()] * 5)
    assert ids(load_step_pairs(tmp_path / "c.parquet", words)) == [f"c.parquet:{i}" for i in range(1, 6)]


def test_a_folder_is_read_in_order_and_by_split(tmp_path: Path, words: Any, write: Write, record: Record):
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deep/a.jsonl", "d/.hidden/a.jsonl", "d/notes.txt"):
        write(name, record())
    dataset = load_step_pairs(tmp_path / "d", words)
    assert ids(dataset) == ["a.jsonl:1", "b.jsonl:1", "deep/a.jsonl:1"]
    assert dataset.report.files == ("a.jsonl", "b.jsonl", "deep/a.jsonl")
    for name in ("s/data/train-00000-of-00002.jsonl", "s/data/train-00001-of-00002.jsonl", "s/data/test.jsonl"):
        write(name, record())
    assert ids(load_step_pairs(tmp_path / "s", words)) == [
        "data/train-00000-of-00002.jsonl:1",
        "data/train-00001-of-00002.jsonl:1",
    ]
    assert ids(load_step_pairs(tmp_path / "s", words, split="test")) == ["data/test.jsonl:1"]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path, words: Any, record: Record):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(record()).encode() for _ in range(2)))
    assert len(load_step_pairs(file, words)) == 2


def test_limit_reads_no_further(words: Any, write: Write, record: Record):
    file = write("a.jsonl", record(), record(), "{broken")
    dataset = load_step_pairs(file, words, limit=2)
    assert (len(dataset), dataset.report.records) == (2, 2)
    with pytest.raises(StepDPOError, match=r"a.jsonl, line 3: malformed JSON"):
        load_step_pairs(file, words, limit=3)


def test_jsonl_is_read_line_by_line(words: Any, write: Write, record: Record, monkeypatch: pytest.MonkeyPatch):
    """The first batch is tokenised before the file is read to its end."""
    parsed = 0
    when_tokenised = []

    def check(*args: Any) -> Any:
        nonlocal parsed
        parsed += 1
        return check_record(*args)

    class Tokenizer(StepTokenizer):
        def __call__(self, records: Any) -> Any:
            when_tokenised.append(parsed)
            return super().__call__(records)

    monkeypatch.setattr(load, "check_record", check)
    monkeypatch.setattr(load, "StepTokenizer", Tokenizer)
    load_step_pairs(write("a.jsonl", *[record()] * (load.BATCH + 10)), words)
    assert when_tokenised == [load.BATCH, load.BATCH + 10]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "w1"', r"a.jsonl, line 2: malformed JSON: Expecting ',' delimiter at column 16, near '.*w1\"'"),
        ("not json", r"a.jsonl, line 2: malformed JSON: Expecting value at column 1, near 'not json'"),
        ('{"prompt": 1}{}', r"a.jsonl, line 2: malformed JSON: Extra data"),
        ("[1, 2]", r"a.jsonl, line 2: a record must be an object with the fields prompt, .*, got list \[1, 2\]"),
        ("null", r"a.jsonl, line 2: a record must be an object .*, got null"),
        (b'{"prompt": "caf\xe9"}', r"a.jsonl, line 2: not UTF-8 at byte 16: b'\\xe9.*'; save the file as UTF-8"),
        ("[" * 100_000, r"a.jsonl, line 2: (JSON that cannot be read|malformed JSON)"),
        ("9" * 5000, r"a.jsonl, line 2: JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_malformed_line(words: Any, write: Write, record: Record, line: str | bytes, message: str):
    with pytest.raises(StepDPOError, match=message):
        load_step_pairs(write("a.jsonl", record(), line, record()), words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "w1"}\n{"prompt": "w2"}', "a.json: malformed JSON: Extra data at line 2, column 1.*named .jsonl"),
        ('{"prompt": "w1"}', "a.json: a JSON file must hold a list of records, got dict .*named .jsonl"),
        ("[]", "a.json: the file holds no records"),
        (" \n", "a.json: the file holds no records"),
        ('[{"prompt": "w1"}]', "a.json, record 1: field 'initial_reason_steps' is missing"),
    ],
)
def test_broken_json_file(tmp_path: Path, words: Any, text: str, message: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StepDPOError, match=message):
        load_step_pairs(tmp_path / "a.json", words)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_empty_file(tmp_path: Path, words: Any, name: str):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(StepDPOError, match=f"{name}: (the file holds no records|cannot be read as Parquet: .+)"):
        load_step_pairs(tmp_path / name, words)


def test_no_rows(tmp_path: Path, words: Any, write: Write, record: Record):
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(StepDPOError, match=r"a.parquet: the file holds no records"):
        load_step_pairs(tmp_path / "a.parquet", words)
    write("d/a.jsonl", record())
    write("d/b.jsonl")
    with pytest.raises(StepDPOError, match=r"b.jsonl: the file holds no records"):
        load_step_pairs(tmp_path / "d", words)


def test_broken_parquet_and_gzip(tmp_path: Path, words: Any, record: Record):
    whole = write_parquet(tmp_path / "a.parquet", [record()] * 3).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StepDPOError, match=r"a.parquet: cannot be read as Parquet"):
        load_step_pairs(tmp_path / "a.parquet", words)
    packed = gzip.compress(b"".join(json.dumps(record(id=i)).encode() + b"\n" for i in range(500)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(StepDPOError, match=r"a.jsonl.gz, after line \d+: the gzip file is damaged: "):
        load_step_pairs(tmp_path / "a.jsonl.gz", words)
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text\n")
    with pytest.raises(StepDPOError, match=r"a.jsonl.gz, after line 0: the gzip file is damaged: Not a gzipped file"):
        load_step_pairs(tmp_path / "a.jsonl.gz", words)


def test_parquet_field_of_another_type(tmp_path: Path, words: Any, record: Record):
    file = write_parquet(tmp_path / "a.parquet", [record(chosen=1), record(chosen=2)])
    with pytest.raises(StepDPOError, match=r"a.parquet, row 1: field 'chosen' must be a string, got int 1"):
        load_step_pairs(file, words)
    file = write_parquet(tmp_path / "a.parquet", [record(), record(rejected=None)])
    with pytest.raises(StepDPOError, match=r"a.parquet, row 2: field 'rejected' must be a string, got null"):
        load_step_pairs(file, words)


def test_paths_that_lead_nowhere(tmp_path: Path, words: Any):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_text("nothing here")
    with pytest.raises(
        StepDPOError, match=r"d: a folder without data files; .*\.jsonl, \.jsonl\.gz, \.json, \.parquet"
    ):
        load_step_pairs(tmp_path / "d", words)
    with pytest.raises(StepDPOError, match=r"README.md: not a kind of file that holds step pairs; .* \.jsonl"):
        load_step_pairs(tmp_path / "d" / "README.md", words)
    for name in ("pairs.jsonl", "./pairs", "data/pairs.parquet", "~/pairs", "a/b/c", "pairs/", "a\\b", "pairs.csv"):
        with pytest.raises(StepDPOError, match=r"no such file or folder$"):
            load_step_pairs(name, words)
    with pytest.raises(StepDPOError, match=r"no such file or folder$"):
        load_step_pairs(tmp_path / "absent", words)


def test_hub_dataset(tiny_tokenizer: Any, step_records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A dataset in a folder, loaded through datasets as one from the hub would be."""
    datasets = pytest.importorskip("datasets")
    records = step_records(2, 3)
    for split, rows in (("train", records[:4]), ("test", records[4:])):
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split: load_dataset(str(tmp_path / name), split=split, cache_dir=str(tmp_path / "cache")),
    )
    monkeypatch.chdir(tmp_path / "hub")  # so that "hub" is no path
    tokenizer = tiny_tokenizer()
    dataset = load_step_pairs("hub", tokenizer)
    assert ids(dataset) == ["hub:1", "hub:2", "hub:3", "hub:4"]
    assert (dataset.report.source, dataset.report.files) == ("hub", ("hub",))
    assert ids(load_step_pairs("hub", tokenizer, split="test")) == ["hub:1", "hub:2"]
    with pytest.raises(StepDPOError, match=r"hub: no such .* hub with split 'dev' failed: ValueError: .*Unknown split"):
        load_step_pairs("hub", tokenizer, split="dev")


def test_hub_dataset_that_cannot_be_had(words: Any, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(StepDPOError, match=r"nobody/nothing: no such file or folder, and loading it from the hub with"):
        load_step_pairs("nobody/nothing", words)
    rows = [{"prompt": "w1", "initial_reason_steps": "", "chosen": 3, "rejected": ""}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    with pytest.raises(StepDPOError, match=r"some/one, split train, row 1: field 'chosen' must be a string, got int 3"):
        load_step_pairs("some/one", words)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([]))
    with pytest.raises(StepDPOError, match=r"some/one: split 'train' holds no records"):
        load_step_pairs("some/one", words)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StepDPOError, match=r"some/one: no such file or folder, .* needs the package datasets: pip"):
        load_step_pairs("some/one", words)


def test_hub_dataset_of_a_configuration(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"question": "P", "answer": "#### 7"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = open_source("openai/gsm8k:main", "test", columns=None).records
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (record.id, record.value["answer"]) == ("openai/gsm8k:main:1", "#### 7")
