"""All upstreams of the relay: their pools by name, the route of a message, what they can do together.

Rules: a route is decided once, at MAIL, and names pools; which of them gets the message is for the
transaction, by trying them in order. Credentials of a client go to the one upstream that decides about
them, whatever else is configured, and to no other. When the settings change, an upstream that is reached
as before keeps its connections and what is known of it; a pool that is not wanted any more is left to its
transactions, and goes with the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from typing import TYPE_CHECKING, Protocol

from relay.envelope import domain_of, text
from relay.policy import LOCAL, client_address
from relay.upstream.capabilities import UNKNOWN, Capabilities
from relay.upstream.dial import Dialer
from relay.upstream.pool import Pool, UnavailableError
from relay.upstream.routing import Facts, Way, in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from relay.credentials import Credentials
    from relay.metrics import Metrics
    from relay.settings import Settings, UpstreamSettings

__all__ = ["Route", "Sender", "Upstreams"]


class Sender(Protocol):
    """Who sends, as far as routing asks."""

    @property
    def client(self) -> str:
        """Its name in the record."""

    @property
    def address(self) -> str:
        """Where it connects from, if that is not its name."""

    @property
    def listener(self) -> str:
        """The listener's configured address."""

    @property
    def credentials(self) -> Credentials | None:
        """What it has logged in with, if an upstream took that."""


class Route:
    """The upstreams that one message may go to, in the order in which to try them."""

    __slots__ = ("_ways", "by_recipient", "pools")

    def __init__(self, ways: Sequence[tuple[Way, Pool]]) -> None:
        self._ways = tuple(ways)
        self.pools = tuple(pool for _, pool in ways)
        """All of them."""
        self.by_recipient = any(way.match is not None and way.match.by_recipient for way, _ in ways)
        """Whether it takes a recipient to know which ones."""

    def pools_for(self, path: bytes) -> tuple[Pool, ...]:
        """Those that a message to this forward-path may go to."""
        domain = domain_of(text(path))
        return tuple(pool for way, pool in self._ways if way.takes(domain))

    def takes(self, pool: Pool, path: bytes) -> bool:
        """Whether a message to this forward-path may go to `pool`."""
        return pool in self.pools_for(path)

    def __repr__(self) -> str:
        return f"<Route: {', '.join(pool.name for pool in self.pools) or 'nowhere'}>"


