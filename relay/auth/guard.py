"""Guessing passwords is slow: failed logins are counted for each client, delayed, and in the end not tried.

Rules: no timers; a count drains by itself as time passes. What is kept is bounded, the oldest goes first. A
client is an IPv4 address or an IPv6 /64, which is what one site has to itself (RFC 6177), or whatever else
names it. No more are tried at a time than may still fail: sessions that guess together get as many tries as
one that guesses alone. What has succeeded from a client may always be tried from there again: an application
with an old password must not lock out its neighbour on the same host. Nothing is held open for other clients:
a guess that happened to be right would then get through, however many had been wrong.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from relay.policy import client_address

if TYPE_CHECKING:
    from relay.credentials import Credentials

__all__ = ["FAILURES_PER_SESSION", "MAX_DELAY_S", "Guard"]

FAILURES_PER_SESSION = 3
"""Failed logins after which a session is closed."""
MAX_FAILURES = 10
"""Failed logins after which nothing of the client is tried, until the count has drained."""
DRAIN_S = 60.0
"""Seconds after which one failure is forgotten: whoever goes on for ever has one try in them."""
MAX_COUNT = 60
"""Where the count ends, so that no client waits for more than an hour."""
FORGIVE_S = 3600.0
"""Seconds between two successes that clear the count: who has one password must not guess others freely."""
MIN_DELAY_S = 1.0
MAX_DELAY_S = 5.0
"""Seconds by which the reply to a failed login is delayed; a reply that refuses to try deserves as many."""
MAX_CLIENTS = 10_000
"""Clients whose failures are kept."""
MAX_SUCCESSES = 10_000
"""Logins that are known to have succeeded from a client."""


@dataclass(slots=True)
class _Failures:
    count: float
    counted_at: float
    forgiven_at: float | None = None


class Guard:
    """The failed logins of all clients."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with no failures; `clock` gives seconds that never go back."""
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._failures: OrderedDict[str, _Failures] = OrderedDict()
        self._succeeded: OrderedDict[tuple[str, bytes], None] = OrderedDict()
        self._tried: Counter[str] = Counter()

    def blocked(self, client: str, credentials: Credentials) -> bool:
        """Whether `client` (its address as text) has failed too often for `credentials` to be tried."""
        key = _key(client)
        if self._so_far(key) + 1 <= MAX_FAILURES:
            return False
        return (key, credentials.fingerprint(self._key)) not in self._succeeded

    def crowded(self, client: str, credentials: Credentials) -> bool:
        """Whether `credentials` have to wait until others of `client` are decided about: all might fail."""
        key = _key(client)
        if not self._tried[key] or self._so_far(key) + self._tried[key] + 1 <= MAX_FAILURES:
            return False
        return (key, credentials.fingerprint(self._key)) not in self._succeeded

    @contextlib.contextmanager
    def trying(self, client: str) -> Iterator[None]:
        """Count a login of `client` as being tried, until it is noted what came of it."""
        key = _key(client)
        self._tried[key] += 1
        try:
            yield
        finally:
            self._tried[key] -= 1
            if not self._tried[key]:
                del self._tried[key]

    def failed(self, client: str, credentials: Credentials) -> float:
        """Count a login that failed; return the seconds by which the reply to it is delayed."""
        key = _key(client)
        self._succeeded.pop((key, credentials.fingerprint(self._key)), None)
        failures = self._failures.get(key)
        if failures is None:
            failures = self._failures[key] = _Failures(0, 0)
            if len(self._failures) > MAX_CLIENTS:
                self._failures.popitem(last=False)
        self._failures.move_to_end(key)
        failures.count = min(self._count(failures) + 1, MAX_COUNT)
        failures.counted_at = self._clock()
        return min(max(failures.count, MIN_DELAY_S), MAX_DELAY_S)

    def succeeded(self, client: str, credentials: Credentials) -> None:
        """Note a login that succeeded: it clears the count, if none has done so for a while."""
        key = _key(client)
        success = (key, credentials.fingerprint(self._key))
        self._succeeded[success] = None
        self._succeeded.move_to_end(success)
        if len(self._succeeded) > MAX_SUCCESSES:
            self._succeeded.popitem(last=False)
        failures = self._failures.get(key)
        now = self._clock()
        if failures is not None and (failures.forgiven_at is None or now - failures.forgiven_at >= FORGIVE_S):
            failures.count, failures.forgiven_at = 0, now

    def _so_far(self, key: str) -> float:
        failures = self._failures.get(key)
        return 0.0 if failures is None else self._count(failures)

    def _count(self, failures: _Failures) -> float:
        """The failures that have not drained yet."""
        return max(0.0, failures.count - (self._clock() - failures.counted_at) / DRAIN_S)


def _key(client: str) -> str:
    """Return the name under which a client's failures are counted."""
    address = client_address(client)
    if address is None:
        return client
    if isinstance(address, IPv6Address):
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)
