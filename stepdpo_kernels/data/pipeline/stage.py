"""One stage of the pipeline: records in, JSON lines out, chunk by chunk, and every chunk wholly there or not at all.

Beside the output `x.jsonl` lies `x.jsonl.run.json`: the settings, how many input records are done, how long the output
was then, and what was counted. It is replaced after each chunk, so whatever lies in the output beyond that length is
an unfinished chunk and is cut off when the stage runs again. What comes of a record depends on it, on those before it
and on the settings alone; so a stage that was killed at any moment and run again writes what an undisturbed one would
have written, whatever the size of the chunks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, Protocol, TypeVar

from stepdpo_kernels.data.records import RawRecord, shorten
from stepdpo_kernels.data.sources import open_source, would_read
from stepdpo_kernels.types import StepDPOError

FORMAT = 1  # of the run file
ON_BAD = ("stop", "skip")


class Item(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Item)


class Chunk(NamedTuple):
    """What came of a chunk: records as JSON can hold them, and what is worth counting, by name."""

    records: list[dict[str, Any]]
    counts: Counter[str]


@dataclass
class StageReport:
    """How far a stage is.

    stage:     "collect", "locate", "rectify", ...
    output:    its file
    read:      input records that are done, those left out included
    written:   records written
    skipped:   input records left out, by reason
    counts:    what the stage counted, by name
    resumed:   input records that an earlier run had done
    seconds:   time it took, over all runs
    complete:  the input came to its end
    """

    stage: str
    output: str
    read: int = 0
    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int | float] = field(default_factory=dict)
    resumed: int = 0
    seconds: float = 0.0
    complete: bool = False

    def __str__(self) -> str:
        text = f"{self.stage}: {self.read:,} records read, {self.written:,} written to {self.output}"
        if self.counts:
            text += "; " + ", ".join(f"{_number(count)} {name}" for name, count in self.counts.items())
        if self.skipped:
            text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        return text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


class SeenKeys:
    """Which keys came before, on disk rather than in memory beyond a fixed size."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")  # a temporary file that goes when the connection is closed
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, *key: str) -> bool:
        """Whether the key is new."""
        digest = hashlib.sha256(json.dumps(key).encode()).digest()[:16]
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._base.close()


def run_file(output: Path) -> Path:
    return output.with_name(output.name + ".run.json")


