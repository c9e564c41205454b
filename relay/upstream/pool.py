"""The pool of one upstream's connections: bounded, reused, retired in time.

Rules: every connection, from the first octet of its handshake to its end, holds one of `max_connections`
permits, or of as many as the upstream allows, if those are fewer. A connection belongs to an identity, the
relay's own account or the credentials of a client, and is given to nobody else; it is known by a keyed hash,
and no credentials are kept. Waiters are served in fair shares between clients, with a connection that comes
back or with the permit of one that went. Only a connection that saw nothing but clean replies comes back. An
idle connection on which the upstream closes, or speaks, is gone before anybody can be given it. While the
breaker is open nothing is opened for a message: an attempt of the pool's own finds out when the upstream is
back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import sys
from random import Random
from typing import TYPE_CHECKING, Final, cast

from relay import maillog
from relay.reply import Reply
from relay.upstream.allowance import Allowance
from relay.upstream.capabilities import UNKNOWN, Capabilities
from relay.upstream.connection import Connection
from relay.upstream.dial import UNREACHABLE, Dialer, DialError
from relay.upstream.health import Health
from relay.upstream.idle import Idle, same
from relay.upstream.shares import Shares, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.credentials import Credentials
    from relay.metrics import UpstreamMetrics
    from relay.settings import UpstreamSettings

__all__ = ["Pool", "UnavailableError"]

BUSY: Final = Reply.own(451, "3.2", "No connection to the upstream server is free now, try again later")
LOG_IN_AGAIN: Final = Reply.own(
    530, "7.0", "The upstream server refuses this login now: connect and log in again"
)
CLOSE_TIMEOUT: Final = 2.0
"""Seconds that the upstream gets to answer QUIT when the pool closes."""
RELAY: Final = ""
"""The client on whose account the relay's own doings go: probes, and logins that are tried."""


class UnavailableError(Exception):
    """No connection can be had; `reply` is what the client hears at MAIL.

    `verdict` is the upstream's own reply to the credentials of a client, if that is why. The text is for the
    operator.
    """

    def __init__(self, reply: Reply, verdict: Reply | None = None, reason: str = "") -> None:
        super().__init__(reason or str(reply))
        self.reply = reply
        self.verdict = verdict


class _TurnedAwayError(Exception):
    """The upstream takes no more connections now; others stand."""


