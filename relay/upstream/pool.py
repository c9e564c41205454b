"""The pool of one upstream's connections: bounded, reused last in first out, retired in time.

Rules: every connection, from the first octet of its handshake to its end, holds one of `max_connections`
permits. Waiters are served in order, with a connection that comes back or with the permit of one that
went. Only a connection that saw nothing but clean replies comes back. An idle connection on which the
upstream closes, or speaks, is gone before anybody can be given it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING

from relay import maillog
from relay.reply import Reply
from relay.upstream.capabilities import UNKNOWN, Capabilities
from relay.upstream.connection import Connection
from relay.upstream.dial import Dialer, DialError

if TYPE_CHECKING:
    from relay.metrics import UpstreamMetrics
    from relay.settings import UpstreamSettings

__all__ = ["Pool", "UnavailableError"]

BUSY = Reply.own(451, "3.2", "No connection to the upstream server is free now, try again later")
CLOSE_TIMEOUT = 2.0
"""Seconds that the upstream gets to answer QUIT when the pool closes."""


class UnavailableError(Exception):
    """No connection can be had; `reply` is what the client hears."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Pool:
    """Connections to one upstream."""

    def __init__(self, upstream: UpstreamSettings, dialer: Dialer, metrics: UpstreamMetrics) -> None:
        self.name = upstream.name
        self.capabilities: Capabilities = UNKNOWN
        """What the upstream said that it can do, at its last EHLO."""
        self.metrics = metrics
        self.end_of_data_timeout = upstream.end_of_data_timeout
        self.xforward = upstream.xforward
        """Whether the upstream is to be told who the clients are."""
        self._settings = upstream
        self._dialer = dialer
        self._open: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._dialing = 0
        self._waiters: deque[asyncio.Future[Connection | None]] = deque()
        self._closing = False
        self._emptied = asyncio.Event()
        self.last_error: str | None = None
        """Why the last attempt to connect failed; None after one that did not."""

    # Leasing

    def take(self) -> Connection | None:
        """Return an idle connection at once, or None; the caller must release it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """Return a connection: idle, newly opened, or waited for; with `fresh`, newly opened only.

        Raises UnavailableError when none can be had within `lease_wait_timeout`.
        """
        if not fresh and (connection := self.take()) is not None:
            return connection
        if fresh and self._idle and self._used >= self._settings.max_connections:
            self._idle.popleft().abort("made room for a new connection")
        if self._used < self._settings.max_connections:
            self._dialing += 1
            return await self._dial()
        connection = await self._wait()
        if connection is None:
            return await self._dial()
        # It may have ended between being handed over and this task's turn; its permit is free again then.
        return connection if connection.usable else await self.acquire(fresh=fresh)

    def release(self, connection: Connection, *, reset: bool) -> None:
        """Take a connection back after its transaction; `reset`: a transaction is still open on it."""
        connection.lessee = None
        if not connection.usable:
            connection.abort("not clean")
        elif reset:
            connection.send(b"RSET\r\n", "rset", lambda reply: self._was_reset(connection, reply))
        else:
            self._back(connection)

    def _was_reset(self, connection: Connection, reply: Reply) -> None:
        if reply.positive:
            self._back(connection)
        else:
            connection.quit()

    def _back(self, connection: Connection) -> None:
        now = asyncio.get_running_loop().time()
        if self._closing or self._worn(connection, now):
            connection.quit()
            return
        connection.reused = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        connection.idle_since = now
        self._idle.append(connection)

    def _worn(self, connection: Connection, now: float) -> bool:
        return (
            connection.transactions >= self._settings.max_messages
            or now - connection.opened_at > self._settings.max_age
        )

    # Opening

    @property
    def _used(self) -> int:
        return len(self._open) + self._dialing

    async def _dial(self) -> Connection:
        """Open a connection within a permit that the caller has counted in `_dialing`."""
        try:
            transport, capabilities = await self._dialer.dial()
        except DialError as error:
            self.last_error = str(error)
            self.metrics.connected(error.stage)
            self.metrics.up(value=False)
            maillog.upstream_failed(self.name, self._settings.address, f"{error.stage}: {error}")
            raise UnavailableError(error.reply) from error
        else:
            connection = Connection(
                self,
                capabilities,
                self.metrics,
                reply_timeout=self._settings.reply_timeout,
                end_of_data_timeout=self._settings.end_of_data_timeout,
            )
            self._open.add(connection)
            self.last_error = None
            self.capabilities = capabilities
            self.metrics.connected("ok")
            self.metrics.up(value=True)
            maillog.upstream_connected(self.name, self._settings.address, self._settings.tls)
            connection.attach(transport)
            return connection
        finally:
            self._dialing -= 1
            self._pass_permits()

    async def _wait(self) -> Connection | None:
        """Wait in order for a connection, or for a permit to open one (None; counted in `_dialing`)."""
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self._settings.lease_wait_timeout):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._hand_back(waiter.result())
            if isinstance(error, TimeoutError):
                raise UnavailableError(BUSY) from error
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)

    def _hand_back(self, granted: Connection | None) -> None:
        """Take back what a waiter was given after it had stopped waiting."""
        if granted is None:
            self._dialing -= 1
            self._pass_permits()
        elif granted.usable:
            self._back(granted)

    def _pass_permits(self) -> None:
        while self._waiters and self._used < self._settings.max_connections:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._dialing += 1
                waiter.set_result(None)

    # Looking after them

    async def probe(self) -> None:
        """Open one connection, so that the upstream's extensions are known; raises UnavailableError."""
        self.release(await self.acquire(), reset=False)

    def sweep(self, now: float) -> None:
        """End what has waited too long, retire what is idle or worn, and show the counts; every second."""
        for connection in tuple(self._open):
            connection.check(now)
        for connection in tuple(self._idle):
            if now - connection.idle_since > self._settings.idle_timeout or self._worn(connection, now):
                self._idle.remove(connection)
                connection.quit()
        idle = len(self._idle)
        self.metrics.connections(idle=idle, active=len(self._open) - idle, connecting=self._dialing)

    def xforward_refused(self, reply: Reply) -> None:
        """Warn that an upstream refuses what it offered; once for each connection."""
        maillog.xforward_refused(self.name, self._settings.address, str(reply))

    def connection_ended(self, connection: Connection, reason: str) -> None:
        """Forget a connection that is gone (called by the connection)."""
        self._open.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        maillog.upstream_retired(self.name, self._settings.address, reason)
        self._pass_permits()
        if not self._open:
            self._emptied.set()

    async def close(self) -> None:
        """Say QUIT on idle connections and cut what is left; no lease is given any more."""
        self._closing = True
        while self._idle:
            self._idle.pop().quit()
        if self._open:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), CLOSE_TIMEOUT)
        for connection in tuple(self._open):
            connection.abort("the relay stops")

    def __repr__(self) -> str:
        idle = len(self._idle)
        return (
            f"<Pool {self.name}: {len(self._open) - idle} active, {idle} idle, "
            f"{self._dialing} connecting, {len(self._waiters)} waiting>"
        )
