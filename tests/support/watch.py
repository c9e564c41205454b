"""What a relay in the test's process shows of itself: what it has counted, what it still has in hand.

Rules: a test waits for a state, never for a time; the deadline is only there to end a test that fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from relay.outcome import Outcome

if TYPE_CHECKING:
    from tests.conftest import Running

__all__ = ["counted", "eventually", "nothing_left", "outcomes"]

DEADLINE_S = 15.0
STEP_S = 0.005
T = TypeVar("T")


async def eventually(found: Callable[[], T], shown: Callable[[], object] = lambda: "") -> T:
    """Return what `found` says as soon as it is true; fail with what `shown` says if that takes too long."""
    loop = asyncio.get_running_loop()
    until = loop.time() + DEADLINE_S
    while not (value := found()):
        assert loop.time() < until, f"waited in vain: {shown()}"
        await asyncio.sleep(STEP_S)
    return value


def outcomes(running: Running, upstreams: Iterable[str] = ("primary", "none")) -> dict[str, int]:
    """Return how many messages ended with each outcome so far; those that never happened are left out."""
    counts = {
        outcome.value: sum(
            int(running.metric("messages_total", upstream=upstream, outcome=outcome.value))
            for upstream in upstreams
        )
        for outcome in Outcome
    }
    return {outcome: count for outcome, count in counts.items() if count}


async def counted(running: Running, **expected: int) -> None:
    """Wait until as many messages are counted as expected, then fail unless they ended as expected."""
    total = sum(expected.values())
    await eventually(lambda: sum(outcomes(running).values()) >= total, lambda: outcomes(running))
    assert outcomes(running) == expected


async def nothing_left(running: Running) -> None:
    """Wait until no session, no transaction and no task of one is left, and nothing is kept for one."""
    reception, pool = running.relay.reception, running.pool
    reserve = running.relay.records.spool.reserve
    await eventually(
        lambda: (
            repr(reception) == "<Reception: 0 sessions, 0 settling>"
            and not reception.services.running
            and " 0 active" in repr(pool)
            and " 0 connecting, 0 waiting" in repr(pool)
            and reserve.promised == 0
        ),
        lambda: f"{reception!r} {pool!r} {reception.services.running} {reserve.promised} octets promised",
    )
