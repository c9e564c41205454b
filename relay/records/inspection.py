"""What is in a spool, for people: read without its lock, beside a relay that runs or without one.

Rules: nothing is changed. A relay may append, move and remove while this reads, so a line that is not
finished is one that is being written, and a file that is gone is one that is done with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from relay.records.model import Doubt, Json, Record, Settled
from relay.records.segment import end_of_rows
from relay.records.spool import CORRUPT, LOCK, REJECTED, REPLAYED, SEGMENT_NAME, SpoolError
from relay.records.spool_line import CorruptLineError, contents, decode

__all__ = ["Found", "Survey", "Waiting", "check_usable", "entries_waiting", "survey", "waiting"]


@dataclass(slots=True)
class Found:
    """One file with rows; times in ISO 8601, UTC, as in the rows."""

    name: str
    rows: int = 0
    corrupt: int = 0
    """Lines that cannot be read."""
    oldest: str | None = None
    newest: str | None = None
    size: int = 0
    """Octets of rows."""
    reserve: int = 0
    """Octets of disk space that are taken ahead behind them."""


class Survey(NamedTuple):
    """What is in a spool: segments, oldest first; what the store has rejected; lines in `corrupt.jsonl`."""

    segments: list[Found]
    rejected: list[Found]
    corrupt_lines: int

    @property
    def rows(self) -> int:
        """Rows that wait for the store."""
        return sum(found.rows for found in self.segments)

    @property
    def reserve(self) -> int:
        """Octets of disk space that are taken ahead."""
        return sum(found.reserve for found in self.segments)


class Waiting(NamedTuple):
    """One row, its kind (`record`, `doubt`, `settled`) and the file that it is in.

    One that the store has rejected says why in `reason`, a doubt in `rejected`.
    """

    file: str
    kind: str
    row: dict[str, Json]


def survey(directory: Path) -> Survey:
    """Return what is in the spool; raise SpoolError if it cannot be read."""
    segments, rejected = _files(directory)
    try:
        corrupt = directory / CORRUPT
        lines = sum(1 for _ in _lines(corrupt)) if corrupt.exists() else 0
        return Survey([_found(path) for path in segments], [_found(path) for path in rejected], lines)
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror or error}") from error


def check_usable(directory: Path) -> None:
    """Raise SpoolError unless the spool can be used, or made, as far as the file system tells."""
    effective = os.access in os.supports_effective_ids
    there = directory.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise SpoolError(f"spool {directory}: {there} is not a directory; change records.spool")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective):
        raise SpoolError(
            f"spool {directory}: {there} cannot be written; change records.spool, or the rights of its path"
        )
    lock = directory / LOCK
    if lock.exists() and not os.access(lock, os.R_OK | os.W_OK, effective_ids=effective):
        raise SpoolError(f"spool {directory}: {lock} cannot be written; give the relay's user the file")


def waiting(directory: Path) -> Iterator[Waiting]:
    """Give all rows, oldest first, then those that the store has rejected; raise SpoolError."""
    segments, rejected = _files(directory)
    try:
        for path in (*segments, *rejected):
            for line in _lines(path):
                try:
                    yield Waiting(path.name, *contents(line))
                except CorruptLineError:
                    continue
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror or error}") from error


def entries_waiting(directory: Path, since: datetime) -> list[Record | Doubt]:
    """Return the messages that wait for the store, and those in doubt, oldest first; raise SpoolError.

    Only those since then: what has waited for long may be more than memory has room for.
    """
    found: list[Record | Doubt] = []
    try:
        for path in _files(directory)[0]:
            for line in _lines(path):
                with contextlib.suppress(CorruptLineError):
                    entry = decode(line)
                    if isinstance(entry, Settled):
                        continue
                    if (entry.sent_at if isinstance(entry, Record) else entry.since) > since:
                        found.append(entry)
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
    return found


def _files(directory: Path) -> tuple[list[Path], list[Path]]:
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
    segments = [path for path in paths if SEGMENT_NAME.fullmatch(path.name)]
    return segments, [path for path in paths if path.name in (REJECTED, REPLAYED)]


def _found(path: Path) -> Found:
    found = Found(path.name)
    for line in _lines(path):
        found.size += len(line)
        try:
            _, row = contents(line)
        except CorruptLineError:
            found.corrupt += 1
            continue
        found.rows += 1
        moment = row.get("sent_at", row.get("since"))
        if isinstance(moment, str):
            found.oldest = min(moment, found.oldest or moment)
            found.newest = max(moment, found.newest or moment)
    try:
        found.reserve = max(0, path.stat().st_size - found.size)
    except FileNotFoundError:
        found.reserve = 0
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """Give the finished lines of a file."""
    try:
        end = end_of_rows(path)
        with path.open("rb") as file:
            while end > 0 and (line := file.readline(end)).endswith(b"\n"):
                end -= len(line)
                yield line
    except FileNotFoundError:
        return
