"""What the future of some objects depends on, as a value: two that are equal will behave alike.

Rules: the relay's own objects are taken apart into their fields, whatever these are called, so that a new one
is seen without anybody thinking of it. Left out is what decides nothing: identifiers, measurements, texts of
replies, metrics and settings. Times are ages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any
from uuid import UUID

from relay.reply import Reply

__all__ = ["snapshot"]

_PASSIVE = ("relay.metrics", "relay.settings", "relay.classify", "relay.maillog")
_DURATION = 900.0  # the clock begins beyond it, so less than this is no time
_MEASUREMENTS = frozenset(("waited_s", "upstream_s", "commit_s", "total_s", "opened_at", "began", "_key"))


def snapshot(loop: asyncio.AbstractEventLoop, roots: Iterable[object]) -> object:
    """Return a value that stands for `roots` and everything of the relay that they hold."""
    return _Camera(loop.time()).picture(list(roots))


class _Camera:
    def __init__(self, now: float) -> None:
        self._now = now
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # alive, so that no two have the same id

    def picture(self, value: Any) -> object:
        sort, slots = _sort(type(value))
        if sort is _Sort.PLAIN:
            return value
        if sort is _Sort.NUMBER:
            return value if value < _DURATION else round(self._now - value, 3)
        if sort is _Sort.REPLY:
            return value.code
        if sort is _Sort.IDENTIFIER:
            return None
        if sort is _Sort.BUFFER:
            return bytes(value)
        if sort is _Sort.MAPPING:
            return tuple([(self.picture(key), self.picture(each)) for key, each in value.items()])
        if sort is _Sort.SEQUENCE:
            return tuple([self.picture(each) for each in value])
        if sort is _Sort.SET:
            return frozenset([self.picture(each) for each in value])
        return self._thing(value, sort, slots)

    def _thing(self, value: Any, sort: _Sort, slots: tuple[str, ...]) -> object:
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if sort is _Sort.TASK:
            return "task", value.done(), value.cancelling(), _where(value.get_coro())
        if sort is _Sort.FUTURE:
            return "future", value.done(), value.cancelled()
        kind = type(value)
        if sort is _Sort.OTHER:
            return getattr(value, "__qualname__", kind.__name__)
        pictures = [(name, self.picture(getattr(value, name))) for name in slots if hasattr(value, name)]
        for name, each in sorted(getattr(value, "__dict__", {}).items()):
            if name not in _MEASUREMENTS:
                pictures.append((name, self.picture(each)))
        return kind.__name__, tuple(pictures)


class _Sort(Enum):
    """How objects of a class are pictured."""

    PLAIN = (type(None), bool, int, str, bytes, Enum)
    NUMBER = (float,)
    REPLY = (Reply,)
    IDENTIFIER = (UUID,)
    BUFFER = (bytearray,)
    MAPPING = (Mapping,)
    SEQUENCE = (list, tuple, deque)
    SET = (set, frozenset)
    TASK = (asyncio.Task,)
    FUTURE = (asyncio.Future,)
    OF_RELAY = "its fields"
    OTHER = "its name"


@cache
def _sort(kind: type) -> tuple[_Sort, tuple[str, ...]]:
    """Return how a class is pictured, and the slots that decide something where it is the relay's own."""
    for sort in _Sort:
        if isinstance(sort.value, tuple) and issubclass(kind, sort.value):
            return sort, ()
    if not kind.__module__.startswith("relay.") or kind.__module__.startswith(_PASSIVE):
        return _Sort.OTHER, ()
    names = {name for each in kind.__mro__ for name in getattr(each, "__slots__", ())}
    return _Sort.OF_RELAY, tuple(sorted(names - _MEASUREMENTS))


def _where(coroutine: Any) -> tuple[tuple[str, int], ...]:
    """Where a task stands: the instructions of its coroutines that wait, from the outermost on."""
    found = []
    while coroutine is not None and getattr(coroutine, "cr_frame", None) is not None:
        found.append((coroutine.__qualname__, coroutine.cr_frame.f_lasti))
        coroutine = coroutine.cr_await
    return tuple(found)
