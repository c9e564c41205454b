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
        if value is None or isinstance(value, bool | int | str | bytes | bytearray | Enum):
            return bytes(value) if isinstance(value, bytearray) else value
        if isinstance(value, float):
            return value if value < _DURATION else round(self._now - value, 3)
        if isinstance(value, Reply):
            return value.code
        if isinstance(value, UUID):
            return None
        if isinstance(value, Mapping):
            return tuple((self.picture(key), self.picture(each)) for key, each in value.items())
        if isinstance(value, list | tuple | deque):
            return tuple(self.picture(each) for each in value)
        if isinstance(value, set | frozenset):
            return frozenset(self.picture(each) for each in value)
        return self._thing(value)

    def _thing(self, value: Any) -> object:
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if isinstance(value, asyncio.Task):
            return "task", value.done(), value.cancelling(), _where(value.get_coro())
        if isinstance(value, asyncio.Future):
            return "future", value.done(), value.cancelled()
        kind = type(value)
        if kind.__module__.startswith("relay.") and not kind.__module__.startswith(_PASSIVE):
            return kind.__name__, tuple(
                (name, self.picture(each)) for name, each in _fields(value) if name not in _MEASUREMENTS
            )
        return getattr(value, "__qualname__", kind.__name__)


def _fields(value: object) -> list[tuple[str, Any]]:
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [(name, getattr(value, name)) for name in sorted(names) if hasattr(value, name)]
    return found + sorted(getattr(value, "__dict__", {}).items())


def _where(coroutine: Any) -> tuple[tuple[str, int], ...]:
    """Where a task stands: the instructions of its coroutines that wait, from the outermost on."""
    found = []
    while coroutine is not None and getattr(coroutine, "cr_frame", None) is not None:
        found.append((coroutine.__qualname__, coroutine.cr_frame.f_lasti))
        coroutine = coroutine.cr_await
    return tuple(found)
