"""Which of a pool's idle connections is taken, and which has to end instead."""

from __future__ import annotations

import pytest

from relay.metrics import Metrics
from relay.upstream.capabilities import UNKNOWN
from relay.upstream.connection import Connection
from relay.upstream.idle import MAX_LOGIN_AGE, Idle

MAX_AGE = 1000.0


@pytest.fixture
async def idle() -> Idle:
    return Idle(MAX_AGE)


def connection(identity: bytes | None = None, *, most: int = 10) -> Connection:
    metrics = Metrics(upstreams=["primary"], listeners=[], task_types=[]).upstreams["primary"]
    made = Connection(
        None,  # type: ignore[arg-type] # nothing ends here that its owner would have to hear of
        UNKNOWN,
        metrics,
        reply_timeout=1.0,
        end_of_data_timeout=1.0,
        identity=identity,
    )
    made.max_transactions = most
    return made


async def test_the_last_that_came_is_taken_first_and_of_its_identity_alone(idle: Idle) -> None:
    first, second, other = connection(), connection(), connection(b"other")
    for each in (first, second, other):
        idle.put(each)
    now = first.opened_at

    assert [idle.take(None, now) for _ in range(3)] == [second, first, None]
    assert [idle.take(b"other", now), idle.take(b"other", now)] == [other, None]
    assert len(idle) == 0


@pytest.mark.parametrize(("identity", "most"), [(None, MAX_AGE), (b"login", MAX_LOGIN_AGE)])
async def test_one_that_is_too_old_ends_before_anybody_looks_after_it(
    idle: Idle, identity: bytes | None, most: float
) -> None:
    old = connection(identity)
    idle.put(old)
    assert idle.take(identity, old.opened_at + most) is old

    idle.put(old)
    assert idle.take(identity, old.opened_at + most + 0.1) is None
    assert not old.usable
    assert len(idle) == 0


async def test_one_that_has_carried_what_it_may_ends(idle: Idle) -> None:
    worn, fresh = connection(most=1), connection()
    worn.transactions = 1
    idle.put(fresh)
    idle.put(worn)

    assert idle.take(None, worn.opened_at) is fresh
    assert not worn.usable


async def test_the_oldest_is_that_which_has_been_idle_longest(idle: Idle) -> None:
    assert idle.oldest() is None
    since = {b"a": 3.0, b"b": 1.0, None: 2.0}
    for identity, moment in since.items():
        each = connection(identity)
        each.idle_since = moment
        idle.put(each)
    found = idle.oldest()

    assert found is not None
    assert found.identity == b"b"
    idle.remove(found)
    idle.remove(found)
    assert {each.identity for each in idle} == {b"a", None}
