"""Which upstreams a message may go to, and in which order: tables of patterns, facts and answers."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.settings import MatchSettings, UpstreamSettings
from relay.upstream.routing import Facts, Match, Way, in_order


def facts(sender: bytes = b"app@example.com", **over: Any) -> Facts:
    known: dict[str, Any] = {
        "client": "192.0.2.7",
        "address": "",
        "listener": "127.0.0.1:2525",
        "task_type": None,
    }
    return Facts.of(sender, **(known | over))


def match(**keys: list[str]) -> Match:
    return Match(MatchSettings.model_validate(keys))


SENDERS = [
    (["example.com"], b"app@example.com", True),
    (["EXAMPLE.com"], b"app@example.COM", True),
    (["example.com"], b"app@sub.example.com", False),
    (["*.example.com"], b"app@sub.example.com", True),
    (["*.example.com"], b"app@example.com", False),
    (["example.???"], b"app@example.net", True),
    (["example.[cn]*"], b"app@example.org", False),
    (["example.com", "example.net"], b"app@example.net", True),
    (["!example.com"], b"app@example.com", False),
    (["!example.com"], b"app@example.net", True),
    (["!example.com"], b"", True),
    (["*", "!*.example.com"], b"app@a.example.com", False),
    (["*", "!*.example.com"], b"app@example.com", True),
    (["!*.example.com", "*"], b"app@a.example.com", False),
    (["<>"], b"", True),
    (["<>"], b"app@example.com", False),
    (["!<>"], b"", False),
    (["!<>"], b"app@example.com", True),
    (["*"], b"", True),
    (["<>"], b"postmaster", True),
    (["example.com"], b'"a@b"@example.com', True),
    (["example.com"], b"@relay.test:app@example.com", True),
    (["b\u00fccher.example"], "app@b\u00dccher.example".encode(), True),
    (["example.com"], b"app@\xff.com", False),
]


@pytest.mark.parametrize(("patterns", "sender", "expected"), SENDERS)
def test_the_domain_of_the_sender(patterns: list[str], sender: bytes, expected: bool) -> None:
    assert match(sender_domain=patterns).fits(facts(sender)) is expected


CLIENTS = [
    (["192.0.2.7"], {}, True),
    (["192.0.2.8"], {}, False),
    (["192.0.2.0/24"], {}, True),
    (["192.0.2.0/24", "!192.0.2.7"], {}, False),
    (["!192.0.2.0/24"], {}, False),
    (["192.0.2.*"], {}, True),
    (["2001:db8::/32"], {"client": "2001:db8::1"}, True),
    (["2001:db8::/32"], {}, False),
    (["127.0.0.1"], {"client": "unix"}, True),
    (["unix"], {"client": "unix"}, True),
    (["shop"], {"client": "shop", "address": "192.0.2.7"}, True),
    (["SHOP*"], {"client": "shop-1", "address": "192.0.2.7"}, True),
    (["192.0.2.0/24"], {"client": "shop", "address": "192.0.2.7"}, True),
    (["!192.0.2.0/24"], {"client": "shop", "address": "198.51.100.1"}, True),
    (["192.0.2.9"], {"client": "192.0.2.9", "address": "198.51.100.1"}, False),  # a user of that name
    (["192.0.2.7"], {"client": "::ffff:192.0.2.7"}, True),
]


@pytest.mark.parametrize(("patterns", "over", "expected"), CLIENTS)
def test_the_client(patterns: list[str], over: dict[str, str], expected: bool) -> None:
    assert match(client=patterns).fits(facts(**over)) is expected


@pytest.mark.parametrize(
    ("patterns", "listener", "expected"),
    [
        (["127.0.0.1:2525"], "127.0.0.1:2525", True),
        (["127.0.0.1:2525"], "127.0.0.1:2526", False),
        (["*:2525"], "0.0.0.0:2525", True),
        (["[::1]:2525"], "[::1]:2525", True),
        (["unix:/run/*.sock"], "unix:/run/relay.sock", True),
        (["!unix:*"], "unix:/run/relay.sock", False),
    ],
)
def test_the_listener(patterns: list[str], listener: str, expected: bool) -> None:
    assert match(listener=patterns).fits(facts(listener=listener)) is expected


@pytest.mark.parametrize(
    ("patterns", "task_type", "expected"),
    [
        (["mention"], "mention", True),
        (["mention"], "digest", False),
        (["mention"], None, False),
        (["!mention"], None, True),
        (["!mention"], "mention", False),
        (["*"], None, True),
    ],
)
def test_the_task_type(patterns: list[str], task_type: str | None, expected: bool) -> None:
    assert match(task_type=patterns).fits(facts(task_type=task_type)) is expected


@pytest.mark.parametrize(
    ("patterns", "domain", "expected"),
    [
        (["example.org"], "example.org", True),
        (["!example.org"], "example.org", False),
        (["*.org"], "", False),
    ],
)
def test_the_domain_of_a_recipient(patterns: list[str], domain: str, expected: bool) -> None:
    found = match(recipient_domain=patterns)
    assert found.by_recipient
    assert found.fits(facts()), "MAIL does not tell"
    assert found.takes(domain) is expected


def test_every_key_must_fit() -> None:
    both = match(sender_domain=["example.com"], client=["shop"])
    assert both.fits(facts(client="shop", address="192.0.2.7"))
    assert not both.fits(facts())
    assert not both.fits(facts(b"a@example.net", client="shop", address="192.0.2.7"))


def test_what_may_fit_before_a_login() -> None:
    keys = match(client=["shop"], listener=["127.0.0.1:2525"], sender_domain=["example.com"])
    assert keys.may_fit("127.0.0.1:2525", None, None)
    assert not keys.may_fit("127.0.0.1:2526", None, None)


def way(name: str, priority: int = 10, weight: int = 1, **keys: list[str]) -> Way:
    given = {"match": keys} if keys else {}
    return Way.of(
        UpstreamSettings.model_validate(
            {"address": "127.0.0.1:25", "name": name, "priority": priority, "weight": weight, **given}
        )
    )


def order(*ways: Way, seed: int = 1) -> list[str]:
    return [each.name for each in in_order(ways, Random(seed))]


def test_the_order() -> None:
    table = [
        way("last", 30),
        way("general", 10),
        way("special", 10, sender_domain=["example.com"]),
        way("first", 1),
        way("drained", 1, weight=0),
    ]
    for seed in range(50):
        assert order(*table, seed=seed) == ["first", "special", "general", "last"]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 7), (100, 1, 1)])
def test_equals_share_by_weight(weights: tuple[int, ...]) -> None:
    """Within six standard deviations of what the weights say, for the first place and then for the second."""
    rounds, dice = 20_000, Random(20261123)
    ways = [way(str(number), weight=weight) for number, weight in enumerate(weights)]
    drawn = [tuple(int(each.name) for each in in_order(ways, dice)) for _ in range(rounds)]
    firsts = Counter(places[0] for places in drawn)
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(firsts[number] - rounds * share) < 6 * (rounds * share * (1 - share)) ** 0.5
    after = [places[1] for places in drawn if places[0] == 0]
    for number, weight in list(enumerate(weights))[1:]:
        share = weight / sum(weights[1:])
        assert abs(after.count(number) - len(after) * share) <= 6 * (len(after) * share * (1 - share)) ** 0.5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=8), st.integers(0, 1000)
)
def test_an_order_is_by_rank_and_leaves_out_the_drained(
    table: list[tuple[int, int, bool]], seed: int
) -> None:
    ways = [
        way(str(number), priority, weight, **({"client": ["*"]} if matches else {}))
        for number, (priority, weight, matches) in enumerate(table)
    ]
    found = in_order(ways, Random(seed))
    assert sorted(each.name for each in found) == sorted(each.name for each in ways if each.weight)
    ranks = [each.rank for each in found]
    assert ranks == sorted(ranks)
