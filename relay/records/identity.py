"""The identity of a send: UUID version 7 (RFC 9562 section 5.7), so that rows sort by time.

Rules: within one process each identity is greater than the one before, also for equal milliseconds and when
the clock steps back (RFC 9562 section 6.2, method 2: the previous value plus a random increment).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from uuid import UUID, SafeUUID

__all__ = ["IdentitySource", "uuid7"]

_RANDOM_BITS = 74  # rand_a (12) and rand_b (62), seen as one number
_START = (1 << (_RANDOM_BITS - 1)) - 1  # a new millisecond starts in the lower half: room to count up
_STEP = (1 << 32) - 1
_RAND_B = (1 << 62) - 1
_NOISE = 10  # octets
_NOISE_AT_ONCE = 64  # the system call costs more than all the rest
_VERSION_AND_VARIANT = (7 << 76) | (2 << 62)


class IdentitySource:
    """Makes increasing version 7 UUIDs. `clock` returns nanoseconds since 1970-01-01T00:00Z."""

    __slots__ = ("_clock", "_last", "_lock", "_noise")

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._last = 0
        self._noise: list[int] = []
        self._lock = threading.Lock()

    def next(self) -> UUID:
        """Return the next identity."""
        now = self._clock() // 1_000_000
        with self._lock:
            if not self._noise:
                octets = os.urandom(_NOISE * _NOISE_AT_ONCE)
                self._noise = [
                    int.from_bytes(octets[begin : begin + _NOISE], "big")
                    for begin in range(0, len(octets), _NOISE)
                ]
            noise = self._noise.pop()
            if now > self._last >> _RANDOM_BITS:
                value = now << _RANDOM_BITS | noise & _START
            else:
                value = self._last + 1 + (noise & _STEP)
            self._last = value
        milliseconds, rand_a = value >> _RANDOM_BITS, value >> 62 & 0xFFF
        return _made(milliseconds << 80 | rand_a << 64 | value & _RAND_B | _VERSION_AND_VARIANT)


def _made(number: int) -> UUID:
    """Return `UUID(int=number)` in half its time: its checks are for other forms, and for users."""
    identity = _new(UUID)
    _set(identity, "int", number)
    _set(identity, "is_safe", _UNKNOWN)
    return identity


_UNKNOWN = SafeUUID.unknown  # a look-up that costs as much as all the rest
_new = object.__new__
_set = object.__setattr__  # that of UUID refuses: it is immutable


_SOURCE = IdentitySource()


def uuid7() -> UUID:
    """Return a new identity, greater than all that this process made before."""
    return _SOURCE.next()
