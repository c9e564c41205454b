"""The file of a SQLite database: which one a URL names, whether it can be used, whether it is still there.

SQLite follows links, and keeps its files beside the one that it finds.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from relay.records.errors import MissingStoreError, StoreError
from relay.records.sqlite.errors import NOT_A_DATABASE

__all__ = ["SMALLEST", "Place", "check_makeable", "find", "log_of", "no_such_file", "path_of"]

FILE_MODE = 0o640
"""At most: the file holds addresses, so it is not for everyone; a group may read it (for a dashboard)."""
DIRECTORY_MODE = 0o750
SMALLEST = 512
"""Octets of the smallest database: SQLite takes a shorter file for an empty one, and would write over it."""


def path_of(url: str) -> Path:
    """Return the file that a `records.url` names.

    `sqlite:///` is followed by the path: relative to the working directory, or absolute with its own slash.
    Raises StoreError for every other URL; the text never repeats it, since it may hold a password.
    """
    scheme, separator, rest = url.partition("://")
    if scheme != "sqlite" or not separator:
        raise StoreError("records.url: only sqlite:///PATH and postgresql://USER@HOST/DATABASE are known")
    if not rest.startswith("/"):
        raise StoreError("records.url: a SQLite URL has three slashes before its path: sqlite:///PATH")
    path = rest[1:]
    if path in {"", ":memory:"} or "?" in path:
        raise StoreError("records.url: sqlite:/// is followed by the path of a file, and by nothing else")
    return Path(path)


def log_of(path: Path) -> Path:
    """Return the write-ahead log of the file at `path`, which is there while somebody has the file open."""
    real = path.resolve()
    return real.with_name(f"{real.name}-wal")


class Place:
    """Where a database was opened: its file and its write-ahead log, as they were then."""

    def __init__(self, path: Path) -> None:
        """Look at the file at `path`, which is open."""
        self._path = str(path)
        self._log = str(log_of(path))
        self._file_there = _identity(self._path)
        self._log_there = _identity(self._log)

    @property
    def left(self) -> bool:
        """Whether there is another file now, or none, where the database was opened."""
        return _identity(self._path) != self._file_there

    @property
    def log_replaced(self) -> str | None:
        """The path of the log if there is another one now, or none; None: it is the one that was."""
        if self._log_there is None or _identity(self._log) == self._log_there:
            return None
        return self._log


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - for each commit
    except OSError:
        return None
    return found.st_dev, found.st_ino


def find(path: Path, *, create: bool) -> None:
    """Make sure that there is a file that can be written, as far as the file system can tell."""
    try:
        if not path.exists():
            if not create:
                raise no_such_file(path)
            _make(path)
        if not path.is_file():
            raise StoreError(f"{path}: is not a file; name a file in records.url")
        if 0 < path.stat().st_size < SMALLEST:
            raise StoreError(f"{path}: {NOT_A_DATABASE}")
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; change records.url, or the rights of its path"
        ) from error
    effective = os.access in os.supports_effective_ids
    real = path.resolve()
    for file in (path, real.with_name(f"{real.name}-wal"), real.with_name(f"{real.name}-shm")):
        # One beside that cannot be written is no error for SQLite until something is to be written.
        if file.exists() and not os.access(file, os.R_OK | os.W_OK, effective_ids=effective):
            raise StoreError(f"{file}: cannot be written; give the relay's user the file")
    if not os.access(real.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise StoreError(f"{real.parent}: cannot be written, and SQLite keeps files beside its own there")


def _make(path: Path) -> None:
    """Make an empty file; here and not by SQLite for its mode, which the files beside it take over."""
    path.parent.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    # EXCL: a file that exists is never opened here, since to close it would drop the locks that SQLite holds
    # on it elsewhere in this process (POSIX locks work so). If it has come up just now, another made it.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE))


def check_makeable(path: Path) -> None:
    """Raise StoreError unless there is a file, or `find` could make one, as far as the file system tells."""
    if os.path.exists(path):  # noqa: PTH110 - which raises nothing
        return
    if path.is_symlink():
        raise StoreError(f"{path}: is not a file; name a file in records.url")
    directory = path.parent.absolute()
    while not os.path.exists(directory):  # noqa: PTH110
        directory = directory.parent
    effective = os.access in os.supports_effective_ids
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK, effective_ids=effective):
        raise StoreError(
            f"{path}: cannot be made in {directory}; change records.url, or the rights of its path"
        )


def no_such_file(path: Path) -> MissingStoreError:
    """Say that there is none."""
    return MissingStoreError(f"{path}: no such file; nothing was recorded yet, or records.url names another")
