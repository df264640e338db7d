"""Where records come from: JSONL (also gzipped), JSON and Parquet files, folders of them, the hub.

A line of JSONL that cannot be read is an error that names it. With `keep_bad` the error is the record's value instead,
and reading goes on after it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stepdpo_kernels.data.records import FIELDS, RawRecord, shorten
from stepdpo_kernels.types import StepDPOError

PARQUET_ROWS = 1024
BESIDE = (".run.json", ".dataset_info.json")  # names of what stages write beside their records
MAX_LINE = 8 << 20  # bytes of a line of JSONL; a longer one is not held in memory


class Source(NamedTuple):
    """An opened source: the names of its files, and its records in order."""

    files: tuple[str, ...]
    records: Iterator[RawRecord]


class Reading(NamedTuple):
    """columns: those that a Parquet file is asked for, None for all; keep_bad: as in `open_source`."""

    columns: Collection[str] | None
    keep_bad: bool


def open_source(
    path_or_hub_id: str | os.PathLike[str],
    split: str,
    *,
    columns: Collection[str] | None = FIELDS,
    keep_bad: bool = False,
) -> Source:
    """Records of a file, of a folder of files, or, where neither is there, of a dataset on the hub.

    A folder is read file by file in the order of their names, also in folders below it. Where some of its files
    are named after `split` (train.jsonl, train-00000-of-00002.parquet) only those are read. A hub dataset of several
    configurations is named with one of them: "openai/gsm8k:main".
    A JSON file or a Parquet row group at a time is the most that is ever held, and of JSONL only a line.

    columns:   of a Parquet file, those that are read where they are there; None for all
    keep_bad:  a line of JSONL that is too long, not UTF-8 or not JSON becomes a record whose value is the
               StepDPOError that would be raised

    Raises StepDPOError for a path without data, a file that is not what its name says, and an empty file.
    """
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser()
    reading = Reading(columns, keep_bad)
    if path.is_dir():
        files = _files_of(path, split)
        names = tuple(file.relative_to(path).as_posix() for file in files)
        return Source(names, _chain(files, names, reading))
    if path.exists():
        if _reader(path) is None:
            raise StepDPOError(f"{name}: not a kind of file that holds step pairs; the name must end in {_kinds()}")
        return Source((path.name,), _chain([path], (path.name,), reading))
    if not isinstance(path_or_hub_id, str) or _looks_like_path(name):
        raise StepDPOError(f"{name}: no such file or folder")
    return Source((name,), _hub_records(name, split))


def _kinds() -> str:
    return ", ".join(READERS)


def _reader(path: Path) -> Reader | None:
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", os.sep))
        or name.endswith((*READERS, ".gz", ".csv", ".txt", "/"))
        or "\\" in name
        or name.count("/") > 1
    )


def _files_of(folder: Path, split: str) -> list[Path]:
    files = _chosen(folder, [file for file in sorted(folder.rglob("*")) if file.is_file()], split)
    if not files:
        raise StepDPOError(f"{folder}: a folder without data files; it must hold files whose names end in {_kinds()}")
    return files


def _chosen(folder: Path, files: list[Path], split: str) -> list[Path]:
    files = [
        file
        for file in files
        if _reader(file)
        and not file.name.endswith(BESIDE)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    word = re.compile(rf"(?:^|[-_.]){re.escape(split)}(?:[-_.]|$)")
    return [file for file in files if word.search(file.name)] or files


def would_read(path_or_hub_id: str | os.PathLike[str], split: str, file: str | os.PathLike[str]) -> bool:
    """Whether `open_source` reads this file, or will as soon as it is there."""
    path, file = Path(path_or_hub_id).expanduser(), Path(file)
    if not path.is_dir():
        return path.exists() and file.exists() and path.samefile(file)
    folder, file = path.resolve(), file.resolve()
    others = [other for other in folder.rglob("*") if other.is_file()]
    return file.is_relative_to(folder) and file in _chosen(folder, [*others, file], split)


def _chain(files: list[Path], names: tuple[str, ...], reading: Reading) -> Iterator[RawRecord]:
    for file, name in zip(files, names, strict=True):
        read = _reader(file)
        assert read is not None
        empty = True
        for record in read(file, name, reading):
            empty = False
            yield record
        if empty:
            raise StepDPOError(f"{name}: the file holds no records")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = line[error.start : error.start + 8]
        raise StepDPOError(f"{where}: not UTF-8 at byte {error.start + 1}: {bad!r}; save the file as UTF-8") from error


def _parse(text: str, where: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        near = shorten(text[max(error.pos - 30, 0) : error.pos + 30])
        raise StepDPOError(f"{where}: malformed JSON: {error.msg} at {at}, near {near}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise StepDPOError(f"{where}: JSON that cannot be read: {error}") from error


def _read_lines(
    path: Path, name: str, reading: Reading, opened: Callable[[Path], BinaryIO | gzip.GzipFile]
) -> Iterator[RawRecord]:
    number = 0
    try:
        with opened(path) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where, id_ = f"{name}, line {number}", f"{name}:{number}"
                try:
                    if len(line) > MAX_LINE:
                        length = len(line) + _skip_line(line, file)
                        raise StepDPOError(
                            f"{where}: {length:,} bytes in one line, more than {MAX_LINE:,}: it begins with "
                            f"{line[:40]!r}; is this a file of JSON lines?"
                        )
                    text = _decode(line, where)
                    if number == 1:
                        text = text.removeprefix("\ufeff")  # a byte order mark
                    if text.strip():
                        yield RawRecord(where, id_, _parse(text.rstrip("\r\n"), where))
                except StepDPOError as error:
                    if not reading.keep_bad:
                        raise
                    yield RawRecord(where, id_, error)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StepDPOError(f"{name}, after line {number}: the gzip file is damaged: {error}") from error


def _skip_line(line: bytes, file: BinaryIO | gzip.GzipFile) -> int:
    """Reads to the end of the line that `line` is the beginning of; how many bytes that was."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
        skipped += len(line)
    return skipped