def seed_for(seed: int, use: str | int) -> int:
    """A seed of its own for each use of a seed, in 0..2^31-1: one prompt must not get the same samples in two."""
    digest = hashlib.sha256(f"{seed}/{use}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4]) >> 1


def stage_input(
    source: str | os.PathLike[str], output: str | os.PathLike[str], split: str = "train", limit: int | None = None
) -> Iterator[RawRecord]:
    """The first `limit` records of a source, those that cannot be read as `open_source` keeps them.

    Raises StepDPOError as that does, and for an output that is among what is read.
    """
    if would_read(source, split, output):
        raise StepDPOError(f"output {str(output)!r} is what is to be read: name another file")
    return islice(open_source(source, split, columns=None, keep_bad=True).records, limit)


def check_complete(path: str | os.PathLike[str]) -> None:
    """Raises StepDPOError for the output of a stage that has not come to its end."""
    file = run_file(Path(path).expanduser())
    if file.is_file() and not _read_state(file)["report"]["complete"]:
        raise StepDPOError(
            f"{path}: the stage that writes it has not come to its end; run that first, or say --partial to take what "
            "is there"
        )


def run_stage(
    stage: str,
    source: Iterable[RawRecord],
    output: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    parse: Callable[[RawRecord], T],
    work: Callable[[list[T]], Chunk],
    chunk: int,
    on_bad: str = "stop",
    overwrite: bool = False,
    replay: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[StageReport], object] | None = None,
) -> StageReport:
    """Runs a stage to its end, from where an earlier run of the same stage was stopped.

    source:    input records; the same ones in the same order when the stage is run again
    output:    JSON lines; the folder must exist
    settings:  what decides the result, as JSON can hold it
    parse:     an item of a record; raises StepDPOError for a bad one
    work:      records and counts of a chunk of items
    chunk:     items of a chunk; a run may be continued with another one
    on_bad:    what becomes of a record that cannot be read or parsed, or whose id came before: "stop" raises,
               "skip" leaves it out and counts it. A run that was stopped by one may be continued under "skip"
    overwrite: begin again, whatever is there
    replay:    is given each record that an earlier run has written
    progress:  is given the report after each chunk

    Raises StepDPOError for a bad record under "stop"; for an output that another program writes, was not written by a
    stage, or was changed since; for other settings or another input than those of the run to be continued; and where
    the output cannot be written. What is done is kept.
    """
    if on_bad not in ON_BAD:
        raise StepDPOError(f"on_bad must be one of {', '.join(ON_BAD)}; got {on_bad!r}")
    if chunk < 1:
        raise StepDPOError(f"a chunk must have at least 1 record, got {chunk!r}")
    output = Path(output)
    decided: dict[str, Any] = json.loads(json.dumps({**settings, "on_bad": on_bad}))
    with _opened(output, overwrite) as file:
        state = _State.begin(stage, output, decided, overwrite)
        report = state.report
        state.cut(file)
        if replay is not None:
            file.seek(0)
            for line in file:
                replay(json.loads(line))
        items = _Items(source, parse, on_bad)
        try:
            items.skip(state, output)
            report.resumed = report.read
            start, before = time.monotonic(), report.seconds
            while batch := items.take(chunk):
                records, counts = work(batch)
                for reason, count in items.skipped.items():
                    report.skipped[reason] = report.skipped.get(reason, 0) + count
                for name, count in counts.items():
                    report.counts[name] = report.counts.get(name, 0) + count
                report.read, report.written = items.read, report.written + len(records)
                report.seconds = before + time.monotonic() - start
                state.commit(file, records, items.digest)
                items.skipped.clear()
                if progress is not None:
                    progress(report)
            for reason, count in items.skipped.items():
                report.skipped[reason] = report.skipped.get(reason, 0) + count
            report.read, report.complete = items.read, True
            state.save(items.digest)
        finally:
            items.close()
    return report


