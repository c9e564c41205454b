"""Where clients are received: the listeners, who is in, how many may be, and their leaving.

Rules: what is counted in `admit` is taken back in `leave`, once for each session. All waits of all sessions
are looked at by one `sweep`; no session sets a timer for its commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from relay import maillog
from relay.reply import Reply
from relay.session import answers
from relay.session.session import Session

if TYPE_CHECKING:
    from relay.account import Sender
    from relay.settings import Settings
    from relay.transaction import Services
    from relay.upstream.capabilities import Capabilities
    from relay.upstream.pool import Pool

__all__ = ["Reception"]

BACKLOG = 4096
"""Connections that the kernel may hold for us: a burst must not wait for SYN retries."""
COMMIT_TIMEOUT = 5.0
"""Seconds that rows of the last messages get to become durable before the sessions are cut."""
MIRRORED = ("8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")
"""Extensions that the relay can carry and offers when the upstream has them."""


class Reception:
    """All client sessions of this relay."""

    def __init__(self, settings: Settings, services: Services, pool: Pool, *, token: str) -> None:
        """`token` marks our greeting, so that a relay that is its own upstream notices."""
        server = settings.server
        self.loop = asyncio.get_running_loop()
        self.services = services
        self.pool = pool
        self.metrics = services.metrics
        self.allow = settings.clients.allow
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
        self._servers: list[asyncio.Server] = []
        self._ehlo: tuple[Capabilities, Reply] | None = None
        self._left = asyncio.Event()

    # Listening

    async def open(self) -> None:
        """Listen on every configured address; raises OSError whose text names the address."""
        for listener in self._settings.listeners:
            name = listener.address
            try:
                bound = _bind(listener.host, listener.port, reuse_port=self._settings.server.reuse_port)
            except OSError as error:
                await self.close()
                raise OSError(f"cannot listen on {name}: {error.strerror or error}") from error
            server = await self.loop.create_server(partial(Session, self, name), sock=bound, backlog=BACKLOG)
            self._servers.append(server)
            host, port = bound.getsockname()[:2]
            self.addresses.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            maillog.listening(self.addresses[-1])

    async def close(self) -> None:
        """Listen no more; the sessions that are in stay in."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    # Coming and going

    def admit(self, session: Session, sender: Sender) -> Reply | None:
        """Count a session in; return the refusal if there are too many."""
        self._sessions.add(session)
        self._clients[sender.client] += 1
        self.metrics.session_opened(sender.listener)
        server = self._settings.server
        if self.draining:
            reply, reason = answers.DRAINING, "draining"
        elif len(self._sessions) > server.max_connections:
            reply, reason = answers.TOO_MANY_CONNECTIONS, "too_many_connections"
        elif self._clients[sender.client] > server.max_connections_per_client:
            reply, reason = answers.TOO_MANY_FROM_CLIENT, "too_many_client_connections"
        else:
            return None
        self.metrics.rejected(reason)
        maillog.session_refused(sender.client, sender.listener, reason)
        return reply

    def leave(self, session: Session, client: str) -> None:
        """Count a session out."""
        self._sessions.discard(session)
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        self.metrics.session_closed()
        if not self._sessions:
            self._left.set()

    def ehlo(self) -> Reply:
        """Return the EHLO reply: what the relay can carry and the upstream can do (RFC 5321 4.1.1.1)."""
        capabilities = self.pool.capabilities
        if self._ehlo is None or self._ehlo[0] is not capabilities:
            self._ehlo = capabilities, self._ehlo_for(capabilities)
        return self._ehlo[1]

    def _ehlo_for(self, capabilities: Capabilities) -> Reply:
        limits = [size for size in (self.max_message_size, capabilities.size) if size]
        offered = ["PIPELINING", f"SIZE {min(limits)}" if limits else "SIZE"]
        offered += [keyword for keyword in MIRRORED if keyword in capabilities]
        return Reply.plain(250, self._settings.server.hostname, *offered)

    # Time and the end

    def sweep(self, now: float, elapsed: float) -> None:
        """Look at the waits of every session, and at verdicts that are overdue."""
        for session in tuple(self._sessions):
            session.check(now, elapsed)
        for transaction in tuple(self.services.settling):
            transaction.check(now)

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


def _bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
