"""Which upstreams a message may go to, and in which order. Pure functions of values.

Rules: a message must fit every key of an upstream's `match`; an upstream without one takes any message, so
that it also stands in for those that have one. In a list of patterns a leading "!" excludes: a value fits if
none of those fits it and, where there are others, one of the others does. Lower priorities come first, at
the same priority those with a `match` before those without; among equals the order is drawn by lot anew for
each message, by weight. Weight 0 is drained: nothing is sent there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from relay.envelope import domain_of, text
from relay.policy import LOCAL, client_address
from relay.settings.kinds import fits
from relay.settings.networks import Network, parse_network

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

    from relay.policy import Address
    from relay.settings import MatchSettings, UpstreamSettings

__all__ = ["Facts", "Match", "Way", "in_order"]

NULL = "<>"
"""How a pattern names the null reverse-path."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a message at MAIL."""

    sender_domain: str
    """The domain of the reverse-path as in the record; empty if it has none."""
    client: str
    """The client's name in the record: a user, or its address."""
    address: Address
    """Where it connects from; a unix socket is this machine."""
    listener: str
    """The listener's configured address."""
    task_type: str | None
    """The type that the rules give it; None: only a header could tell."""

    @classmethod
    def of(
        cls, reverse_path: bytes, *, client: str, address: str, listener: str, task_type: str | None
    ) -> Facts:
        """Make them of what stands in MAIL and of who says it; `address` is empty where `client` is one."""
        found = client_address(address or client) or LOCAL
        return cls(domain_of(text(reverse_path)), client, found, listener, task_type)


class Patterns:
    """A list of patterns."""

    __slots__ = ("_excluded", "_wanted")

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = tuple(patterns)
        self._wanted = tuple(each for each in listed if not each.startswith("!"))
        self._excluded = tuple(each[1:] for each in listed if each.startswith("!"))

    def fit(self, value: str) -> bool:
        """Whether `value` is meant."""
        if any(fits(pattern, value) for pattern in self._excluded):
            return False
        return not self._wanted or any(fits(pattern, value) for pattern in self._wanted)


class Clients:
    """A list of patterns for clients: networks and addresses, and all others for names."""

    __slots__ = ("_excluded", "_wanted")

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = tuple(patterns)
        self._wanted = tuple(_client(each) for each in listed if not each.startswith("!"))
        self._excluded = tuple(_client(each[1:]) for each in listed if each.startswith("!"))

    def fit(self, name: str, address: Address) -> bool:
        """Whether the client is meant."""
        if any(_is(client, name, address) for client in self._excluded):
            return False
        return not self._wanted or any(_is(client, name, address) for client in self._wanted)


def _client(pattern: str) -> Network | str:
    try:
        return parse_network(pattern)
    except ValueError:
        return pattern


def _is(client: Network | str, name: str, address: Address) -> bool:
    return fits(client, name) if isinstance(client, str) else address in client


class Match:
    """What an upstream's `match` says, made ready."""

    __slots__ = ("_client", "_listener", "_recipient_domain", "_sender_domain", "_task_type")

    def __init__(self, settings: MatchSettings) -> None:
        given = settings.given
        self._sender_domain = _patterns(given, "sender_domain")
        self._recipient_domain = _patterns(given, "recipient_domain")
        self._listener = _patterns(given, "listener")
        self._task_type = _patterns(given, "task_type")
        self._client = Clients(given["client"]) if "client" in given else None

    @property
    def by_recipient(self) -> bool:
        """Whether it takes a recipient to tell."""
        return self._recipient_domain is not None

    @property
    def by_task_type(self) -> bool:
        """Whether it asks for the task type."""
        return self._task_type is not None

    def fits(self, facts: Facts) -> bool:
        """Whether a message fits, as far as MAIL tells."""
        if not self.may_fit(facts.listener, facts.client, facts.address):
            return False
        if self._sender_domain is not None and not self._sender_domain.fit(facts.sender_domain or NULL):
            return False
        # A type that nobody knows yet is none that is excluded, and none that is asked for.
        return self._task_type is None or self._task_type.fit(facts.task_type or "")

    def may_fit(self, listener: str, client: str | None, address: Address | None) -> bool:
        """Whether messages of a client can fit; None: it may still log in, so it is not known who it is."""
        if self._listener is not None and not self._listener.fit(listener):
            return False
        if self._client is None or client is None or address is None:
            return True
        return self._client.fit(client, address)

    def takes(self, recipient_domain: str) -> bool:
        """Whether a recipient in this domain fits."""
        return self._recipient_domain is None or self._recipient_domain.fit(recipient_domain)


def _patterns(given: dict[str, tuple[str, ...]], key: str) -> Patterns | None:
    patterns = given.get(key)
    return None if patterns is None else Patterns(patterns)


@dataclass(frozen=True, slots=True)
class Way:
    """One upstream as routing sees it."""

    name: str
    priority: int
    weight: int
    match: Match | None

    @classmethod
    def of(cls, upstream: UpstreamSettings) -> Way:
        """Make it of the upstream's settings."""
        match = None if upstream.match is None else Match(upstream.match)
        return cls(upstream.name, upstream.priority, upstream.weight, match)

    @property
    def drained(self) -> bool:
        """Whether it gets no new messages."""
        return not self.weight

    @property
    def rank(self) -> tuple[int, bool]:
        """Its place in the order; those of one rank share by weight."""
        return self.priority, self.match is None

    def fits(self, facts: Facts) -> bool:
        """Whether a message may go there, as far as MAIL tells."""
        return self.match is None or self.match.fits(facts)

    def takes(self, recipient_domain: str) -> bool:
        """Whether a recipient in this domain may go there, in a message that fits."""
        return self.match is None or self.match.takes(recipient_domain)


def in_order(ways: Sequence[Way], random: Random) -> list[Way]:
    """Return the ways in the order in which to try them; drained ones are left out."""
    open_ways = sorted((way for way in ways if not way.drained), key=lambda way: way.rank)
    order: list[Way] = []
    for _, group in groupby(open_ways, key=lambda way: way.rank):
        order += _drawn(list(group), random)
    return order


def _drawn(equals: list[Way], random: Random) -> list[Way]:
    """Draw lots without putting them back: each time, the chance is the share of the weights left."""
    if len(equals) == 1:
        return equals
    # The smallest of exponential times is that of each with a chance in proportion to its rate.
    return sorted(equals, key=lambda way: random.expovariate(way.weight))
