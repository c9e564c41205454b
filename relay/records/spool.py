"""The spool: accepted rows, and messages in doubt, wait here, on disk, while the store is away.

Rules:
- A row is one line, a JSON object that says its kind (`record`, `doubt`, `settled`) and carries a checksum of
  its octets. A line that a crash tore, or that the disk spoiled, is recognised, moved to `corrupt.jsonl`,
  counted, and never stops the rest.
- `append` returns once the rows are on disk (fdatasync, and the directory's fsync for a new file).
- Rows are appended to one segment file and replayed from closed ones, so the two never meet. A segment is
  removed only when all its rows are said to be kept elsewhere; after a crash it is replayed from its start
  (the store is idempotent by `task_id`).
- A row that the store rejects is in `rejected.jsonl` at least once (twice when a replay was cut short).
- One process for each directory (flock).
- Nothing here knows an event loop; calls block on the disk and come from one thread at a time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from relay.records.model import Doubt, Entry, Record, Settled

__all__ = ["Batch", "CorruptLineError", "Spool", "SpoolError", "decode", "encode"]

SEGMENT_SIZE = 64 * 1024 * 1024
"""Octets after which a new segment is begun, so that a long replay gives space back as it goes."""

_SEGMENT_NAME = re.compile(r"[0-9]{12}\.jsonl")
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","(record|doubt|settled)":(\{.*\})\}\n?', re.DOTALL)
_KINDS: dict[type[Entry], bytes] = {Record: b"record", Doubt: b"doubt", Settled: b"settled"}
_NOT_KEPT = frozenset({"doubted"})
_encode_json = json.JSONEncoder(separators=(",", ":")).encode  # ASCII: any text survives, surrogates too
_log = logging.getLogger(__name__)


class SpoolError(Exception):
    """The spool cannot be used now; the text is one line for the operator."""


class CorruptLineError(ValueError):
    """A line is not what was written."""


class Batch(NamedTuple):
    """Entries read back, oldest first, and the number of corrupt lines that stood between them."""

    records: list[Entry]
    corrupt: int


def encode(entry: Entry, reason: str | None = None) -> bytes:
    """Return the line for `entry`; `reason` is for people who read the file and is not read back.

    Raises ValueError, TypeError or RecursionError for `data` that JSON cannot carry.
    """
    kind = _KINDS[type(entry)]
    row: dict[str, object] = {
        name: getattr(entry, name) for name in entry.__dataclass_fields__ if name not in _NOT_KEPT
    }
    row["task_id"] = str(entry.task_id)
    if isinstance(entry, Record):
        row["sent_at"] = entry.sent_at.isoformat()
    elif isinstance(entry, Doubt):
        row["since"] = entry.since.isoformat()
    if reason is not None:
        # A doubt has a reason of its own.
        row["rejected" if isinstance(entry, Doubt) else "reason"] = reason
    octets = _encode_json(row).encode("ascii")
    return b'{"crc32":"%08x","%b":%b}\n' % (zlib.crc32(octets), kind, octets)


def decode(line: bytes) -> Entry:
    """Return the entry of a line; raise CorruptLineError when the line is not as it was written."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise CorruptLineError("torn, or not a line of a spool")
    checksum, kind, octets = match.groups()
    if zlib.crc32(octets) != int(checksum, 16):
        raise CorruptLineError("checksum differs")
    try:
        row = json.loads(octets)
        if kind == b"settled":
            return Settled(UUID(row["task_id"]))
        return _doubt(row) if kind == b"doubt" else _record(row)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptLineError(f"not a {kind.decode()}: {error!r}") from error


def _record(row: dict[str, Any]) -> Record:
    return Record(
        task_id=UUID(row["task_id"]),
        task_type=row["task_type"],
        sender=row["sender"],
        client=row["client"],
        sent_at=datetime.fromisoformat(row["sent_at"]),
        upstream=row["upstream"],
        upstream_reply=row["upstream_reply"],
        size=row["size"],
        duration_ms=row["duration_ms"],
        recipients=tuple(row["recipients"]),
        client_task_id=row["client_task_id"],
        message_id=row["message_id"],
        data=row["data"],
        # It has waited, and what else was kept of its message meanwhile, nobody knows here.
        doubted=True,
    )


def _doubt(row: dict[str, Any]) -> Doubt:
    return Doubt(
        task_id=UUID(row["task_id"]),
        task_type=row["task_type"],
        sender=row["sender"],
        client=row["client"],
        since=datetime.fromisoformat(row["since"]),
        upstream=row["upstream"],
        reason=row["reason"],
        size=row["size"],
        duration_ms=row["duration_ms"],
        recipients=tuple(row["recipients"]),
        client_task_id=row["client_task_id"],
        message_id=row["message_id"],
        data=row["data"],
    )


