"""How an upstream is: what attempts and connections have shown of it, in metrics, log and words.

Rules: it is up after an attempt that ended with a connection, or with a refusal of somebody's credentials,
which says nothing of the upstream; it is down after any other. Whether it is tried at all is the breaker's.
One that is down is tried again though there is no mail, or it would be down until some comes; not for a login
that was refused, since servers lock accounts for that.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Final, cast

from relay import maillog
from relay.upstream.breaker import Breaker

if TYPE_CHECKING:
    from relay.metrics import UpstreamMetrics
    from relay.upstream.dial import DialError

__all__ = ["AGAIN_S", "Health"]

AGAIN_S: Final = 30.0
"""Seconds without an attempt after one that failed; then the relay makes one of its own."""


class Health:
    """The health of one upstream, which goes by `name` and is at `address`."""

    def __init__(self, name: str, address: str, metrics: UpstreamMetrics, random: Random) -> None:
        """Begin with nothing known; `random` draws the pauses of the breaker."""
        self._name = name
        self._address = address
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._breaker = Breaker(random)
        self._again_at: float | None = None
        self.last_error: str | None = None
        """Why the last attempt to connect failed; None after one that did not."""

    @property
    def avoided(self) -> bool:
        """Whether it has failed too often to be tried for a message now."""
        return self._breaker.open

    def in_words(self, now: float) -> str:
        """Say how it is, to people."""
        if self.last_error is None:
            return "up"
        if self._breaker.retry_at is None:
            return f"down: {self.last_error}"
        return f"down: {self.last_error}, next try in {max(0.0, self._breaker.retry_at - now):.0f} s"

    # The attempt of the relay's own, which decides whether it is avoided any longer

    def due(self, now: float) -> bool:
        """Whether that attempt is to be made now; after True call `try_begins`."""
        if self.avoided:
            return self._breaker.due(now)
        return self._again_at is not None and now >= self._again_at

    def try_begins(self) -> None:
        """It begins; `connected`, `failed` or `not_tried` follows."""
        if self.avoided:
            self._breaker.try_begins()
        else:
            self._again_at = self._loop.time() + AGAIN_S

    def not_tried(self) -> None:
        """It could not be made, for reasons of our own; if it could, that has been heard already."""
        self._breaker.not_tried(self._loop.time())

    # What attempts and connections show

    def connected(self) -> None:
        """A connection stands."""
        self.last_error = self._again_at = None
        self._metrics.connected("ok")
        self._metrics.up(value=True)
        if self._breaker.connected():
            maillog.upstream_up(self._name, self._address)

    def failed(self, error: DialError, *, counts: bool, decisive: bool) -> None:
        """An attempt failed, the one that decides if `decisive`; `counts`: the breaker hears of it."""
        reason = f"{error.stage}: {error}"
        self._metrics.connected(error.stage)
        self._metrics.up(value=False)
        self.last_error = str(error)
        self._again_at = None if error.stage == "auth" else self._loop.time() + AGAIN_S
        maillog.upstream_failed(self._name, self._address, reason)
        if counts and self._breaker.refused(self._loop.time(), decisive=decisive):
            self._went_down(reason)

    def refused(self, stage: str) -> None:
        """An attempt ended with a verdict on the credentials."""
        self._metrics.connected(stage)
        self._metrics.up(value=True)
        self.last_error = self._again_at = None

    def full(self, error: DialError) -> None:
        """An attempt was turned away while other connections stood."""
        self._metrics.connected(error.stage)

    def answered(self) -> None:
        """MAIL was answered on one of the connections."""
        self._breaker.answered()

    def lost(self, reason: str) -> None:
        """A new connection was lost before MAIL was answered on it."""
        if self._breaker.lost(self._loop.time()):
            self.last_error = reason
            self._went_down(reason)

    def _went_down(self, reason: str) -> None:
        self._metrics.up(value=False)
        pause = cast("float", self._breaker.retry_at) - self._loop.time()
        maillog.upstream_down(self._name, self._address, reason, pause)