def _read_jsonl(path: Path, name: str, reading: Reading) -> Iterator[RawRecord]:
    return _read_lines(path, name, reading, lambda p: p.open("rb"))


def _read_jsonl_gz(path: Path, name: str, reading: Reading) -> Iterator[RawRecord]:
    return _read_lines(path, name, reading, lambda p: gzip.open(p, "rb"))


def _read_json(path: Path, name: str, reading: Reading) -> Iterator[RawRecord]:
    text = _decode(path.read_bytes(), name).removeprefix("\ufeff")
    if not text.strip():
        return
    value = _parse(text, name, "; a file with one record a line must be named .jsonl")
    if not isinstance(value, list):
        raise StepDPOError(
            f"{name}: a JSON file must hold a list of records, got {type(value).__name__} {shorten(value)}; "
            "a file with one record a line must be named .jsonl"
        )
    for number, record in enumerate(value, start=1):
        yield RawRecord(f"{name}, record {number}", f"{name}:{number}", record)


def _read_parquet(path: Path, name: str, reading: Reading) -> Iterator[RawRecord]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StepDPOError(f"{name}: reading Parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [column for column in names if reading.columns is None or column in reading.columns]
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{name}, row {number}", f"{name}:{number}", record)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StepDPOError(f"{name}: cannot be read as Parquet: {error}") from error


def _hub_records(name: str, split: str) -> Iterator[RawRecord]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise StepDPOError(
            f"{name}: no such file or folder, and a dataset on the hub needs the package datasets: pip install datasets"
        ) from error
    repository, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(*filter(None, (repository, configuration)), split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise StepDPOError(
            f"{name}: no such file or folder, and loading it from the hub with split {split!r} failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    empty = True
    for number, record in enumerate(dataset, start=1):
        empty = False
        yield RawRecord(f"{name}, split {split}, row {number}", f"{name}:{number}", dict(record))
    if empty:
        raise StepDPOError(f"{name}: split {split!r} holds no records")


Reader = Callable[[Path, str, Reading], Iterator[RawRecord]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
