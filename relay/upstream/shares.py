"""Who holds connections of a pool and who waits for one: fair shares between clients. No I/O.

Rules: a client is whom a record names. The next to be served is a waiter of the client that holds the
fewest leases, the one that has waited longest among equals, so that no number of sessions of one client
keeps another one out. A lease is counted from the moment in which it is promised. Without waiters this
costs two changes of a dict for a lease.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.upstream.connection import Connection

__all__ = ["Shares", "Waiter"]


class Waiter:
    """One that waits: for a connection of its identity, or for the permit to open one (None)."""

    __slots__ = ("client", "fresh", "granted", "identity", "number")

    def __init__(self, client: str, identity: bytes | None, number: int, *, fresh: bool) -> None:
        """`number` tells who came first; `fresh`: it takes a permit only."""
        self.client = client
        self.identity = identity
        self.number = number
        self.fresh = fresh
        self.granted: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()


class Shares:
    """Leases and waiters of each client."""

    def __init__(self) -> None:
        """Nobody holds or waits."""
        self._leases: dict[str, int] = {}
        self._waiters: dict[str, OrderedDict[int, Waiter]] = {}
        self._came = 0
        self.waiting = 0
        """How many wait."""

    @property
    def leases(self) -> int:
        """How many leases there are."""
        return sum(self._leases.values())

    def lend(self, client: str) -> None:
        """Count a lease."""
        self._leases[client] = self._leases.get(client, 0) + 1

    def give_back(self, client: str) -> None:
        """Count a lease that has ended."""
        left = self._leases[client] - 1
        if left:
            self._leases[client] = left
        else:
            del self._leases[client]

    def arrival(self) -> int:
        """Return the number of one that comes now."""
        self._came += 1
        return self._came

    def wait(self, waiter: Waiter) -> None:
        """Put a waiter in the queue: behind all others, unless it came before some of them."""
        self.waiting += 1
        queue = self._waiters.setdefault(waiter.client, OrderedDict())
        behind = next(reversed(queue), 0)
        queue[waiter.number] = waiter
        if waiter.number < behind:
            self._waiters[waiter.client] = OrderedDict(sorted(queue.items()))

    def remove(self, waiter: Waiter) -> None:
        """Take a waiter out, if it is still in."""
        queue = self._waiters.get(waiter.client)
        if queue is None or queue.pop(waiter.number, None) is None:
            return
        self.waiting -= 1
        if not queue:
            del self._waiters[waiter.client]

    def next(self, takes: Callable[[Waiter], bool]) -> Waiter | None:
        """Return whose turn it is of those for whom `takes` holds; it stays in the queue."""
        heads = (
            next((waiter for waiter in queue.values() if not waiter.granted.done() and takes(waiter)), None)
            for queue in self._waiters.values()
        )
        return min((head for head in heads if head is not None), key=self._turn, default=None)

    def _turn(self, waiter: Waiter) -> tuple[int, int]:
        return self._leases.get(waiter.client, 0), waiter.number

    def over(self, client: str, total: int) -> bool:
        """Whether the client holds more than its share of `total` while another one waits."""
        leases = self._leases.get(client, 0)
        if leases <= 1 or not any(other != client for other in self._waiters):
            return False
        clients = len(self._leases) + sum(each not in self._leases for each in self._waiters)
        return leases > -(-total // clients)

    def __repr__(self) -> str:
        return f"<Shares: {self.leases} leases, {self.waiting} waiting>"
