"""What the system has no more of for this process, where an error comes of that: threads, or memory.

Such an error is no defect, whatever step it ended, and a traceback says nothing: a higher limit helps.
"""

from __future__ import annotations

import errno

__all__ = ["exhausted"]

_THREADS = (
    "this process may have no more threads: raise its limit of tasks (TasksMax, --pids-limit, ulimit -u) "
    "or of memory (LimitAS, ulimit -v)"
)
_MEMORY = "this process may have no more memory: raise its limit (LimitAS, ulimit -v)"
_SAID = ("failed to map segment", "cannot allocate memory", "malloc failure")
"""By the dynamic linker and by OpenSSL, whose errors have no code that says so."""


def exhausted(error: BaseException) -> str | None:
    """Return what to raise, if the error, or what it was made of, comes of a limit of this process."""
    each: BaseException | None = error
    while each is not None:
        said = " ".join(text for text in each.args if isinstance(text, str)).lower()
        if isinstance(each, RuntimeError) and "can't start new thread" in said:
            return _THREADS
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return _MEMORY
        if isinstance(each, ImportError | OSError) and any(words in said for words in _SAID):
            return _MEMORY
        each = each.__cause__
    return None
