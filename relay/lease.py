"""A transaction's hold on an upstream: which one it is, and the connection to it while there is one.

Rules: nobody else keeps the connection, so that what is given back is not used any more. It is given back
clean (`release`) or cut (`cut`), and held no longer either way. The upstreams are turned to in their order,
each one once. A wait ends with a connection, with the reason why there is none, or with `end_wait`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay import maillog
from relay.answers import internal
from relay.upstream.pool import UnavailableError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from relay.account import Account
    from relay.reply import Reply
    from relay.services import Services
    from relay.upstream.connection import Connection
    from relay.upstream.pool import Pool

    Leased = Callable[[Connection], None]
    NotLeased = Callable[[Reply, str | None], None]

__all__ = ["Lease"]


class Lease:
    """The connection of one transaction, and the upstreams that it may be to."""

    __slots__ = ("_account", "_services", "_since", "_untried", "_waiting", "connection", "pool")

    def __init__(self, services: Services, account: Account) -> None:
        """Begin with no upstream."""
        self._services = services
        self._account = account
        self._since: float | None = None  # a connection is waited for
        self._untried: tuple[Pool, ...] = ()
        self._waiting: asyncio.Task[None] | None = None
        self.pool: Pool  # there is one as soon as the account has the upstream's name
        self.connection: Connection | None = None

    # The upstream

    def choose(self, pools: tuple[Pool, ...]) -> None:
        """Begin with the first of `pools`; the others are for when it cannot be had."""
        self.pool = pool = pools[0]
        self._untried = pools[1:]
        self._account.upstream = pool.name

    def turn_to_next(self, reason: str) -> bool:
        """Leave this upstream for the next one; False: there is none left. `reason`, if any, is logged."""
        if not self._untried:
            return False
        before = self.pool
        self.choose(self._untried)
        before.metrics.failed_over()
        if reason:
            maillog.failover(self._account.task_id, before.name, self.pool.name, reason)
        return True

    # The connection

    def take(self) -> Connection | None:
        """Return a connection that can be had at once; it is held now."""
        sender = self._account.sender
        connection = self.pool.take(sender.client, sender.credentials)
        if connection is not None:
            self._hold(connection)
        return connection

    def wait(self, leased: Leased, failed: NotLeased, *, fresh: bool) -> None:
        """Wait for a connection; `leased` gets it, or `failed` what the client hears, and why.

        `fresh`: only one that is newly opened will do. There is no why where the error is ours.
        """
        services = self._services
        self._since = services.loop.time()
        self._waiting = services.loop.create_task(self._wait(leased, failed, fresh=fresh))
        services.running.add(self._waiting)
        self._waiting.add_done_callback(services.running.discard)

    async def _wait(self, leased: Leased, failed: NotLeased, *, fresh: bool) -> None:
        sender, pool = self._account.sender, self.pool
        try:
            connection = await pool.acquire(sender.client, sender.credentials, fresh=fresh)
        except UnavailableError as error:
            # A library on the way may swallow the cancellation that came too late.
            if self._waiting is not None:
                self._waited()
                failed(error.reply, str(error))
        except Exception as error:  # the client must hear something, and the log why
            self._waited()
            maillog.unforeseen("lease", self._account.task_id, error)
            failed(internal(self._account.task_id), None)
        else:
            if self._waiting is None:  # as above
                pool.release(connection, reset=False)
            else:
                self._hold(connection)
                leased(connection)

    def end_wait(self) -> None:
        """Wait no more, if a connection is waited for."""
        if self._waiting is not None:
            self._waited()
            self._waiting.cancel()
            self._waiting = None

    def _waited(self) -> float:
        """Note that no connection is waited for any more; return for how long one was, in seconds."""
        if self._since is None:
            return 0.0
        seconds, self._since = self._services.loop.time() - self._since, None
        self._account.waited_s += seconds
        return seconds

    def _hold(self, connection: Connection) -> None:
        self.pool.metrics.waited(self._waited())
        connection.transactions += 1
        self.connection = connection

    # The end

    def part(self) -> Connection | None:
        """Have nothing more to do with the connection, and return it, if there is one."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.lessee = None
        return connection

    def release(self, *, reset: bool, ahead: bool = False) -> None:
        """Let another transaction have the connection; `reset`: this one may still be open on it.

        `ahead`: that is unlikely, and nobody waits for the reply to RSET.
        """
        connection, self.connection = self.connection, None
        if connection is not None:
            self.pool.release(connection, reset=reset, ahead=ahead)

    def cut(self, reason: str) -> Connection | None:
        """Abort the connection: something is unfinished on it. Returns it, if there is one."""
        connection = self.part()
        if connection is not None:
            connection.abort(reason)
        return connection
