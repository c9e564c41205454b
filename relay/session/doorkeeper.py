"""Who logs in: the authenticator's verdicts, slowed for those who guess (RFC 4954).

Rules: somebody who has failed too often is not even tried, and hears so as late as after a failure; of very
many at once some wait for the others. A refusal is given late, later each time. Every attempt is counted and
logged, without what it held.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from relay import maillog
from relay.auth.guard import MAX_DELAY_S
from relay.auth.verdict import Verdict
from relay.credentials import without
from relay.records.identity import uuid7
from relay.session import answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.account import Sender
    from relay.auth.guard import Guard
    from relay.credentials import Credentials
    from relay.metrics import Metrics

__all__ = ["Authenticator", "Doorkeeper"]

TURN_S = 10.0
"""Seconds that a login waits for others of the same client to be decided about."""


class Authenticator(Protocol):
    """Who knows whether credentials are good: the users file, or the upstream."""

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What EHLO offers now, in this order."""

    async def login(self, credentials: Credentials) -> Verdict:
        """Try them."""

    def stands(self, verdict: Verdict) -> bool:
        """Whether a verdict "ok", given earlier by whatever decided then, still holds."""


class Doorkeeper:
    """Decides about logins, for all sessions."""

    def __init__(self, authenticator: Authenticator | None, guard: Guard, metrics: Metrics) -> None:
        """`authenticator` may be set anew at any time; None: nobody can log in."""
        self.authenticator = authenticator
        self._guard = guard
        self._metrics = metrics
        self._deciding: set[asyncio.Task[None]] = set()
        self._decided = asyncio.Event()
        """Set when the next one has been decided about, and another event then."""

    @property
    def open(self) -> bool:
        """Whether anybody can log in at all."""
        return self.authenticator is not None

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What EHLO offers now, in this order."""
        return () if self.authenticator is None else self.authenticator.mechanisms

    def stands(self, verdict: Verdict) -> bool:
        """Whether somebody who has logged in would still be let in."""
        return self.authenticator is not None and self.authenticator.stands(verdict)

    def decide(self, credentials: Credentials, sender: Sender, answer: Callable[[Verdict], None]) -> None:
        """Find out about `credentials`, and give the verdict to `answer` when the time has come."""
        deciding = asyncio.get_running_loop().create_task(self._decide(credentials, sender, answer))
        self._deciding.add(deciding)
        deciding.add_done_callback(self._deciding.discard)

    async def _decide(
        self, credentials: Credentials, sender: Sender, answer: Callable[[Verdict], None]
    ) -> None:
        if await self._turn(credentials, sender):
            try:
                with self._guard.trying(sender.client):
                    verdict = await self._verdict(credentials, sender)
                    delay = self._noted(verdict, credentials, sender)
            finally:
                decided, self._decided = self._decided, asyncio.Event()
                decided.set()
        else:
            verdict = Verdict(answers.LOGINS_CROWDED, "unavailable")
            delay = self._noted(verdict, credentials, sender)
        if delay:
            await asyncio.sleep(delay)
        answer(verdict)

    async def _turn(self, credentials: Credentials, sender: Sender) -> bool:
        """Wait until these credentials may be tried; False if that takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_S):
                while self._guard.crowded(sender.client, credentials):
                    await self._decided.wait()
                return True
        return False

    def _noted(self, verdict: Verdict, credentials: Credentials, sender: Sender) -> float:
        """Count and log what came of a login; return the seconds by which the reply to it is delayed."""
        self._metrics.auth(verdict.outcome)
        if verdict.outcome == "ok":
            maillog.login(verdict.user, sender.client, sender.listener)
            self._guard.succeeded(sender.client, credentials)
            return 0.0
        said = without(credentials.secrets, str(verdict.reply))
        maillog.login_refused(verdict.outcome, credentials.user, sender.client, sender.listener, said)
        if verdict.outcome == "failed":
            return self._guard.failed(sender.client, credentials)
        return MAX_DELAY_S if verdict.outcome == "throttled" else 0.0

    async def _verdict(self, credentials: Credentials, sender: Sender) -> Verdict:
        if self._guard.blocked(sender.client, credentials):
            return Verdict(answers.TOO_MANY_LOGINS, "throttled")
        if self.authenticator is None:  # taken away in the midst of the exchange
            return Verdict(answers.NOT_HERE, "aborted")
        try:
            return await self.authenticator.login(credentials)
        except Exception as error:  # the client must hear something, and the log why
            identity = uuid7()
            maillog.unforeseen("login", identity, error)
            return Verdict(answers.login_failed(identity), "unavailable")

    def aborted(self) -> None:
        """Count an exchange that came to nothing that could be tried."""
        self._metrics.auth("aborted")
