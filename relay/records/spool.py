"""The spool: accepted rows, and messages in doubt, wait here, on disk, while the store is away.

Rules:
- A row is one line (`spool_line.py`). One that a crash tore, or that the disk spoiled, is recognised, moved
  to `corrupt.jsonl`, counted, and never stops the rest.
- `append` returns once the rows are on disk (fdatasync, and the directory's fsync for a new file).
- Rows are appended to one segment file, whose disk space is taken ahead of them, and a spare one stands ready
  with as much: it takes over when the first is long enough, fails, or has been replayed. The reserve is what
  is free in the segment in use; it changes hands only where the spare covers all that is promised.
- A segment is removed only when all its rows are said to be kept elsewhere; after a crash it is replayed from
  its start (the store is idempotent by `task_id`).
- A row that the store rejects, or that another version wrote, is in `rejected.jsonl` at least once (twice
  when a replay was cut short).
- One process for each directory (flock).
- Nothing here knows an event loop; calls block on the disk and come from one thread at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from relay.records.aside import append_line
from relay.records.model import Entry
from relay.records.reserve import Reserve
from relay.records.segment import Segment, end_of_rows, sync_directory
from relay.records.spool_line import CorruptLineError, UnknownRowError, decode

__all__ = [
    "BATCH_SIZE",
    "CORRUPT",
    "LOCK",
    "REJECTED",
    "REPLAYED",
    "RESERVE",
    "SEGMENT_NAME",
    "Batch",
    "Spool",
    "SpoolError",
    "SpoolInUseError",
]

RESERVE = 1024 * 1024
"""Octets of disk space that are taken ahead of the rows, twice: in the segment in use, and in the spare."""

SEGMENT_SIZE = 64 * 1024 * 1024
"""Octets after which a new segment is begun, so that a long replay gives space back as it goes."""

BATCH_SIZE = 1024 * 1024
"""Octets of rows that are read at once, or one row: it may have a thousand recipients, and their refusals."""

SEGMENT_NAME = re.compile(r"[0-9]{12}\.jsonl")
REJECTED = "rejected.jsonl"
REPLAYED = "rejected.replayed.jsonl"
"""What was `rejected.jsonl` and is being offered to the store again."""
CORRUPT = "corrupt.jsonl"
LOCK = "lock"
"""Held by the process whose spool it is."""

_log = logging.getLogger(__name__)


class SpoolError(Exception):
    """The spool cannot be used now; the text is one line for the operator."""


class SpoolInUseError(SpoolError):
    """Another process has the spool: a relay that is running."""


class Batch(NamedTuple):
    """Entries read back, oldest first, and the number of corrupt lines that stood between them."""

    records: list[Entry]
    corrupt: int


class _Spoiled(NamedTuple):
    """A corrupt line, and its number in its segment."""

    number: int
    line: bytes
    error: CorruptLineError

    @property
    def whole(self) -> bytes:
        """The line with its end."""
        return self.line if self.line.endswith(b"\n") else self.line + b"\n"


class _Told(NamedTuple):
    """How many corrupt lines the log has been told of, and how many were moved."""

    told: int
    moved: int


class _Closed(NamedTuple):
    """A segment that nothing is appended to, and where its rows end."""

    path: Path
    end: int


class Spool:
    """The rows that wait in `directory`. Opening makes the directory, takes its lock, finds left-over rows.

    `reserve` is the disk space that is taken ahead, in octets; where it is not to be had, `shortage` says why
    and `provide` tries again. Raises SpoolError when the directory cannot be used or another process holds
    it.
    """

    def __init__(self, directory: Path, reserve: int = RESERVE) -> None:
        self._directory = directory
        self._usual = reserve
        self.reserve = Reserve()
        try:
            _make_directory(directory)
            self._lock = _lock(directory)
        except OSError as error:
            raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
        try:
            # Closed segments, oldest first.
            left = sorted(path for path in directory.iterdir() if SEGMENT_NAME.fullmatch(path.name))
            self._closed = _with_rows(left)
            self._rows = sum(_count_lines(*segment) for segment in self._closed)
        except OSError as error:
            os.close(self._lock)
            raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
        self._number = int(left[-1].stem) if left else 0
        self._segment: Segment | None = None  # the one that rows are appended to
        self._spare: Segment | None = None
        self._position = 0  # in the oldest segment: rows before it are kept elsewhere
        self._read_to = 0
        self._lines = 0  # before the position
        self._read_rows = 0
        self._spoiled: dict[Path, _Told] = {}
        """Corrupt lines of the oldest segment, by the file that they were moved to."""
        self.shortage: str | None = None
        """Why the reserve was not had when the spool was opened."""
        try:
            self.provide()
        except SpoolError as error:
            self.shortage = str(error)

    @property
    def directory(self) -> Path:
        """Where the rows wait."""
        return self._directory

    @property
    def rejected_file(self) -> Path:
        """Rows that the store will never take, in the format of a segment."""
        return self._directory / REJECTED

    @property
    def corrupt_file(self) -> Path:
        """Lines that could not be read back, octet for octet."""
        return self._directory / CORRUPT

    @property
    def rows(self) -> int:
        """How many rows wait (torn and corrupt lines count until they are read)."""
        return self._rows

    @property
    def size(self) -> int:
        """How many octets of rows wait."""
        in_use = 0 if self._segment is None else self._segment.size
        return sum(segment.end for segment in self._closed) + in_use - self._position

    @property
    def complete(self) -> bool:
        """Whether the reserve is as large as usual, or nearly, and the spare is there."""
        spare = self._spare
        return spare is not None and min(self.reserve.free, spare.free) >= self._usual * 3 // 4

    # The reserve

    def provide(self, octets: int = 0) -> None:
        """Take disk space until the reserve has `octets`, but at least its usual size; raise SpoolError.

        Where more than usual is not to be had, the usual size is tried as well before the error is raised.
        """
        try:
            try:
                self._provide(max(octets, self._usual))
            except OSError:
                if octets > self._usual:
                    self._provide(self._usual)
                raise
        except OSError as error:
            raise self._error(error) from error
        finally:
            self._tell_reserve()

    def _provide(self, octets: int) -> None:
        if self._segment is None:
            self._segment = self._make_segment()
        self._recycle()
        self._segment.take(octets)
        self._tell_reserve()
        if self._spare is None:
            self._spare = self._make_segment()
        self._spare.take(octets)

    def _tell_reserve(self) -> None:
        self.reserve.became(self._segment.free if self._segment is not None else 0)

    def _make_segment(self) -> Segment:
        segment = Segment(self._directory / f"{self._number + 1:012}.jsonl")
        self._number += 1
        return segment

    def _recycle(self) -> None:
        """Remove the segment in use if all its rows are kept elsewhere; raise OSError.

        Not where that would break a promise: then it is used on, and this is tried again.
        """
        segment, spare = self._segment, self._spare
        if self._closed or segment is None or not 0 < segment.size <= self._position:
            return
        if self.reserve.may_become(spare.free if spare is not None else 0):
            self._segment, self._spare = spare, None
            self._begin_next(segment.path)
            segment.remove()
            sync_directory(self._directory)
            if self._segment is None:
                self._segment = self._make_segment()

    # Rows in

    def append(self, lines: Sequence[bytes]) -> None:
        """Put encoded rows on disk, all of them or none; raise SpoolError when that fails."""
        octets = b"".join(lines)
        try:
            self._append(octets)
        except OSError as error:
            if self._segment is None:
                raise self._error(error) from error
            try:  # the spare has taken over
                self._append(octets)
            except OSError as again:
                raise self._error(again) from again
        self._rows += len(lines)

    def _append(self, octets: bytes) -> None:
        if self._segment is None:
            self._segment = self._make_segment()
        try:
            self._segment.append(octets)
        except OSError as error:
            _log.warning("spool: %s is given up: %s", self._segment.path, error.strerror or error)
            self._take_spare()
            raise
        finally:
            self._tell_reserve()
        spare = self._spare
        if self._segment.size >= SEGMENT_SIZE and spare is not None and self.reserve.may_become(spare.free):
            self._take_spare()

    def _take_spare(self) -> None:
        """End the segment in use; the next row goes to the spare one."""
        segment, self._segment, self._spare = self._segment, self._spare, None
        if segment is None:
            return
        if segment.size:
            self._closed.append(_Closed(segment.path, segment.size))
        with contextlib.suppress(OSError):  # an empty one that cannot be removed is removed by the next start
            segment.close()

    def set_aside(self, line: bytes) -> None:
        """Put a row that the store will never take on disk in `rejected.jsonl`; raise SpoolError."""
        self._append_to(self.rejected_file, line)

    # Rows out

    def read(self, limit: int) -> Batch:
        """Return up to `limit` of the oldest rows, fewer of big ones; the same until `forget` is called.

        A batch may hold fewer rows than wait, or none (only corrupt lines, or a segment that somebody has
        removed or cut short, whose rows count as such); `rows` says whether more wait.
        """
        records: list[Entry] = []
        corrupt: list[_Spoiled] = []
        lines = 0
        oldest = self._oldest()
        if oldest is None:
            self._rows = 0
            return Batch(records, 0)
        try:
            with oldest.path.open("rb") as segment:
                at = segment.seek(self._position)
                while lines < limit and at < oldest.end and at - self._position < BATCH_SIZE:
                    if not (line := segment.readline(oldest.end - at)):
                        break
                    lines += 1
                    at += len(line)
                    try:
                        records.append(decode(line))
                    except CorruptLineError as error:
                        corrupt.append(_Spoiled(self._lines + lines, line, error))
                self._read_to = at
        except FileNotFoundError as error:
            if not _missing(oldest.path):  # all of it is away, and may come back
                raise self._error(error) from error
            return Batch([], self._give_up(oldest, "removed"))
        except OSError as error:
            raise self._error(error) from error
        if not lines:  # the file ends before its rows do
            return Batch([], self._give_up(oldest, "cut short"))
        self._read_rows = lines
        # What another version can read is no rubbish: it can be replayed once that one is back.
        for unknown, path in ((True, self.rejected_file), (False, self.corrupt_file)):
            moved = [each for each in corrupt if isinstance(each.error, UnknownRowError) is unknown]
            self._put_by(oldest.path, moved, path)
        return Batch(records, len(corrupt))

    def _give_up(self, missing: _Closed, how: str) -> int:
        """Go on without the oldest segment, or the rest of it; return how many rows it had."""
        if not self._closed:
            self._take_spare()
            self._tell_reserve()
        del self._closed[0]
        self._read_rows = 0
        self._begin_next(missing.path)
        left = [each for each in self._closed if each.path.exists()]
        if self._segment is not None and self._segment.path.exists():
            left.append(_Closed(self._segment.path, self._segment.size))
        found = sum(_count_lines(*each) for each in left)
        gone, self._rows = max(0, self._rows - found), found
        _log.error("spool: %s was %s under the relay; rows that waited in it: %d", missing.path, how, gone)
        return gone

    def forget(self) -> None:
        """Drop the rows that `read` returned last: they are kept elsewhere. Raise SpoolError."""
        oldest = self._oldest()
        if oldest is None:
            return
        self._position = self._read_to
        self._lines += self._read_rows
        self._rows = max(0, self._rows - self._read_rows)
        self._read_rows = 0
        try:
            if not self._closed:
                self._recycle()
            elif self._position >= oldest.end:
                oldest.path.unlink(missing_ok=True)
                del self._closed[0]
                self._begin_next(oldest.path)
                sync_directory(self._directory)
        except OSError as error:
            raise self._error(error) from error

    def _oldest(self) -> _Closed | None:
        """The segment to read from: rows may be appended to it behind those that are read."""
        if self._closed:
            return self._closed[0]
        segment = self._segment
        if segment is None or segment.size <= self._position:
            return None
        return _Closed(segment.path, segment.size)

    def close(self) -> None:
        """Close the files and give the directory free for another process. Rows stay where they are."""
        for segment in (self._segment, self._spare):
            if segment is None:
                continue
            replayed = segment is self._segment and not self._closed and segment.size <= self._position
            with contextlib.suppress(OSError):  # what stays is recognised by the next start
                (segment.remove if replayed else segment.close)()
        self._segment = self._spare = None
        os.close(self._lock)

    def _error(self, error: OSError) -> SpoolError:
        return SpoolError(f"spool {self._directory}: {error.strerror or error}")

    def _put_by(self, segment: Path, lines: Sequence[_Spoiled], path: Path) -> None:
        """Move corrupt lines to a file of their own; the log is told once for a segment, and at its end."""
        if not lines:
            return
        try:
            self._append_to(path, b"".join(each.whole for each in lines))
        except SpoolError as failure:  # the log is then the only place left for them
            for each in lines:
                _log.error("spool: corrupt line (%s), not kept (%s): %r", each.error, failure, each.line)
            return
        known = self._spoiled.get(path)
        if known is not None:
            self._spoiled[path] = known._replace(moved=known.moved + len(lines))
            return
        self._spoiled[path] = _Told(len(lines), len(lines))
        first = lines[0]
        _log.error(
            "spool: corrupt lines in %s: %d, the first is line %d (%s), moved to %s",
            *(segment, len(lines), first.number, first.error, path),
        )

    def _begin_next(self, done: Path) -> None:
        """The oldest segment has no rows any more: go on with the one behind it."""
        self._position = self._read_to = self._lines = 0
        for path, (told, moved) in self._spoiled.items():
            if moved > told:
                _log.error("spool: corrupt lines in %s: %d in all, moved to %s", done, moved, path)
        self._spoiled.clear()

    def _append_to(self, path: Path, line: bytes) -> None:
        try:
            append_line(path, line)
        except OSError as error:
            raise SpoolError(f"{path}: {error.strerror or error}") from error


def _missing(path: Path) -> bool:
    """Whether the directory is there without the file; asked of one directory, which may just come back."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.stat(path.name, dir_fd=directory)
    except FileNotFoundError:
        return True
    else:
        return False
    finally:
        os.close(directory)


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    sync_directory(directory.parent)


def _lock(directory: Path) -> int:
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise SpoolInUseError(f"spool {directory} is in use by another process: give each its own") from error
    return lock


def _with_rows(segments: Sequence[Path]) -> list[_Closed]:
    """Find the rows in segments that a process left; what holds none goes. Raises OSError."""
    closed = []
    for path in segments:
        end = end_of_rows(path)
        if end == 0:
            path.unlink()
            continue
        if end < path.stat().st_size:  # a crash: zeros stand behind the rows
            os.truncate(path, end)
        closed.append(_Closed(path, end))
    return closed


def _count_lines(path: Path, end: int) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as segment:
        while end and (block := segment.read(min(end, 1 << 20))):
            end -= len(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")
