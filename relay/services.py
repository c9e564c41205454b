"""What transactions are given to work with, and where those are noted that must not be left in the middle."""

from __future__ import annotations

import asyncio
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


class Services:
    """What transactions are given to work with."""

    __slots__ = (
        "classifier",
        "journal",
        "limits",
        "loop",
        "max_message_size",
        "metrics",
        "names",
        "normalize",
        "recorder",
        "running",
        "settled",
        "settling",
    )

    def __init__(
        self,
        *,
        recorder: Recorder,
        journal: Journal,
        classifier: Classifier,
        metrics: Metrics,
        normalize: bool,
        max_message_size: int,
        settling: set[Unsettled],
        running: set[asyncio.Task[None]],
        limits: Limits | None = None,
        names: Pseudonyms | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`loop` is the one that runs, unless another is given."""
        self.recorder = recorder
        self.journal = journal
        """Holds each message between its end of data and its outcome, in case that the relay is killed."""
        self.classifier = classifier
        self.metrics = metrics
        self.normalize = normalize
        self.max_message_size = max_message_size
        self.settling = settling
        """Messages between their end of data and their outcome; a shutdown waits for them."""
        self.settled = asyncio.Event()
        """Set each time that there is none left."""
        self.running = running
        """Keeps the tasks of transactions alive, those that wait for a connection."""
        self.limits = limits
        """Rate limits, if there are any."""
        self.names = names
        """Gives recipients their pseudonyms; None: they are kept by their addresses."""
        self.loop = loop or asyncio.get_running_loop()
        """Here, since to ask for it costs a system call (CPython 3.11)."""

    def renewed(
        self, *, classifier: Classifier, normalize: bool, max_message_size: int, limits: Limits | None
    ) -> Services:
        """Return services by other settings; what is under way is noted in the same places."""
        services = Services(
            recorder=self.recorder,
            journal=self.journal,
            classifier=classifier,
            metrics=self.metrics,
            normalize=normalize,
            max_message_size=max_message_size,
            settling=self.settling,
            running=self.running,
            limits=limits,
            names=self.names,
            loop=self.loop,
        )
        services.settled = self.settled
        return services

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, since what becomes of it could not be kept; else None."""
        return self.recorder.refusal() or self.journal.refusal()
