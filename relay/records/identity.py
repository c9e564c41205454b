"""The identity of a send: UUID version 7 (RFC 9562 section 5.7), so that rows sort by time.

Rules: within one process each identity is greater than the one before, also for equal times and when the
clock steps back. `rand_a` is the time beyond the millisecond (RFC 9562 section 6.2, method 3), `rand_b`
begins at random with each time and goes on in random steps (method 2).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID, SafeUUID

__all__ = ["IdentitySource", "uuid7"]

_RAND_B: Final = 62  # bits
_START: Final = (1 << (_RAND_B - 1)) - 1  # in the lower half: room to count up
_STEP: Final = (1 << 32) - 1
_VERSION: Final = 7 << 12
_VARIANT: Final = 2 << _RAND_B
_NOISE_AT_ONCE: Final = 64  # numbers of 64 bits; the system call costs more than all the rest


class IdentitySource:
    """Makes increasing version 7 UUIDs. `clock` returns nanoseconds since 1970-01-01T00:00Z."""

    __slots__ = ("_clock", "_count", "_lock", "_noise", "_time")

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._time = -1  # of the last one, in units of 1/4096 ms
        self._count = 0  # its rand_b
        self._noise: list[int] = []
        self._lock = threading.Lock()

    def next(self) -> UUID:
        """Return the next identity."""
        now = self._clock()
        moment = now // 1_000_000 << 12 | (now % 1_000_000 << 12) // 1_000_000
        with self._lock:
            if not self._noise:
                self._noise = memoryview(os.urandom(8 * _NOISE_AT_ONCE)).cast("Q").tolist()
            noise = self._noise.pop()
            if moment > self._time:
                count = noise & _START
            else:
                moment, count = self._time, self._count + 1 + (noise & _STEP)
                if count >> _RAND_B:
                    moment, count = moment + 1, noise & _START
            self._time, self._count = moment, count
        # Numbers of more than 62 bits only at the end: they cost as much as all before them.
        return _made((moment >> 12 << 16 | _VERSION | moment & 0xFFF) << 64 | _VARIANT | count)


def _made(number: int) -> UUID:
    """Return `UUID(int=number)` in half its time: its checks are for other forms, and for users."""
    identity = _new(UUID)
    _set(identity, "int", number)
    _set(identity, "is_safe", _UNKNOWN)
    return identity


_UNKNOWN: Final = SafeUUID.unknown  # a look-up that costs as much as all the rest
_new: Final = object.__new__
_set: Final = object.__setattr__  # that of UUID refuses: it is immutable


_SOURCE: Final = IdentitySource()


def uuid7() -> UUID:
    """Return a new identity, greater than all that this process made before."""
    return _SOURCE.next()
