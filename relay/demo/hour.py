"""The hour: what a small product sends in it, to whom, and how the upstream treats it.

It is the same each time: chance has a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from relay.dev import Manner

__all__ = ["BREAKS", "MINUTES", "Mail", "manner_of", "the_hour"]

MINUTES: Final = 60


@dataclass(frozen=True, slots=True)
class Mail:
    """One message of the hour: when (in minutes), what, from whom, to whom, and from which host."""

    minute: float
    task_type: str | None
    sender: str
    recipients: tuple[str, ...]
    subject: str
    words: int
    source: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of mail that the product sends: how often a minute, and what it is like."""

    task_type: str | None
    sender: str
    subject: str
    a_minute: float
    words: int
    source: str


_KINDS = (
    _Kind("order-confirmation", "shop@acorn.example", "Your order {number}", 2.4, 220, "127.0.0.2"),
    _Kind("shipping", "shop@acorn.example", "Order {number} is on its way", 1.3, 120, "127.0.0.2"),
    _Kind("password-reset", "account@acorn.example", "Reset your password", 0.7, 60, "127.0.0.3"),
    _Kind("signup", "account@acorn.example", "Welcome to Acorn", 0.9, 150, "127.0.0.3"),
    _Kind("mention", "notify@acorn.example", "{name} mentioned you", 2.6, 80, "127.0.0.4"),
    _Kind("invoice", "billing@acorn.example", "Invoice {number}", 0.35, 900, "127.0.0.5"),
    _Kind(None, "cron@acorn.example", "Backup finished", 0.1, 30, "127.0.0.6"),
)
_DIGEST = _Kind("digest", "digest@acorn.example", "Your week at Acorn", 0, 1400, "127.0.0.4")
_NAMES = (
    *("ann", "ben", "cleo", "dora", "emil", "farah", "gita", "hugo", "ines", "jan", "kim", "lena", "milo"),
    *("nora", "omar", "pia", "quentin", "rosa", "sam", "tara", "uma", "vito", "wanda", "yusuf", "zoe"),
)
_FAMILIES = (
    *("adler", "brandt", "costa", "diaz", "evans", "fischer", "garcia", "haas", "ito", "jansen", "keller"),
    *("lopez", "meyer", "nowak"),
)
_DOMAINS = {
    "example.com": 9,
    "example.net": 6,
    "example.org": 5,
    "mail.example": 5,
    "post.example": 3,
    "uni.example": 2,
    "grey.example": 1,
}
_GONE = frozenset({"old.account@example.org", "typo@exmaple.example", "left@uni.example"})
"""Recipients that the upstream does not know."""
_SPAMTRAP = "trap@post.example"
BREAKS: Final = "flaky@mail.example"
"""At the verdict on a message to it the connection breaks."""
_FORGETFUL = "gita.haas@example.com"
_SLOW_MINUTES = range(38, 42)
"""When the upstream takes its time."""


def the_hour(seed: int = 1) -> list[Mail]:
    """Return the messages of the hour, in their order."""
    random = Random(seed)  # noqa: S311
    return sorted(_mails(random), key=lambda mail: mail.minute)


def _mails(random: Random) -> Iterator[Mail]:
    for kind in _KINDS:
        minute = random.expovariate(kind.a_minute)
        while minute < MINUTES:
            yield _mail(kind, minute, _recipients(kind, random), random)
            minute += random.expovariate(kind.a_minute)
    for _ in range(160):  # once an hour, to everybody who wants it
        yield _mail(_DIGEST, random.uniform(20, 24), (_somebody(random),), random)
    for minute in (6.2, 17.5, 29.0, 44.4, 52.1):
        yield _mail(_KINDS[0], minute, (random.choice(sorted(_GONE)),), random)
    for minute in (21.5, 22.6, 47.3):
        yield _mail(_DIGEST, minute, (_SPAMTRAP,), random)
    for minute in (12.0, 12.6, 13.1, 13.9, 14.2, 15.0):  # somebody who cannot remember
        yield _mail(_KINDS[2], minute, (_FORGETFUL,), random)
    yield _mail(_KINDS[5], 33.3, (BREAKS,), random)


def _recipients(kind: _Kind, random: Random) -> tuple[str, ...]:
    count = random.choice((1, 1, 1, 2, 3)) if kind.task_type == "mention" else 1
    people = [_somebody(random) for _ in range(count)]
    if random.random() < 0.02:
        people.append(random.choice(sorted(_GONE)))
    return tuple(dict.fromkeys(people))


def _somebody(random: Random) -> str:
    (domain,) = random.choices(list(_DOMAINS), list(_DOMAINS.values()))
    return f"{random.choice(_NAMES)}.{random.choice(_FAMILIES)}@{domain}"


def _mail(kind: _Kind, minute: float, recipients: tuple[str, ...], random: Random) -> Mail:
    subject = kind.subject.format(number=random.randint(10000, 99999), name=random.choice(_NAMES).title())
    words = round(kind.words * random.uniform(0.6, 1.6))
    return Mail(minute, kind.task_type, kind.sender, recipients, subject, words, kind.source)


def manner_of(minute: Callable[[], float]) -> Callable[[str], Manner]:
    """Return the upstream's moods; `minute` tells where in the hour we are."""
    greeted: set[str] = set()

    def manner(recipient: str) -> Manner:
        if recipient in _GONE:
            return Manner.REJECT
        if recipient == _SPAMTRAP:
            return Manner.SPAM
        if recipient == BREAKS:
            return Manner.DROP
        if recipient.endswith("@grey.example") and recipient not in greeted:
            greeted.add(recipient)
            return Manner.DEFER
        return Manner.SLOW if int(minute()) in _SLOW_MINUTES else Manner.ACCEPT

    return manner
