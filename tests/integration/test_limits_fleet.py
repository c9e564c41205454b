"""Rate limits where several relays, processes of their own, use one store; and across a SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from relay.app import Relay
from relay.limits import presence
from tests.support.codes import send
from tests.support.process import RelayProcess
from tests.support.upstream import Delay, ScriptedUpstream
from tests.support.watch import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.databases import PostgresDatabase


MAXIMUM = 10
LIMITS = f'[[limits]]\nscope = "sender"\nmax = {MAXIMUM}\nper = "1d"\n'
CLIENTS = 4
"""At the same time, at each relay."""


@pytest.fixture
async def fleet(tmp_path: Path, upstream: ScriptedUpstream) -> AsyncIterator[list[RelayProcess]]:
    """Three relays on one store."""
    store = f"sqlite:///{tmp_path / 'rows.db'}"
    async with contextlib.AsyncExitStack() as stack:
        relays = []
        for number in range(3):
            directory = tmp_path / str(number)
            directory.mkdir()
            relay = RelayProcess(
                directory,
                upstream.port,
                records={"url": store, "spool": str(directory / "spool")},
            )
            relay.config.write_text(relay.config.read_text() + LIMITS)
            relays.append(await stack.enter_async_context(relay))
        await asyncio.gather(*(relay.start() for relay in relays))
        yield relays


async def test_one_after_the_other_exactly_the_maximum_passes_at_three_relays(
    fleet: list[RelayProcess], upstream: ScriptedUpstream
) -> None:
    ends = [
        (await send(fleet[number % 3].port, "a@example.com", ["b@example.org"]))[-1]
        for number in range(2 * MAXIMUM)
    ]
    assert ends == [250] * MAXIMUM + [451] * MAXIMUM
    assert len(upstream.accepted) == MAXIMUM


async def test_in_parallel_no_more_pass_beyond_it_than_others_have_in_flight(
    fleet: list[RelayProcess], upstream: ScriptedUpstream
) -> None:
    async def client(relay: RelayProcess) -> Counter[int]:
        ends: Counter[int] = Counter()
        while not ends[451]:
            ends[(await send(relay.port, "a@example.com", ["b@example.org"]))[-1]] += 1
        return ends

    ends = sum(
        await asyncio.gather(*(client(relay) for relay in fleet for _ in range(CLIENTS))), Counter[int]()
    )
    assert MAXIMUM <= ends[250] <= MAXIMUM + 2 * CLIENTS
    assert len(upstream.accepted) == ends[250]
    for relay in fleet:
        assert (await send(relay.port, "a@example.com", ["b@example.org"]))[-1] == 451


async def test_who_is_left_alone_counts_what_others_had_sent(
    fleet: list[RelayProcess], upstream: ScriptedUpstream
) -> None:
    for number in range(6):
        assert (await send(fleet[number % 3].port, "a@example.com", ["b@example.org"]))[-1] == 250
    await fleet[0].terminate()
    await fleet[2].terminate()
    ends = [(await send(fleet[1].port, "a@example.com", ["b@example.org"]))[-1] for _ in range(6)]
    assert ends == [250] * 4 + [451] * 2
    assert len(upstream.accepted) == MAXIMUM


async def test_what_others_had_sent_is_asked_for_once_they_have_gone(
    start: Any, settings_for: Any, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is left knows a count of its own, from before they sent."""
    monkeypatch.setattr(presence, "LOOK_S", 0.05)
    limits = [{"scope": "sender", "max": MAXIMUM, "per": "1d"}]
    other = Relay(settings_for(upstream.port, records={"spool": str(tmp_path / "other")}, limits=limits))
    async with start(upstream.port, limits=limits) as running:
        in_force = running.relay.reception.services.limits
        await other.start()
        try:
            await eventually(lambda: in_force.shared)
            port = int(other.reception.addresses[0].rpartition(":")[2])
            for each in (running.port, *[port] * (MAXIMUM - 1)):
                assert (await send(each, "a@example.com", ["b@example.org"]))[-1] == 250
        finally:
            await other.stop()
        await eventually(lambda: not in_force.shared)
        assert (await send(running.port, "a@example.com", ["b@example.org"]))[-1] == 451
    assert len(upstream.accepted) == MAXIMUM


async def test_a_relay_that_is_killed_and_started_again_lets_no_more_through(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    held = asyncio.Event()
    upstream.script = {"end_of_data": [None, None, None, Delay(held), Delay(held), Delay(held)]}
    relay = RelayProcess(tmp_path, upstream.port)
    relay.config.write_text(relay.config.read_text() + LIMITS)
    async with relay:
        await relay.start()
        sends = [asyncio.create_task(send(relay.port, "a@example.com", ["b@example.org"])) for _ in range(6)]
        await upstream.wait_for(lambda: len(upstream.messages) == 6)
        done, waiting = await asyncio.wait(sends, timeout=0.2)
        assert [task.result()[-1] for task in done] == [250] * 3
        await relay.kill()
        held.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        upstream.script = {}
        await relay.start()
        again = [send(relay.port, "a@example.com", ["b@example.org"]) for _ in range(20)]
        ends = Counter(codes[-1] for codes in await asyncio.gather(*again))
        rows = len(relay.rows())
        doubts = len(relay.rows("SELECT * FROM task_in_doubt"))
    # Three were under way, and are in doubt: they may have been sent, so they count.
    assert (rows, doubts) == (MAXIMUM - 3, 3)
    assert ends == {250: MAXIMUM - 6, 451: 20 - (MAXIMUM - 6)}
    assert len(upstream.accepted) <= MAXIMUM


async def test_two_relays_on_one_postgresql(
    settings_for: Any, upstream: ScriptedUpstream, postgres_database: PostgresDatabase, tmp_path: Path
) -> None:
    relays = [
        Relay(
            settings_for(
                upstream.port,
                records={"url": postgres_database.url, "spool": str(tmp_path / name)},
                limits=[{"scope": "sender", "max": MAXIMUM, "per": "1d"}],
            )
        )
        for name in ("one", "two")
    ]
    started = []
    try:
        for relay in relays:
            await relay.start()
            started.append(relay)
        ports = [int(relay.reception.addresses[0].rpartition(":")[2]) for relay in relays]
        ends = [
            (await send(ports[number % 2], "a@example.com", ["b@example.org"]))[-1]
            for number in range(MAXIMUM + 4)
        ]
        assert ends == [250] * MAXIMUM + [451] * 4
        (state,) = await relays[0].limits.now()
        assert [(key.key, key.used, key.state) for key in state.keys] == [("a@example.com", MAXIMUM, "over")]
    finally:
        for relay in reversed(started):
            await relay.stop()
