"""What was read a moment ago, kept for the next one who looks.

Rules. However many look, the process is asked and the records are read no oftener than what is kept gets old:
what took long to read is kept for longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

__all__ = ["Kept"]

T = TypeVar("T")

_REST: Final = 100
_SHORTEST_REST_S, _LONGEST_REST_S = 5.0, 300.0
"""What was read rests so many times as long as reading it took, within these bounds."""


class Kept:
    """What was read a moment ago, by name. Who comes while it is read waits for the same reading."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, Any]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def get(
        self, name: str, read: Callable[[], Awaitable[T]], *, at_most: float = _LONGEST_REST_S
    ) -> T:
        """Return what `read` gives, or gave not long ago."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            good_until, value = self._values.get(name, (0.0, None))
            begun = time.monotonic()
            if begun < good_until:
                kept: T = value
                return kept
            fresh = await read()
            ended = time.monotonic()
            rest = min(max((ended - begun) * _REST, _SHORTEST_REST_S), at_most)
            self._values[name] = ended + rest, fresh
            return fresh
