"""Three relays behind haproxy on one PostgreSQL, which are killed and started again, as the database is.

What clients were told, what the upstream has and what the table holds agree afterwards.
`FLEET_MESSAGES=50000 pytest -s tests/crash/test_fleet.py` sends so many, and prints the figures.
"""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.interop.peers import command, needs, run
from tests.support import postgres
from tests.support.databases import Cluster, PostgresDatabase
from tests.support.fleet import Fleet, haproxy, prometheus
from tests.support.storm import Storm
from tests.support.upstream import CHUNKING, Delay, ScriptedUpstream
from tests.support.watch import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs("haproxy", "haproxy")

MESSAGES = int(os.environ.get("FLEET_MESSAGES", "400"))
RELAYS = 3
SECONDS = 240 + MESSAGES // 20


@pytest.fixture
def server() -> Iterator[postgres.Server]:
    programs = postgres.directory_of(postgres.NEWEST)
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres.Server(programs) as found:
        yield found


@pytest.fixture
def own_database(server: postgres.Server) -> Iterator[PostgresDatabase]:
    found = Cluster(server)
    yield found.database(empty=True)
    found.close()


async def end_the_database(server: postgres.Server, dice: random.Random) -> None:
    """A crash, or a restart in order; away for a moment or for longer than a commit may take."""
    await asyncio.to_thread(server.kill if dice.random() < 0.5 else server.stop)
    await asyncio.sleep(dice.choice([0.0, 0.5, 3.0]))
    await asyncio.to_thread(server.start)


async def end_a_relay(fleet: Fleet, dice: random.Random) -> int:
    """A crash, or a stop in order; return the rows that wait in its spool meanwhile."""
    relay = dice.choice(fleet.relays)
    if dice.random() < 0.7:
        await relay.kill()
    else:
        assert await relay.terminate() == 0
    spooled = sum(
        segment.read_bytes().count(b"\n") for segment in (relay.directory / "spool").glob("[0-9]*.jsonl")
    )
    await asyncio.sleep(dice.uniform(0.0, 0.5))
    await relay.start()
    return spooled


@pytest.mark.timeout(SECONDS)
async def test_after_kills_of_relays_and_database_all_accounts_agree(
    tmp_path: Path, server: postgres.Server, own_database: PostgresDatabase
) -> None:
    dice = random.Random()
    relay_kills = database_kills = spooled = 0
    async with (
        ScriptedUpstream(extensions=list(CHUNKING)) as upstream,
        Fleet(tmp_path, own_database, upstream.port, RELAYS) as fleet,
    ):
        upstream.script = {"end_of_data": lambda *_: Delay(dice.uniform(0.0, 0.02))}
        await asyncio.gather(*(relay.start() for relay in fleet.relays))  # on an empty database, at once
        async with haproxy(fleet.ports) as port:
            storm = Storm(fleet, upstream, clients=30, seed=dice.randrange(1 << 32), port=lambda: port)  # type: ignore[arg-type]
            async with storm:
                while storm.told_yes < MESSAGES or relay_kills < RELAYS or not database_kills:
                    await asyncio.sleep(dice.uniform(0.2, 1.0))
                    if dice.random() < 0.3:
                        await end_the_database(server, dice)
                        database_kills += 1
                    else:
                        spooled += await end_a_relay(fleet, dice)
                        relay_kills += 1
        for relay in fleet.relays:
            await relay.until("records_spooled", 0, timeout_s=60.0)
            assert await relay.terminate() == 0
        findings, figures = await storm.settle()
        print(
            f"\nkills of relays {relay_kills}, of the database {database_kills}, spooled {spooled}; {figures}"
        )
        errors = [relay.errors() for relay in fleet.relays]

    assert findings == []
    assert figures.told_yes >= MESSAGES
    assert errors == [""] * RELAYS
    names = {name for (name,) in own_database.rows("SELECT DISTINCT data->>'relay' FROM task_done")}
    assert names == {f"relay-{number}.test" for number in range(RELAYS)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("peer", [pytest.param("prometheus", marks=needs("prometheus", "prometheus"))])
async def test_prometheus_scrapes_every_relay_and_its_linter_has_nothing_to_say(
    tmp_path: Path, peer: str, postgres_database: PostgresDatabase
) -> None:
    async with (
        ScriptedUpstream() as upstream,
        Fleet(tmp_path, postgres_database, upstream.port, RELAYS) as fleet,
    ):
        await asyncio.gather(*(relay.start() for relay in fleet.relays))
        async with haproxy(fleet.ports) as port, prometheus(fleet.http_ports, tmp_path) as scraper:
            storm = Storm(fleet, upstream, clients=6, port=lambda: port)  # type: ignore[arg-type]
            async with storm:
                await eventually(lambda: storm.told_yes >= 30)
            wanted = storm.told_yes

            async def recorded() -> bool:
                up = await scraper.ask("up")
                rows = await scraper.ask("sum(smtp_relay_records_total)")
                return list(up.values()) == [1.0] * RELAYS and rows == {"": float(wanted)}

            async with asyncio.timeout(60):
                while not await recorded():
                    await asyncio.sleep(0.2)
            for relay in fleet.relays:
                status, text = await relay.get("/metrics")
                assert status == 200
                linted = await run([command("promtool"), "check", "metrics"], text.encode())
                assert (linted.status, linted.said) == (0, "")
        for relay in fleet.relays:
            assert await relay.terminate() == 0
