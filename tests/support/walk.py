"""Every order of events on a `Stage`, breadth first, up to a depth.

Rules: a stage cannot be copied, so each way is walked from its beginning. Each event is followed by
everything that follows from it by itself, and, in a way of its own, by nothing: the next event then comes in
the same turn of the event loop. Two ways that lead to the same place (`Stage.mark`) are one: what is behind
it is looked at once. At each new place the stage's `finale` is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.support.stage import Event, Stage

__all__ = ["BrokenPromiseError", "Walk", "walk"]

Step = tuple[Event, bool]
"""An event, and whether what follows from it happens before the next one."""


class BrokenPromiseError(AssertionError):
    """A promise that was broken, and the way that led there."""

    def __init__(self, way: Sequence[Step], error: Exception) -> None:
        shown = ", ".join(f"{who} {what}{'' if quiet else ' &'}" for (who, what), quiet in way)
        super().__init__(f"{type(error).__name__}: {error}\nafter: {shown}\nsteps: {list(way)!r}")
        self.way = tuple(way)


@dataclass
class Walk:
    """How far a walk came."""

    places: int = 0
    steps: int = 0


def walk(make: Callable[[], Stage], opening: Sequence[Event], depth: int) -> Walk:
    """Walk every order of `depth` events behind `opening`; raises BrokenPromiseError."""
    walker = _Walker(make)
    ways = [_Way.begin(make, opening)]
    for _ in range(depth):
        ways = [longer for way in ways for event in way.events for longer in walker.go(way, event)]
    return Walk(len(walker.seen), walker.steps)


@dataclass(frozen=True)
class _Way:
    steps: tuple[Step, ...]
    events: list[Event]
    """What can happen next."""

    @classmethod
    def begin(cls, make: Callable[[], Stage], opening: Sequence[Event]) -> _Way:
        steps = tuple((event, True) for event in opening)
        stage = make()
        for event, quiet in steps:
            stage.do(event, quiet=quiet)
        events = stage.enabled()
        stage.discard()
        return cls(steps, events)


class _Walker:
    def __init__(self, make: Callable[[], Stage]) -> None:
        self._make = make
        self.seen: set[int] = set()
        self.steps = 0

    def go(self, way: _Way, event: Event) -> list[_Way]:
        """Return the ways to new places that begin with `way` and `event`."""
        at_once, more = self._step((*way.steps, (event, False)))
        if not more:  # nothing follows from it by itself
            return [] if at_once is None else [at_once]
        after, _ = self._step((*way.steps, (event, True)))
        return [each for each in (at_once, after) if each is not None]

    def _step(self, steps: tuple[Step, ...]) -> tuple[_Way | None, bool]:
        """Go a way; return it if it leads to a new place, and whether something follows by itself."""
        self.steps += 1
        stage = self._make()
        try:
            for event, quiet in steps:
                stage.do(event, quiet=quiet)
            more = bool(stage.loop.pending)
            mark = hash(stage.mark())  # the marks themselves would fill the memory
            if mark in self.seen:
                stage.discard()
                return None, more
            self.seen.add(mark)
            events = stage.enabled()
            stage.finale()
        except Exception as error:
            stage.discard()
            raise BrokenPromiseError(steps, error) from error
        return _Way(steps, events), more
