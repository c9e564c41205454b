"""The standard streams: all three are there, and what cannot be written to one is told, once.

Rules: no traceback of Python's own at the exit, and no exit status of its own.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Final, TypeGuard

__all__ = ["let_go", "not_written", "prepare"]

_NOT_WRITTEN: Final = frozenset({errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC})
_ALL: Final = ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY))


def prepare() -> None:
    """Open what the process was started without: there is nothing to read, and nothing that can be written.

    The next file or socket would get the number else, with what is meant for the stream, and libuv ends a
    process that closes such a number. What is said on standard error is lost without an error.
    """
    for number, name, flags in _ALL:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115  stays
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # every encoding of a terminal will do


def not_written(error: Exception) -> TypeGuard[OSError]:
    """Whether this is what writing to standard output ends in; who writes elsewhere has his own words."""
    return isinstance(error, OSError) and error.errno in _NOT_WRITTEN and error.filename is None


def let_go() -> None:
    """Drop what could not be written: Python would try again at its exit, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