@contextlib.contextmanager
def _opened(output: Path, overwrite: bool) -> Iterator[BinaryIO]:
    """The output, for this process alone."""
    if not output.parent.is_dir():
        raise StepDPOError(f"output {str(output)!r}: there is no folder {str(output.parent)!r}")
    if output.exists() and not output.is_file():
        raise StepDPOError(f"output {str(output)!r} is a folder or a device: name a file")
    if output.exists() and not run_file(output).exists() and output.stat().st_size and not overwrite:
        raise StepDPOError(f"output {str(output)!r} is there already and no stage wrote it: name another, or overwrite")
    try:
        file = output.open("a+b")
    except OSError as error:
        raise StepDPOError(f"output {str(output)!r} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StepDPOError(f"output {str(output)!r} is being written by another process: wait for it") from error
        yield file


class _Items(Generic[T]):
    """Items of the source, and a digest of every record that they came from."""

    def __init__(self, source: Iterable[RawRecord], parse: Callable[[RawRecord], T], on_bad: str) -> None:
        self.source = iter(source)
        self.parse, self.on_bad = parse, on_bad
        self.ids = SeenKeys()
        self.read = 0
        self.digest = ""
        self.skipped: Counter[str] = Counter()

    def close(self) -> None:
        self.ids.close()

    def _next(self) -> T | None:
        """None for a record that is left out. Raises StopIteration at the end."""
        raw = next(self.source)
        self.read += 1
        value = str(raw.value) if isinstance(raw.value, Exception) else json.dumps(raw.value, default=str)
        self.digest = hashlib.sha256((self.digest + value).encode(errors="surrogatepass")).hexdigest()
        reason = "unreadable"
        try:
            if isinstance(raw.value, StepDPOError):
                raise raw.value
            item = self.parse(raw)
            if self.ids.add(item.id):
                return item
            reason = "duplicate ids"
            raise StepDPOError(f"{raw.where}: field 'id': {shorten(item.id)} came before: give every record its own id")
        except StepDPOError as error:
            if self.on_bad == "stop":
                raise StepDPOError(f"{error}; or leave such records out with --on-bad skip") from error
            self.skipped[reason] += 1
            return None

    def take(self, count: int) -> list[T]:
        items: list[T] = []
        while len(items) < count:
            try:
                item = self._next()
            except StopIteration:
                break
            if item is not None:
                items.append(item)
        return items

    def skip(self, state: _State, output: Path) -> None:
        """Goes past the records that are done, which must be those of the earlier run."""
        wanted, changed = state.report.read, ""
        while self.read < wanted:
            try:
                self._next()
            except StopIteration:
                changed = f"it had {wanted:,} records then and has {self.read:,} now"
                break
        if changed or self.digest != state.digest:
            raise StepDPOError(
                f"output {str(output)!r} was begun with another input: {changed or 'its records have changed'}; name "
                "another output, or overwrite"
            )
        self.skipped.clear()


class _State:
    """What the run file holds."""

    def __init__(self, path: Path, settings: dict[str, Any], report: StageReport) -> None:
        self.path, self.settings, self.report = path, settings, report
        self.bytes = 0
        self.digest = ""

    @classmethod
    def begin(cls, stage: str, output: Path, settings: dict[str, Any], overwrite: bool) -> _State:
        state = cls(run_file(output), settings, StageReport(stage, str(output)))
        if overwrite:
            state.path.unlink(missing_ok=True)
        if not state.path.exists():
            state.save("")
            return state
        value = _read_state(state.path)
        if not value["report"]["read"]:  # stopped before anything was done, perhaps by the very settings
            state.save("")
            return state
        if value["report"]["stage"] != stage:
            raise StepDPOError(f"output {str(output)!r} was written by stage {value['report']['stage']!r}, not {stage}")
        if settings["on_bad"] == "skip":  # what "stop" has let through, "skip" would have, too
            value["settings"]["on_bad"] = "skip"
        _compare(output, value["settings"], settings)
        state.report = StageReport(**(value["report"] | {"output": str(output), "complete": False}))
        state.bytes, state.digest = value["bytes"], value["digest"]
        return state

    def cut(self, file: BinaryIO) -> None:
        length = file.seek(0, os.SEEK_END)
        if length < self.bytes:
            raise StepDPOError(
                f"output {self.report.output!r} has {length:,} bytes where the run before left {self.bytes:,}: it was "
                "changed since; overwrite it to begin again"
            )
        file.truncate(self.bytes)

    def commit(self, file: BinaryIO, records: list[dict[str, Any]], digest: str) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        data = text.encode(errors="backslashreplace")  # half of a surrogate pair, as JSON escapes it
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self.bytes += len(data)
            self.save(digest)
        except OSError as error:
            raise StepDPOError(
                f"output {self.report.output!r} cannot be written: {error.strerror or error}; what the stage had done "
                "before is kept: make room and run the same command again"
            ) from error

    def save(self, digest: str) -> None:
        self.digest = digest
        value = {
            "format": FORMAT,
            "settings": self.settings,
            "bytes": self.bytes,
            "digest": digest,
            "report": asdict(self.report),
        }
        new = self.path.with_name(self.path.name + ".new")
        try:
            with new.open("w") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            raise StepDPOError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        known = value["format"] == FORMAT and {"settings", "bytes", "digest", "report"} <= value.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StepDPOError(f"{path}: not the run file of a stage: {error}; overwrite to begin again") from error
    if not known:
        raise StepDPOError(f"{path}: written by another version: overwrite to begin again")
    return dict(value)


def _compare(output: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    missing = object()
    for name in {**old, **new}:
        if old.get(name, missing) != new.get(name, missing):
            raise StepDPOError(
                f"output {str(output)!r} was begun with {name} {shorten(old.get(name))}, and now it is "
                f"{shorten(new.get(name))}: use the same settings, name another output, or overwrite"
            )