class Upstreams:
    """The upstreams as they are configured now, and those that are being left."""

    def __init__(
        self, settings: Settings, metrics: Metrics, *, token: str, random: Random | None = None
    ) -> None:
        """`token` marks the relay's own greeting; `random` draws lots between equals and pauses."""
        self._metrics = metrics
        self._token = token
        self._random = random or Random()  # noqa: S311  no secret
        self._made_from: dict[str, tuple[str, UpstreamSettings]] = {}
        self._ways: tuple[Way, ...] = ()
        self._fixed: Route | None = None
        self._of_logins: Route = Route(())
        self._tasks: set[asyncio.Task[None]] = set()
        # Until `sweep` has seen them at rest, and so shown and said that nothing is left.
        self._leaving: set[Pool] = set()
        self.pools: dict[str, Pool] = {}
        """Those that are configured, by name."""
        self.passthrough: Pool | None = None
        """The one that decides about logins, if one does."""
        self.xforward = False
        """Whether one of them is to be told who the clients are."""
        self._follow(settings)

    # Settings

    def apply(self, settings: Settings) -> None:
        """Follow changed settings; no transaction notices. Raises OSError, and nothing has changed.

        Whoever asked `passthrough` about logins asks again afterwards: it may be another pool.
        """
        before = set(self.pools.values())
        self._follow(settings)
        for pool in self.pools.values():
            if pool not in before and not pool.draining:
                self._spawn(_try(pool))

    def _follow(self, settings: Settings) -> None:
        made = {upstream.name: self._pool_for(upstream, settings) for upstream in settings.upstreams}
        for name, pool in self.pools.items():
            if made.get(name) is not pool:
                self._leaving.add(pool)
                pool.drain(replaced=name in made)
        for pool in self._leaving:
            if pool.name in made:  # taken out before, and now back
                pool.drain(replaced=True)
        self.pools = made
        for upstream in settings.upstreams:
            pool, drained = made[upstream.name], not upstream.weight
            self._made_from[upstream.name] = _reached(upstream, settings)
            if drained and not pool.draining:
                pool.drain()
            elif pool.draining and not drained:
                pool.resume()
        self.xforward = any(pool.xforward for pool in made.values())
        self._route_by(settings)

    def _pool_for(self, upstream: UpstreamSettings, settings: Settings) -> Pool:
        """Return the pool that there is, if the upstream is reached as before, else a new one."""
        pool = self.pools.get(upstream.name)
        if pool is not None and self._made_from[upstream.name] == _reached(upstream, settings):
            return pool
        dialer = Dialer(upstream, hostname=settings.server.hostname, own_token=self._token)
        made = Pool(upstream, dialer, self._metrics.add_upstream(upstream.name), random=self._random)
        made.on_drained_use = self._still_used
        return made

    def _still_used(self, pool: Pool) -> None:
        """Look after a pool that was at rest: a transaction from before has it on its route."""
        if self.pools.get(pool.name) is not pool:
            self._leaving.add(pool)
            pool.drain(replaced=pool.name in self.pools)

    def _route_by(self, settings: Settings) -> None:
        self._ways = tuple(Way.of(upstream) for upstream in settings.upstreams)
        usable = [way for way in self._ways if not way.drained]
        alike = all(way.match is None for way in usable) and len({way.rank for way in usable}) == len(usable)
        self._fixed = self._along(usable) if alike else None
        self.passthrough = None
        if settings.clients.auth == "passthrough":
            decides = settings.clients.passthrough_to or settings.upstreams[0].name
            self.passthrough = self.pools[decides]
        named = [way for way in self._ways if self.pools[way.name] is self.passthrough]
        self._of_logins = Route([(Way(way.name, 0, 1, None), self.pools[way.name]) for way in named])

    def _along(self, ways: Sequence[Way]) -> Route:
        return Route([(way, self.pools[way.name]) for way in in_order(ways, self._random)])

    # Routing

    def route(
        self, sender: Sender, reverse_path: bytes, task_type_of: Callable[[bytes], str | None]
    ) -> Route:
        """Return the route of a message; `task_type_of` tells the type by reverse-path, None: not known."""
        if sender.credentials is not None:
            return self._of_logins
        if self._fixed is not None:
            return self._fixed
        if not any(way.match for way in self._ways):
            return self._along(self._ways)
        by_type = any(way.match is not None and way.match.by_task_type for way in self._ways)
        facts = Facts.of(
            reverse_path,
            client=sender.client,
            address=sender.address,
            listener=sender.listener,
            task_type=task_type_of(reverse_path) if by_type else None,
        )
        return self._along([way for way in self._ways if way.fits(facts)])

    def capabilities(self, sender: Sender, *, may_relay: bool, may_log_in: bool) -> Capabilities:
        """Return what every upstream can do that messages of this client may go to.

        `may_relay`: it may send as it is; `may_log_in`: it may become somebody else yet. An upstream that
        has not been reached is not asked.
        """
        if sender.credentials is not None:
            pools = self._of_logins.pools
        elif self._fixed is not None and self.passthrough is None:
            pools = self._fixed.pools
        else:
            pools = self._possible(sender, may_relay=may_relay, may_log_in=may_log_in)
        known = [pool.capabilities for pool in pools if pool.capabilities is not UNKNOWN]
        return Capabilities.common(known) if known else UNKNOWN

    def _possible(self, sender: Sender, *, may_relay: bool, may_log_in: bool) -> tuple[Pool, ...]:
        found = {self.passthrough} if may_log_in and self.passthrough is not None else set()
        if may_relay or (may_log_in and self.passthrough is None):
            address = client_address(sender.address or sender.client) or LOCAL
            client = None if may_log_in else sender.client
            found |= {
                self.pools[way.name]
                for way in self._ways
                if not way.drained
                and (way.match is None or way.match.may_fit(sender.listener, client, address))
            }
        return tuple(found)

    # Looking after them

    async def probe(self) -> None:
        """Learn what they can do, all at once; each gets its `connect_timeout`."""
        await asyncio.gather(*(_try(pool) for pool in self.pools.values() if not pool.draining))

    def states(self, now: float) -> Sequence[tuple[str, str]]:
        """Return each upstream's name and how it is at `now` in the loop's time, to people."""
        leaving = [pool for pool in self._leaving if pool.transactions]
        return [(pool.name, pool.state(now)) for pool in (*self.pools.values(), *leaving)]

    def sweep(self, now: float) -> None:
        """Look at all waits of all connections, and at what failed; every second."""
        leaving = tuple(self._leaving)
        for pool in (*self.pools.values(), *leaving):
            pool.sweep(now)
        self._leaving = {pool for pool in leaving if pool.busy}

    async def close(self) -> None:
        """Say QUIT on idle connections and cut what is left; no lease is given any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(pool.close() for pool in (*self.pools.values(), *self._leaving)))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def __repr__(self) -> str:
        return f"<Upstreams: {', '.join(map(repr, self.pools.values()))}>"


def _reached(upstream: UpstreamSettings, settings: Settings) -> tuple[str, UpstreamSettings]:
    """All that connections are made by: which mail goes over them is left out."""
    neutral = {"priority": 0, "weight": 1, "match": None}
    return settings.server.hostname, upstream.model_copy(update=neutral)


async def _try(pool: Pool) -> None:
    with contextlib.suppress(UnavailableError, TimeoutError):
        await asyncio.wait_for(pool.probe(), pool.connect_timeout)
