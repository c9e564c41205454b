"""What transactions are given to work with, and where those are noted that must not be left in the middle."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from relay.classify import Classifier
    from relay.limits.limits import Limits
    from relay.metrics import Metrics
    from relay.pseudonyms import Pseudonyms
    from relay.records.journal import Journal
    from relay.records.recorder import Recorder

__all__ = ["Services", "Unsettled"]


class Unsettled(Protocol):
    """A message between its end of data and its outcome."""

    def check(self, now: float) -> None:
        """See whether the verdict is overdue."""

    def give_up(self) -> None:
        """Stop awaiting the verdict: the relay ends."""


@dataclass(frozen=True, slots=True)
class Services:
    """What transactions are given to work with."""

    recorder: Recorder
    journal: Journal
    """Holds each message between its end of data and its outcome, in case that the relay is killed."""
    classifier: Classifier
    metrics: Metrics
    normalize: bool
    max_message_size: int
    settling: set[Unsettled]
    """Messages between their end of data and their outcome; a shutdown waits for them."""
    settled: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)
    """Set each time that there is none left."""
    running: set[asyncio.Task[None]]
    """Keeps the tasks of transactions alive, those that wait for a connection."""
    limits: Limits | None = None
    """Rate limits, if there are any."""
    names: Pseudonyms | None = None
    """Gives recipients their pseudonyms; None: they are kept by their addresses."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    """Here, since to ask for it costs a system call (CPython 3.11)."""

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, since what becomes of it could not be kept; else None."""
        return self.recorder.refusal() or self.journal.refusal()
