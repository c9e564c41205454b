"""Logins that the upstream decides: the client's own credentials, tried there, and its verdict handed back.

Rules: credentials are good only because the upstream took them, all of them, on a connection of their own and
within the last 5 minutes. What was taken is remembered as a keyed hash of everything in it, in memory, and
nothing is derived from it: other credentials of the same user are tried like those of a stranger, so a
wrong password costs an exchange with the upstream whoever else is logged in. What the upstream refuses, now
or when a connection is opened for mail later, is forgotten at once.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from relay.auth.verdict import Verdict
from relay.credentials import PASSWORD_MECHANISMS, TOKEN_MECHANISMS
from relay.reply import Reply
from relay.upstream.capabilities import UNKNOWN
from relay.upstream.idle import MAX_LOGIN_AGE
from relay.upstream.pool import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.credentials import Credentials
    from relay.upstream.pool import Pool

__all__ = ["MAX_REMEMBERED", "Passthrough"]

MAX_REMEMBERED = 10_000
"""Logins that are remembered; beyond it the one that was used longest ago is forgotten."""

UNAVAILABLE = Reply.own(454, "7.0", "The upstream server cannot be asked now, try again later")

_PASSWORDS = frozenset(("PLAIN", "LOGIN", "CRAM-MD5"))


class _Taken(NamedTuple):
    identity: bytes
    welcome: Reply
    """What the upstream said to it."""
    tried_at: float


class Passthrough:
    """The authenticator that asks the upstream."""

    def __init__(self, pool: Pool, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds from any beginning, and never goes back."""
        self._pool = pool
        self._clock = clock
        self._taken: OrderedDict[bytes, _Taken] = OrderedDict()
        """By part of the keyed hash; whether the whole is the same is compared in constant time."""
        pool.on_refused = self._forget

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What can be carried to the upstream as it is now: any password mechanism of its carries ours.

        Before the upstream has been reached it is passwords: a client that is told 454 tries again, one that
        is offered no AUTH gives up.
        """
        if self._pool.capabilities is UNKNOWN:
            return PASSWORD_MECHANISMS
        offered = self._pool.capabilities.mechanisms
        passwords = PASSWORD_MECHANISMS if offered & _PASSWORDS else ()
        return (*passwords, *(mechanism for mechanism in TOKEN_MECHANISMS if mechanism in offered))

    def stands(self, verdict: Verdict) -> bool:
        """Whether the login was one at this upstream, which says itself what it takes, at each MAIL.

        What was given for another one is not shown to it.
        """
        return verdict.credentials is not None and verdict.entry == self._pool.name

    async def login(self, credentials: Credentials) -> Verdict:
        """Return the upstream's verdict; never raises for what the credentials are."""
        identity = self._pool.identity(credentials)
        taken = self._remembered(identity)
        if taken is not None:
            self._taken.move_to_end(_place(identity))
            return self._good(taken.welcome, credentials)
        tried_at = self._clock()  # before the upstream looks: a password may be revoked while it answers
        try:
            welcome = await self._pool.login(credentials)
        except UnavailableError as error:
            return _failed(error.verdict)
        self._remember(_Taken(identity, welcome, tried_at))
        return self._good(welcome, credentials)

    def _good(self, welcome: Reply, credentials: Credentials) -> Verdict:
        name = self._pool.name
        return Verdict(welcome, "ok", credentials.user, credentials=credentials, entry=name)

    def _remembered(self, identity: bytes) -> _Taken | None:
        taken = self._taken.get(_place(identity))
        if taken is None or not hmac.compare_digest(taken.identity, identity):
            return None
        return taken if self._clock() - taken.tried_at < MAX_LOGIN_AGE else None

    def _remember(self, taken: _Taken) -> None:
        place = _place(taken.identity)
        self._taken[place] = taken
        self._taken.move_to_end(place)
        if len(self._taken) > MAX_REMEMBERED:
            self._taken.popitem(last=False)

    def _forget(self, identity: bytes) -> None:
        self._taken.pop(_place(identity), None)

    def __repr__(self) -> str:
        return f"<Passthrough: {len(self._taken)} remembered>"


def _place(identity: bytes) -> bytes:
    return identity[:8]


def _failed(verdict: Reply | None) -> Verdict:
    """Say it in the upstream's words, or that it could not be asked (RFC 4954 section 6)."""
    if verdict is None:
        return Verdict(UNAVAILABLE, "unavailable")
    if verdict.transient:
        return Verdict(verdict.recoded(454) if verdict.code == 421 else verdict, "unavailable")
    return Verdict(verdict, "failed")
