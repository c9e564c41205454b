"""Where clients are received: who is in, how many may be, what EHLO offers, and their leaving.

Rules: what is counted in `enter` and `admit` is taken back in `leave`, once for each session. When all places
are taken, those who sit idle longest make room. All waits of all sessions
are looked at by one `sweep`; no session sets a timer for its commands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from relay import maillog
from relay.reply import Reply
from relay.session import answers
from relay.session.listeners import Listener
from relay.session.offers import Offers
from relay.session.session import Session

if TYPE_CHECKING:
    from relay.account import Sender
    from relay.session.doorkeeper import Doorkeeper
    from relay.session.tls import Certificate
    from relay.settings import Settings
    from relay.transaction import Services
    from relay.upstream.capabilities import Capabilities
    from relay.upstream.upstreams import Route, Upstreams

__all__ = ["Reception"]

CROWDED_IDLE = 10.0
"""Seconds without a transaction after which a session makes room for another when all places are taken."""
COMMIT_TIMEOUT = 5.0
"""Seconds that rows of the last messages get to become durable before the sessions are cut."""


class Reception:
    """All client sessions of this relay."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        upstreams: Upstreams,
        *,
        token: str,
        certificate: Certificate | None = None,
        doorkeeper: Doorkeeper | None = None,
    ) -> None:
        """`token` marks our greeting, so that a relay that is its own upstream notices.

        `certificate` is there if a listener has TLS, `doorkeeper` if clients can log in.
        """
        server = settings.server
        self.loop = asyncio.get_running_loop()
        self.services = services
        self.upstreams = upstreams
        self.metrics = services.metrics
        self.certificate = certificate
        self.doorkeeper = doorkeeper
        self.allow = settings.clients.allow
        self.auth_without_tls = settings.clients.auth_without_tls
        self.trusted_proxies = settings.clients.trusted_proxies
        self.max_message_size = server.max_message_size
        self.max_recipients = server.max_recipients
        self.min_data_rate = server.min_data_rate
        self.idle_timeout = server.idle_timeout
        self.lease_idle_timeout = server.lease_idle_timeout
        self.greeting = Reply.plain(220, f"{server.hostname} ESMTP {token}")
        self.helo = Reply.plain(250, server.hostname)
        self.draining = False
        self.addresses: list[str] = []
        """Where it listens, with the ports that were really bound."""
        self._settings = settings
        self._sessions: set[Session] = set()
        self._clients: Counter[str] = Counter()
        self._listeners: list[Listener] = []
        self._offers = Offers(
            server.hostname,
            max_message_size=server.max_message_size,
            max_recipients=server.max_recipients,
        )
        self._crowded = False
        self._left = asyncio.Event()

    # Listening

    async def open(self) -> None:
        """Listen on every configured address; raises OSError whose text names the address."""
        for settings in self._settings.listeners:
            try:
                listener = Listener(settings, reuse_port=self._settings.server.reuse_port)
            except OSError as error:
                await self.close()
                raise OSError(f"cannot listen on {settings.address}: {error.strerror or error}") from error
            self._listeners.append(listener)
            await listener.serve(partial(Session, self, settings))
            self.addresses.append(listener.address)
            maillog.listening(listener.address)

    async def close(self) -> None:
        """Listen no more; the sessions that are in stay in."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    # Coming and going

    def enter(self, session: Session, listener: str) -> None:
        """Count a connection in, before it is known whose it is."""
        self._sessions.add(session)
        self.metrics.session_opened(listener)

    def admit(self, sender: Sender) -> Reply | None:
        """Count a session for its client; return the refusal if there are too many."""
        self._clients[sender.client] += 1
        server = self._settings.server
        if self.draining:
            reply, reason = answers.DRAINING, "draining"
        elif len(self._sessions) > server.max_connections:
            self._crowded = True
            reply, reason = answers.TOO_MANY_CONNECTIONS, "too_many_connections"
        elif self._clients[sender.client] > server.max_connections_per_client:
            reply, reason = answers.TOO_MANY_FROM_CLIENT, "too_many_client_connections"
        else:
            return None
        self.metrics.rejected(reason)
        maillog.session_refused(sender.client, sender.listener, reason)
        return reply

    def leave(self, session: Session, client: str | None) -> None:
        """Count a session out; `client` if it was counted for one."""
        self._sessions.discard(session)
        if client is not None:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
        self.metrics.session_closed()
        if not self._sessions:
            self._left.set()

    def ehlo(self, carried: Capabilities, *, starttls: bool, mechanisms: tuple[str, ...]) -> Reply:
        """Return the EHLO reply: what the upstreams carry, and the session's own STARTTLS and AUTH."""
        return self._offers.reply(carried, starttls=starttls, mechanisms=mechanisms)

    def route(self, sender: Sender, reverse_path: bytes) -> Route:
        """Return which upstreams a message may go to."""
        return self.upstreams.route(sender, reverse_path, self.services.classifier.at_mail)

    # Time and the end

    def sweep(self, now: float, elapsed: float) -> None:
        """Look at the waits of every session, and at verdicts that are overdue."""
        for session in tuple(self._sessions):
            session.check(now, elapsed)
        for transaction in tuple(self.services.settling):
            transaction.check(now)
        if self._crowded:
            self._crowded = False
            self._make_room(now)

    def _make_room(self, now: float) -> None:
        """Somebody was turned away for want of a place: end what has been idle longest, a tenth at a time."""
        idle = [
            (since, session)
            for session in self._sessions
            if (since := session.idle_since) is not None and now - since > CROWDED_IDLE
        ]
        idle.sort(key=itemgetter(0))
        for _, session in idle[: max(1, self._settings.server.max_connections // 10)]:
            session.make_room()

    async def drain(self, timeout_s: float) -> None:
        """Take no new transaction, let those under way finish for `timeout_s` seconds, then end them all.

        A message whose end of data went up unanswered is in doubt when the time is over.
        """
        self.draining = True
        ends = self.loop.time() + timeout_s
        await self.close()
        maillog.draining(len(self._sessions), timeout_s)
        for session in tuple(self._sessions):
            session.drain()
        if self._sessions:
            self._left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), timeout_s)
        await self._settled(ends - self.loop.time())  # also those whose client has gone
        for transaction in tuple(self.services.settling):
            transaction.give_up()
        await self._settled(COMMIT_TIMEOUT)
        for session in tuple(self._sessions):
            session.cut()

    async def _settled(self, timeout_s: float) -> None:
        """Wait until the messages that are settling have their outcome, for `timeout_s` seconds at most."""
        if self.services.running:
            await asyncio.wait(tuple(self.services.running), timeout=max(0.0, timeout_s))

    def __repr__(self) -> str:
        return f"<Reception: {len(self._sessions)} sessions, {len(self.services.settling)} settling>"
