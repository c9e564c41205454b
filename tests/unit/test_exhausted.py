"""What a limit of the process is, among errors."""

from __future__ import annotations

import errno
import os
import ssl

import pytest

from relay.exhausted import exhausted


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("/lib/x.so: failed to map segment from shared object"),
        ImportError("/lib/x.so: cannot allocate memory in static TLS block"),
        ssl.SSLError("[CRYPTO] malloc failure (_ssl.c:3098)"),
    ],
)
def test_memory(error: BaseException) -> None:
    assert exhausted(error) == "this process may have no more memory: raise its limit (LimitAS, ulimit -v)"


def test_threads_also_where_another_error_was_made_of_it() -> None:
    error = LookupError("nothing")
    error.__cause__ = RuntimeError("can't start new thread")
    limit = exhausted(error)
    assert limit is not None
    assert limit.startswith("this process may have no more threads: raise its limit of tasks (TasksMax")


@pytest.mark.parametrize(
    "error", [RuntimeError("thread"), OSError(errno.ENOENT, "malloc"), ImportError("no module"), KeyError(1)]
)
def test_others(error: BaseException) -> None:
    assert exhausted(error) is None
