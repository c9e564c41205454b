"""An event loop without I/O, whose clock the test moves: everything that happens is the test's doing.

Rules: time stands still but for `advance`. Nothing runs but in `quiet`, which ends when nothing is left to
run, or in `at_once`, which is one call as a transport would make it, before any task has its turn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Clockwork"]

_Result = TypeVar("_Result")

_FLUSH = "_Output.flush"  # the mail log's own, at the end of each turn; it decides nothing
_TURNS = 10_000  # more turns than anything takes: two callbacks call each other


class _NoSelector:
    def select(self, timeout: float | None) -> list[Any]:
        assert timeout == 0, "the loop would sleep"
        return []


class Clockwork(asyncio.BaseEventLoop):
    """The loop. `errors` are the exceptions that nobody caught."""

    def __init__(self, now: float = 1000.0) -> None:
        super().__init__()
        self._selector = _NoSelector()
        self._clock_resolution = 1e-9
        self._now = now
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self._now

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Nothing ever waits in the selector."""

    def at_once(self, act: Callable[[], _Result]) -> _Result:
        """Call `act` within the loop; what it schedules waits for `quiet`."""
        asyncio._set_running_loop(self)
        try:
            return act()
        finally:
            asyncio._set_running_loop(None)

    @property
    def pending(self) -> tuple[str, ...]:
        """What waits for its turn."""
        names = (_name(handle._callback) for handle in self._ready if not handle._cancelled)
        return tuple(name for name in names if name != _FLUSH)

    def quiet(self) -> None:
        """Run until nothing is left to run at this time."""
        asyncio._set_running_loop(self)
        try:
            for _ in range(_TURNS):
                if not self._ready and self._next_timer() > self._now:
                    return
                self._run_once()  # type: ignore[attr-defined]
        finally:
            asyncio._set_running_loop(None)
        raise AssertionError("no end in sight")

    def advance(self, seconds: float) -> None:
        """Let time pass, from one timer that is due to the next."""
        self.quiet()
        end = self._now + seconds
        while True:
            due = self._next_timer()
            if due >= end:
                break
            self._now = max(due, self._now)
            self.quiet()
        self._now = end
        self.quiet()

    def _next_timer(self) -> float:
        return min([each._when for each in self._scheduled if not each._cancelled], default=math.inf)


def _name(callback: Any) -> str:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return f"step of {owner.get_coro().__qualname__}"  # type: ignore[union-attr]
    return getattr(callback, "__qualname__", type(callback).__name__)