class Pool:
    """Connections to one upstream."""

    def __init__(
        self,
        upstream: UpstreamSettings,
        dialer: Dialer,
        metrics: UpstreamMetrics,
        *,
        random: Random | None = None,
    ) -> None:
        """`random` draws the pauses of the breaker."""
        self.name = upstream.name
        self.capabilities: Capabilities = UNKNOWN
        """What the upstream said that it can do, at its last EHLO."""
        self.metrics = metrics
        self.connect_timeout = upstream.connect_timeout
        self.end_of_data_timeout = upstream.end_of_data_timeout
        self.xforward = upstream.xforward
        """Whether the upstream is to be told who the clients are."""
        self._settings = upstream
        self._loop = asyncio.get_running_loop()
        self._dialer = dialer
        self._key = secrets.token_bytes(32)
        self._open: set[Connection] = set()
        self._idle = Idle(upstream.max_age)
        self._dialing = 0
        self._allowance = Allowance(upstream.max_connections)
        self._last_turned_away = ""
        self._answered_at = 0.0
        """When MAIL was last answered on one of the connections, or one came back from its transaction."""
        self._shares = Shares()
        self._leaving: set[Connection] = set()
        """Those that are closed to make room for a waiter."""
        self._closing = False
        self._emptied = asyncio.Event()
        self._health = Health(upstream.name, upstream.address, metrics, random or Random())  # noqa: S311  no secret
        self._trying: asyncio.Task[None] | None = None
        self.draining = False
        """Whether no new transactions come: connections are not kept."""
        self._drain_told = False
        self._counts_refusals = False
        """Whether the upstream has been seen to hold against one transaction what it refused to another."""
        self._replaced = False
        metrics.drained(value=False)
        self.on_refused: Callable[[bytes], None] = _ignore
        """Called with the identity whose credentials the upstream has refused."""
        self.on_drained_use: Callable[[Pool], None] = _ignore
        """Called when a connection is wanted of it although it is drained."""

    # Who is who

    def identity(self, credentials: Credentials) -> bytes:
        """Return the keyed hash that stands for the credentials while this process lives."""
        return credentials.fingerprint(self._key)

    def over_share(self, client: str) -> bool:
        """Whether the client holds more than its fair share while another one waits."""
        return self._shares.waiting > 0 and self._shares.over(client, self._allowance.limit)

    # How it is

    @property
    def avoided(self) -> bool:
        """Whether the upstream has failed too often to be tried for a message now."""
        return self._health.avoided

    @property
    def last_error(self) -> str | None:
        """Why the last attempt to connect failed; None after one that did not."""
        return self._health.last_error

    @property
    def transactions(self) -> int:
        """How many transactions have a connection, or wait for one."""
        return self._shares.leases + self._shares.waiting

    @property
    def busy(self) -> bool:
        """Whether a connection is open, or opened, or waited for."""
        return bool(self._open or self._dialing or self._shares.waiting)

    def state(self, now: float) -> str:
        """Say in a few words how the upstream is, to people."""
        if self.draining:
            busy = self.transactions
            return f"draining, {busy} transactions" if busy else "drained"
        words = self._health.in_words(now)
        if self._allowance.reduced:
            words += f", takes no more than {self._allowance.limit} connections"
        return words

    def answered(self) -> None:
        """MAIL was answered on one of the connections."""
        self._answered_at = self._loop.time()
        self._health.answered()

    def lost(self, reason: str) -> None:
        """A new connection was lost before MAIL was answered on it."""
        self._health.lost(reason)

    def drain(self, *, replaced: bool = False) -> None:
        """Keep no connections from now on; those that are leased end with their transactions.

        `replaced`: another pool of this name takes over, the gauges too.
        """
        self.draining = True
        self._replaced = replaced
        if not replaced:
            self.metrics.drained(value=True)
        self._quit_idle()

    def resume(self) -> None:
        """Take new transactions again after `drain`."""
        self.draining = self._drain_told = False
        self.metrics.drained(value=False)

    # Leasing

    def take(self, client: str, credentials: Credentials | None = None) -> Connection | None:
        """Return an idle connection of this identity at once, or None; the caller must release it."""
        return self._take(client, None if credentials is None else self.identity(credentials))

    def _take(self, client: str, identity: bytes | None) -> Connection | None:
        connection = self._idle.take(identity, self._loop.time())
        if connection is not None:
            self._lend(connection, client)
        return connection

    async def acquire(
        self, client: str, credentials: Credentials | None = None, *, fresh: bool = False
    ) -> Connection:
        """Return a connection of this identity: idle, new, or waited for; with `fresh`, newly opened only.

        Raises UnavailableError when none can be had within `lease_wait_timeout`.
        """
        return (await self._lease(client, credentials, fresh=fresh))[0]

    async def login(self, credentials: Credentials) -> Reply:
        """Try the credentials on a new connection, which is kept; return the upstream's 235.

        Raises UnavailableError, with the upstream's own reply as its `verdict` if it gave one.
        """
        connection, welcome = await self._lease(RELAY, credentials, fresh=True)
        self.release(connection, reset=False)
        return cast("Reply", welcome)

    async def _lease(
        self, client: str, credentials: Credentials | None, *, fresh: bool
    ) -> tuple[Connection, Reply | None]:
        """As `acquire`; with the reply to the login of a connection that was opened."""
        identity = None if credentials is None else self.identity(credentials)
        until = self._loop.time() + self._settings.lease_wait_timeout
        number = self._shares.arrival()
        if self.draining:
            self.on_drained_use(self)
        while True:
            if not fresh and (connection := self._take(client, identity)) is not None:
                return connection, None
            if self.avoided and self._allowance.room(self._used):
                raise self._left_alone()
            granted = await self._room(Waiter(client, identity, number, fresh=fresh), until)
            if granted is None:
                began = self._loop.time()
                with contextlib.suppress(_TurnedAwayError):
                    return await self._dial(client, identity, credentials)
                until += self._loop.time() - began  # that was no wait for a connection, which begins now
            # It may have ended between being handed over and this task's turn; its permit is free again then.
            elif granted.usable:
                return granted, None

    def release(self, connection: Connection, *, reset: bool, ahead: bool = False) -> None:
        """Take a connection back after its transaction; `reset`: a transaction may still be open on it.

        `ahead`: that is unlikely, and the next one need not wait for the reply to RSET.
        """
        connection.lessee = None
        self._end_lease(connection)
        if not connection.usable:
            connection.abort("not clean")
        elif connection.stained or (self._counts_refusals and connection.refused_in):
            connection.quit()
        elif reset and ahead and connection.pipelining:
            connection.resetting = True
            connection.send(b"RSET\r\n", "rset", lambda reply: _was_reset_in_use(connection, reply))
            self._back(connection)
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
        now = self._loop.time()
        if self._closing or self._idle.worn(connection, now):
            connection.quit()
            return
        connection.reused = True
        connection.idle_since = self._answered_at = now
        if self._shares.waiting and self._hand_on(connection):
            return
        if self.draining:
            connection.quit()
        else:
            self._idle.put(connection)

    def _hand_on(self, connection: Connection) -> bool:
        """Give it to whose turn it is, or end it if that one can only use its permit; False: not needed."""

        def takes(waiter: Waiter) -> bool:
            return not waiter.fresh and same(waiter.identity, connection.identity)

        waiter = self._shares.next(lambda _: True)
        if waiter is not None and not takes(waiter):
            if len(self._leaving) < self._shares.waiting:
                self._leaving.add(connection)
                connection.quit()
                return True
            waiter = self._shares.next(takes)
        if waiter is None:
            return False
        self._lend(connection, waiter.client)
        self._grant(waiter, connection)
        return True

    def _lend(self, connection: Connection, client: str) -> None:
        connection.leased_to = client
        self._shares.lend(client)

    def _end_lease(self, connection: Connection) -> None:
        if connection.leased_to is not None:
            self._shares.give_back(connection.leased_to)
            connection.leased_to = None

    # Room for a connection

    @property
    def _used(self) -> int:
        return len(self._open) + self._dialing

    async def _room(self, waiter: Waiter, until: float) -> Connection | None:
        """Return a connection that was waited for, or None: a permit to open one (counted in `_dialing`).

        Either is counted as a lease of the client. Raises UnavailableError at the time `until`.
        """
        if not self._allowance.room(self._used):
            self._end_oldest_idle()
        if self._allowance.room(self._used):
            self._dialing += 1
            self._shares.lend(waiter.client)
            return None
        return await self._wait(waiter, until)

    def _end_oldest_idle(self) -> None:
        """End the connection that has been idle longest, of whatever identity."""
        oldest = self._idle.oldest()
        if oldest is None:
            return
        if self._allowance.reduced:  # there is room once the upstream has seen it go
            self._idle.remove(oldest)
            self._leaving.add(oldest)
            oldest.quit()
        else:
            oldest.abort("made room for a new connection")

    async def _wait(self, waiter: Waiter, until: float) -> Connection | None:
        granted = waiter.granted
        self._shares.wait(waiter)
        try:
            await asyncio.wait((granted,), timeout=max(0.0, until - self._loop.time()))
        except asyncio.CancelledError:
            if granted.done():
                self._hand_back(waiter.client, granted.result())
            raise
        finally:
            self._shares.remove(waiter)
        if not granted.done():
            raise UnavailableError(BUSY)
        return granted.result()

    def _grant(self, waiter: Waiter, connection: Connection | None) -> None:
        self._shares.remove(waiter)
        waiter.granted.set_result(connection)

    def _hand_back(self, client: str, granted: Connection | None) -> None:
        """Take back what a waiter was given after it had stopped waiting."""
        if granted is None:
            self._dialing -= 1
            self._shares.give_back(client)
            self._pass_permits()
        elif granted.usable:
            self.release(granted, reset=False)

    def _pass_permits(self) -> None:
        while self._shares.waiting and self._allowance.room(self._used):
            waiter = self._shares.next(lambda _: True)
            if waiter is None:  # those that are left have stopped waiting
                return
            self._dialing += 1
            self._shares.lend(waiter.client)
            self._grant(waiter, None)

    # Opening

    async def _dial(
        self,
        client: str,
        identity: bytes | None,
        credentials: Credentials | None,
        *,
        decisive: bool = False,
    ) -> tuple[Connection, Reply | None]:
        """Open a connection within a permit that the caller has; return it with the reply to its login.

        `decisive`: it is the attempt by which the breaker closes, or does not. Raises _TurnedAwayError if
        another connection can be waited for.
        """
        leased = False
        began = self._loop.time()
        try:
            if self.avoided and not decisive:  # it opened while the permit was waited for
                raise self._left_alone()
            transport, capabilities, welcome = await self._dialer.dial(credentials)
        except DialError as error:
            full = error.turned_away or self._kept_waiting(error, began)
            if full and self._used > 1 and not decisive:
                self._full(error)
                raise _TurnedAwayError from error
            self._failed(error, identity, decisive=decisive)
            if error.verdict is not None:
                heard = error.verdict.recoded(451) if error.verdict.transient else LOG_IN_AGAIN
                raise UnavailableError(heard, error.verdict) from error
            raise UnavailableError(error.reply, reason=f"{error.stage}: {error}") from error
        else:
            connection = Connection(
                self,
                capabilities,
                self.metrics,
                reply_timeout=self._settings.reply_timeout,
                end_of_data_timeout=self._settings.end_of_data_timeout,
                identity=identity,
            )
            connection.max_transactions = min(self._settings.max_messages, _mail_max(capabilities))
            connection.leased_to = client
            leased = True
            self._open.add(connection)
            self._allowance.opened(len(self._open))
            if capabilities != self.capabilities or self.capabilities is UNKNOWN:
                self.capabilities = capabilities  # else the one that is known: replies are made for it
            self._health.connected()
            maillog.upstream_connected(self.name, self._settings.address, self._settings.tls)
            connection.attach(transport)
            return connection, welcome
        finally:
            self._dialing -= 1
            if not leased:
                self._shares.give_back(client)
            self._pass_permits()

    def _kept_waiting(self, error: DialError, began: float) -> bool:
        """Whether the upstream left an attempt without an answer, and answered on another connection.

        It does where it has a process for each of so many connections (Postfix: `maxproc` in master.cf): one
        too many stands in its listen queue, and is greeted when another one has gone.
        """
        return error.stage == "timeout" and self._answered_at >= began  # the clock of uvloop has milliseconds

    def _full(self, error: DialError) -> None:
        """Take note that the upstream takes no more connections than stand beside this one."""
        self._health.full(error)
        self._allowance.turned_away(self._used - 1, self._loop.time())
        self._last_turned_away = str(error)

    def _failed(self, error: DialError, identity: bytes | None, *, decisive: bool) -> None:
        """Take note of a dial that failed; whose credentials are refused says nothing of the upstream."""
        if error.verdict is None:
            # Nor does an exchange that a client's own credentials have broken: it could shut out all others.
            counts = identity is None or error.stage != "auth"
            self._health.failed(error, counts=counts, decisive=decisive)
            return
        self._health.refused(error.stage)
        if identity is not None and not error.verdict.transient:
            self._retire(identity)
            self.on_refused(identity)

    def _left_alone(self) -> UnavailableError:
        return UnavailableError(UNREACHABLE)

    def _retire(self, identity: bytes) -> None:
        """Use no connection of this identity again: what it is logged in with is not valid any more."""
        for connection in tuple(self._open):
            if same(connection.identity, identity):
                connection.max_transactions = 0
        self._idle.quit(identity)

    # Looking after them

    async def probe(self) -> None:
        """Open one connection, so that the upstream's extensions are known; raises UnavailableError."""
        self.release(await self.acquire(RELAY), reset=False)

    async def _try_again(self) -> None:
        """Find out whether the upstream is back, by a connection of nobody's message."""
        decisive = self.avoided
        self._health.try_begins()
        try:
            until = self._loop.time() + self._settings.lease_wait_timeout
            await self._room(Waiter(RELAY, None, self._shares.arrival(), fresh=True), until)
            connection, _ = await self._dial(RELAY, None, None, decisive=decisive)
        except (UnavailableError, _TurnedAwayError):
            self._health.not_tried()
        except Exception as error:
            maillog.unforeseen("upstream", None, error)
            self._health.not_tried()
        else:
            self.release(connection, reset=False)
        finally:
            self._trying = None

    def sweep(self, now: float) -> None:
        """End what has waited too long, retire what is idle or worn, and show the counts; every second."""
        if self._trying is None and not (self.draining or self._closing) and self._health.due(now):
            self._trying = asyncio.get_running_loop().create_task(self._try_again())
        if self.draining and not self._drain_told and not self.transactions:
            self._drain_told = True
            if not self._replaced:
                maillog.upstream_drained(self.name, self._settings.address)
        if self._allowance.sweep(now):  # not before: of very many at once each one would be news
            allowed, most = self._allowance.limit, self._settings.max_connections
            maillog.upstream_full(self.name, self._settings.address, self._last_turned_away, allowed, most)
        self._pass_permits()
        for connection in tuple(self._open):
            connection.check(now)
        for connection in self._idle:
            if now - connection.idle_since > self._settings.idle_timeout or self._idle.worn(connection, now):
                self._idle.remove(connection)
                connection.quit()
        if self._replaced:
            return
        idle = len(self._idle)
        self.metrics.connections(idle=idle, active=len(self._open) - idle, connecting=self._dialing)

    def xforward_refused(self, connection: Connection, reply: Reply) -> None:
        """Note that the upstream refuses what it offered, with a warning once for each connection.

        A 501 is about the values of one client; anything else is about the command, which is not sent again.
        """
        if reply.code != 501:
            connection.xforward = ()
        if not connection.xforward_warned:
            connection.xforward_warned = True
            maillog.xforward_refused(self.name, self._settings.address, str(reply))

    def refusals_counted(self) -> None:
        """Use no connection again on which the upstream has said no (called by the connection)."""
        self._counts_refusals = True
        for connection in self._idle:
            if connection.refused_in:
                self._idle.remove(connection)
                connection.quit()

    def connection_ended(self, connection: Connection, reason: str) -> None:
        """Forget a connection that is gone (called by the connection)."""
        self._open.discard(connection)
        self._leaving.discard(connection)
        self._end_lease(connection)
        self._idle.remove(connection)
        maillog.upstream_retired(self.name, self._settings.address, reason)
        self._pass_permits()
        if not self._open:
            self._emptied.set()

    async def close(self) -> None:
        """Say QUIT on idle connections and cut what is left; no lease is given any more."""
        self._closing = True
        if self._trying is not None:
            self._trying.cancel()
        self._quit_idle()
        if self._open:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), CLOSE_TIMEOUT)
        for connection in tuple(self._open):
            connection.abort("the relay stops")

    def _quit_idle(self) -> None:
        for connection in self._idle:
            self._idle.remove(connection)
            connection.quit()

    def __repr__(self) -> str:
        idle = len(self._idle)
        return (
            f"<Pool {self.name}: {len(self._open) - idle} active, {idle} idle, "
            f"{self._dialing} connecting, {self._shares.waiting} waiting>"
        )


def _mail_max(capabilities: Capabilities) -> int:
    """How many transactions the upstream takes in one session (RFC 9422 section 4)."""
    for word in capabilities.parameters.get("LIMITS", ()):
        name, _, value = word.partition("=")
        if name == "MAILMAX" and re.fullmatch(r"[1-9][0-9]{0,5}", value):
            return int(value)
    return sys.maxsize


def _was_reset_in_use(connection: Connection, reply: Reply) -> None:
    connection.resetting = False
    if not reply.positive:  # whoever has it by now gets another
        connection.abort(f"{reply.code} to RSET")


def _ignore(_: object) -> None:
    """Take no notice."""
