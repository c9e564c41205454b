"""Files of lines that are set aside: they grow at their end, and may be taken away while a relay runs.

Rules: a line is on disk when `append_line` returns, behind a line end even where a crash tore the line before
it. Who appends and who takes a file away hold its lock for that moment, so that no line goes to a file that
was taken. A file that root makes, with a command beside the relay, is the directory's owner's, as it is with
SQLite's own. Calls block on the disk and raise OSError.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from relay.records.segment import sync_directory

__all__ = ["append_line", "take_away"]


def append_line(path: Path, line: bytes) -> None:
    """Put `line`, which ends with a newline, at the end of the file, all of it or nothing."""
    while not _append(path, line):
        pass  # taken away between the open and the lock


def take_away(path: Path, to: Path) -> bool:
    """Give the file another name, so that the next line begins a new file; return False if there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        path.rename(to)
        sync_directory(path.parent)
    finally:
        os.close(file)
    return True


def _append(path: Path, line: bytes) -> bool:
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_at(file, path):
            return False
        if new and os.geteuid() == 0:
            owner = path.parent.stat()
            with contextlib.suppress(PermissionError):  # root without that right, as in a container
                os.fchown(file, owner.st_uid, owner.st_gid)
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
        sync_directory(path.parent)
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write_all(file: int, octets: bytes) -> None:
    view = memoryview(octets)
    while view:
        view = view[os.write(file, view) :]
