"""Identities are RFC 9562 version 7 UUIDs and always increase within a process."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from relay.records.identity import IdentitySource, uuid7


def milliseconds(identity: UUID) -> int:
    return identity.int >> 80


def test_version_variant_and_time() -> None:
    before = time.time_ns() // 1_000_000
    identity = IdentitySource().next()
    after = time.time_ns() // 1_000_000

    assert identity.version == 7
    assert identity.variant == RFC_4122
    assert before <= milliseconds(identity) <= after


def test_the_millisecond_is_where_the_rfc_puts_it() -> None:
    """The time of the example in RFC 9562, appendix A.6."""
    identity = IdentitySource(clock=lambda: 0x017F22E279B0 * 1_000_000).next()

    assert str(identity).startswith("017f22e2-79b0-7")


def test_equal_milliseconds_increase() -> None:
    source = IdentitySource(clock=lambda: 1_700_000_000_000_000_000)
    identities = [source.next() for _ in range(10_000)]

    assert all(one < next_one for one, next_one in pairwise(identities))
    assert {milliseconds(identity) for identity in identities} == {1_700_000_000_000}


def test_the_time_beyond_the_millisecond_comes_next() -> None:
    """RFC 9562 section 6.2, method 3: identities of several processes sort by it, too."""
    second = 1_700_000_000_000_000_000
    parts = [
        IdentitySource(clock=lambda at=at: second + at).next().int >> 64 & 0xFFF
        for at in (0, 250_000, 999_999)
    ]

    assert parts == [0, 1024, 4095]


def test_what_has_no_room_to_count_up_goes_on_with_the_next_time() -> None:
    source = IdentitySource(clock=lambda: 1_700_000_000_000_000_000)
    first = source.next()
    source._count = (1 << 62) - 1
    following = [source.next() for _ in range(3)]

    assert first < following[0] < following[1] < following[2]
    assert {(each.version, each.variant) for each in following} == {(7, RFC_4122)}
    assert following[0].int >> 64 == (first.int >> 64) + 1


@given(st.lists(st.integers(min_value=0, max_value=2**47 * 1_000_000), min_size=2))
def test_any_clock_gives_increasing_version_7(readings: list[int]) -> None:
    ticks = iter(readings)
    source = IdentitySource(clock=lambda: next(ticks))
    identities = [source.next() for _ in readings]

    assert all(one < next_one for one, next_one in pairwise(identities))
    assert {(identity.version, identity.variant) for identity in identities} == {(7, RFC_4122)}


def test_threads_never_share_an_identity() -> None:
    made: list[list[UUID]] = [[] for _ in range(4)]

    def work(mine: list[UUID]) -> None:
        mine.extend(uuid7() for _ in range(2_000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({identity for mine in made for identity in mine}) == 8_000
    assert all(mine == sorted(mine) for mine in made)
