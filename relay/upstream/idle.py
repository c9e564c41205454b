"""The connections of a pool that nobody has on lease: of each identity the last that came is taken first.

Rules: one that has carried as many transactions, or is as old, as it may be is not taken: it ends. A client's
identity that has none idle leaves nothing behind.
"""

from __future__ import annotations

import hmac
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.upstream.connection import Connection

__all__ = ["MAX_LOGIN_AGE", "Idle", "same"]

MAX_LOGIN_AGE: Final = 300.0
"""Seconds for which a login of a client counts: a password that was revoked must end."""


class Idle:
    """Idle connections of one pool. Times are in seconds, of the loop's clock."""

    __slots__ = ("_by_identity", "_max_age")

    def __init__(self, max_age: float) -> None:
        """`max_age`: how old a connection of the relay's own account may become."""
        self._max_age = max_age
        self._by_identity: dict[bytes | None, deque[Connection]] = {}

    def take(self, identity: bytes | None, now: float) -> Connection | None:
        """Return one of this identity, which is idle no more; None: there is none."""
        idle = self._by_identity.get(identity)
        while idle:
            connection = idle.pop()
            if identity is not None and not idle:
                del self._by_identity[identity]
            if self.worn(connection, now):
                connection.quit()
            elif connection.usable and same(connection.identity, identity):
                return connection
        return None

    def put(self, connection: Connection) -> None:
        """Keep a connection that has become idle."""
        idle = self._by_identity.get(connection.identity)
        if idle is None:
            idle = self._by_identity[connection.identity] = deque()
        idle.append(connection)

    def remove(self, connection: Connection) -> None:
        """Keep this one no longer, if it was kept."""
        idle = self._by_identity.get(connection.identity)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._by_identity[connection.identity]

    def quit(self, identity: bytes) -> None:
        """End all of this identity."""
        for connection in self._by_identity.pop(identity, ()):
            connection.quit()

    def oldest(self) -> Connection | None:
        """Return the one that has been idle longest, of whatever identity; it stays."""
        heads = [idle[0] for idle in self._by_identity.values() if idle]
        return min(heads, key=_idle_since, default=None)

    def worn(self, connection: Connection, now: float) -> bool:
        """Whether a connection has done what it may: it is not to be used again."""
        max_age = self._max_age
        if connection.identity is not None:
            max_age = min(max_age, MAX_LOGIN_AGE)
        return connection.transactions >= connection.max_transactions or now - connection.opened_at > max_age

    def __iter__(self) -> Iterator[Connection]:
        return iter([connection for idle in self._by_identity.values() for connection in idle])

    def __len__(self) -> int:
        return sum([len(idle) for idle in self._by_identity.values()])


def same(one: bytes | None, other: bytes | None) -> bool:
    """Whether two identities are the same; how long that takes says nothing of where they differ."""
    if one is None or other is None:
        return one is other
    return hmac.compare_digest(one, other)


def _idle_since(connection: Connection) -> float:
    return connection.idle_since