class Spool:
    """The rows that wait in `directory`. Opening makes the directory, takes its lock, finds left-over rows.

    Raises SpoolError when the directory cannot be used or another process holds it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            _make_directory(directory)
            self._lock = _lock(directory)
        except OSError as error:
            raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
        try:
            # Closed segments, oldest first.
            self._closed = sorted(path for path in directory.iterdir() if _SEGMENT_NAME.fullmatch(path.name))
            self._rows = sum(_count_lines(segment) for segment in self._closed)
        except OSError as error:
            os.close(self._lock)
            raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
        self._number = int(self._closed[-1].stem) if self._closed else 0
        self._segment: int | None = None  # descriptor of the segment that rows are appended to
        self._size = 0  # octets of it that are on disk
        self._position = 0  # in the oldest closed segment: rows before it are kept elsewhere
        self._read_to = 0
        self._read_rows = 0

    @property
    def directory(self) -> Path:
        """Where the rows wait."""
        return self._directory

    @property
    def rejected_file(self) -> Path:
        """Rows that the store will never take, in the format of a segment."""
        return self._directory / "rejected.jsonl"

    @property
    def corrupt_file(self) -> Path:
        """Lines that could not be read back, octet for octet."""
        return self._directory / "corrupt.jsonl"

    @property
    def rows(self) -> int:
        """How many rows wait (torn and corrupt lines count until they are read)."""
        return self._rows

    def append(self, lines: Sequence[bytes]) -> None:
        """Put encoded rows on disk, all of them or none; raise SpoolError when that fails."""
        try:
            segment = self._open_segment() if self._segment is None else self._segment
            octets = b"".join(lines)
            _write_all(segment, octets)
            os.fdatasync(segment)
        except OSError as error:
            self._abandon_segment()
            raise SpoolError(f"spool {self._directory}: {error.strerror or error}") from error
        self._size += len(octets)
        self._rows += len(lines)
        if self._size >= SEGMENT_SIZE:
            self._close_segment()

    def set_aside(self, line: bytes) -> None:
        """Put a row that the store will never take on disk in `rejected.jsonl`; raise SpoolError."""
        self._append_to(self.rejected_file, line)

    def read(self, limit: int) -> Batch:
        """Return up to `limit` of the oldest rows; the same ones again until `forget` is called.

        A batch may hold fewer rows than wait, or none (only corrupt lines); `rows` says whether more wait.
        """
        records: list[Entry] = []
        corrupt = lines = 0
        try:
            if not self._closed:
                self._close_segment()
            if not self._closed:
                self._rows = 0
                return Batch(records, 0)
            with self._closed[0].open("rb") as segment:
                segment.seek(self._position)
                while lines < limit and (line := segment.readline()):
                    lines += 1
                    try:
                        records.append(decode(line))
                    except CorruptLineError as error:
                        corrupt += 1
                        self._put_by_corrupt(line, error)
                self._read_to = segment.tell()
        except OSError as error:
            raise SpoolError(f"spool {self._directory}: {error.strerror or error}") from error
        self._read_rows = lines
        return Batch(records, corrupt)

    def forget(self) -> None:
        """Drop the rows that `read` returned last: they are kept elsewhere. Raise SpoolError."""
        if not self._closed:
            return
        self._position = self._read_to
        self._rows = max(0, self._rows - self._read_rows)  # a failed write may have left rows not counted
        self._read_rows = 0
        segment = self._closed[0]
        try:
            if self._position < segment.stat().st_size:
                return
            segment.unlink()
            _sync_directory(self._directory)
        except OSError as error:
            raise SpoolError(f"spool {self._directory}: {error.strerror or error}") from error
        finally:
            if not segment.exists():
                del self._closed[0]
                self._position = self._read_to = 0

    def close(self) -> None:
        """Close the files and give the directory free for another process. Rows stay where they are."""
        self._close_segment()
        os.close(self._lock)

    def _open_segment(self) -> int:
        # The one place where a segment comes into being, and with it the place to take disk space ahead.
        path = self._directory / f"{self._number + 1:012}.jsonl"
        segment = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._number += 1
        self._segment = segment
        self._size = 0
        _sync_directory(self._directory)
        return segment

    def _path(self) -> Path:
        return self._directory / f"{self._number:012}.jsonl"

    def _close_segment(self) -> None:
        """End the segment that is appended to; the next row begins a new one."""
        if self._segment is None:
            return
        segment, self._segment = self._segment, None
        self._closed.append(self._path())
        os.close(segment)

    def _abandon_segment(self) -> None:
        """Take back what a failed write may have left; after a failed fsync a file is not trusted again."""
        if self._segment is None:
            return
        try:
            os.ftruncate(self._segment, self._size)
            if self._size == 0:
                self._path().unlink()
        except OSError as error:  # the octets stay: whole rows are replayed, a torn one is recognised
            _log.warning("spool %s: cannot take back a failed write: %s", self._directory, error)
        if self._size:
            self._close_segment()
        else:
            os.close(self._segment)
            self._segment = None

    def _put_by_corrupt(self, line: bytes, error: CorruptLineError) -> None:
        kept = line if line.endswith(b"\n") else line + b"\n"
        try:
            self._append_to(self.corrupt_file, kept)
        except SpoolError as failure:  # the log is then the only place left for it
            _log.error("spool: corrupt line (%s), not kept (%s): %r", error, failure, line)
            return
        _log.error("spool: corrupt line (%s), moved to %s", error, self.corrupt_file)

    def _append_to(self, path: Path, line: bytes) -> None:
        try:
            new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # a crash tore the last line
                    line = b"\n" + line
                try:
                    _write_all(file, line)
                    os.fdatasync(file)
                except OSError:
                    os.ftruncate(file, size)
                    raise
            finally:
                os.close(file)
            if new:
                _sync_directory(self._directory)
        except OSError as error:
            raise SpoolError(f"{path}: {error.strerror or error}") from error


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    _sync_directory(directory.parent)


def _lock(directory: Path) -> int:
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise SpoolError(f"spool {directory} is in use by another process: give each its own") from error
    return lock


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as segment:
        while block := segment.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def _write_all(file: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
