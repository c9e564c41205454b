"""One file of the spool that rows are appended to, with disk space taken ahead of them.

Rules:
- Behind the rows the file holds zeros, for which the file system has set blocks aside: rows are written over
  them and cannot meet a full disk. A file that is closed ends with its rows; after a crash the zeros are
  still there, and `end_of_rows` finds where they begin. No row holds a NUL (JSON escapes it).
- `append` returns once the rows are on disk (fdatasync). After it has raised OSError the file is not to be
  written to again: what a failed fsync has dropped, a later one does not report.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

__all__ = ["Segment", "end_of_rows", "sync_directory"]

_BLOCK = 1 << 16
_NOT_SUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

_log = logging.getLogger(__name__)


class Segment:
    """A new file at `path`, empty and without any space taken; raises OSError where it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Octets of rows in it, all on disk."""
        self._taken = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove()
            raise

    @property
    def free(self) -> int:
        """Octets that can be appended whether or not the disk is full."""
        return self._taken - self.size

    def take(self, octets: int) -> None:
        """Take disk space until `octets` are free; where it is not to be had, raise OSError and take none."""
        end = self.size + octets
        if end <= self._taken:
            return
        try:
            _allocate(self._file, self._taken, end)
            os.fsync(self._file)  # on a file system that allocates late, only this takes the space
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._taken)  # give back what it got of it
            raise
        self._taken = end

    def append(self, octets: bytes) -> None:
        """Put whole rows on disk behind the others; raises OSError."""
        _write_all(self._file, octets, self.size)
        os.fdatasync(self._file)
        if os.fstat(self._file).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was removed under the relay", str(self.path))
        self.size += len(octets)
        self._taken = max(self._taken, self.size)

    def close(self) -> None:
        """Close the file and give back the space behind the rows; without rows the file goes."""
        if self.size == 0:
            self.remove()
            return
        try:
            os.ftruncate(self._file, self.size)
        except OSError as error:  # what stays are zeros, or rows of a failed write: both are recognised
            _log.warning("spool: %s: cannot give back the space behind its rows: %s", self.path, error)
        finally:
            os.close(self._file)

    def remove(self) -> None:
        """Close and remove the file; raises OSError where it cannot be removed."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def end_of_rows(path: Path) -> int:
    """Return where the rows of a file end: behind its last octet that is not NUL; raises OSError."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            found = file.read(end - begin).rstrip(b"\0")
            if found:
                return begin + len(found)
            end = begin
    return 0


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _allocate(file: int, begin: int, end: int) -> None:
    """Have the file system set blocks aside for zeros from `begin` to `end`; raises OSError."""
    try:
        os.posix_fallocate(file, begin, end - begin)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        # The C library does this too, but not every one of them.
        zeros = bytes(_BLOCK)
        while begin < end:
            begin += os.pwrite(file, zeros[: end - begin], begin)


def _write_all(file: int, octets: bytes, offset: int) -> None:
    """Write `octets` at `offset`; raises OSError, perhaps with a part of them written."""
    view = memoryview(octets)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
