"""PostgreSQL is away when a relay starts, and then there with a mistake: rows wait, and come in order."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import postgres
from tests.support.client import Client
from tests.support.databases import Cluster, PostgresDatabase
from tests.support.process import ROOT, RelayProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.upstream import ScriptedUpstream

BOUND_S = 40.0
LIMIT = {"SCOPE": "sender", "MAX": "100", "PER": "1h"}
RULES = "host all keeper 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"


@pytest.fixture
def own_database() -> Iterator[PostgresDatabase]:
    """An empty database on a server that a test may stop and configure."""
    programs = postgres.directory_of(postgres.NEWEST)
    assert programs is not None
    with postgres.Server(programs) as server:
        cluster = Cluster(server)
        yield cluster.database(empty=True)
        cluster.close()


async def send(client: Client, number: int) -> None:
    replies = await client.message(f"{number}@example.com", ["b@example.test"], b"Subject: x\r\n\r\nx\r\n")
    assert replies[-1].code == 250


def waiting(relay: RelayProcess) -> list[dict[str, Any]]:
    """Return what `relay spool list` says of the rows that wait."""
    command = [sys.executable, "-m", "relay", "spool", "list", "--rows", "--format", "json"]
    done = subprocess.run(
        [*command, "--config", str(relay.config)], cwd=ROOT, capture_output=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


async def ready_says(relay: RelayProcess, text: str) -> None:
    """Return once the relay is ready, and says this of its records."""
    async with asyncio.timeout(BOUND_S):
        while True:
            status, said = await relay.get("/readyz")
            assert status == 200, said
            if text in said:
                return
            await asyncio.sleep(0.02)


async def test_away_at_the_start_and_then_a_wrong_password(
    tmp_path: Path, upstream: ScriptedUpstream, own_database: PostgresDatabase
) -> None:
    server = own_database.server
    server.sql("ALTER ROLE relay PASSWORD 'another'")
    server.sql("CREATE ROLE keeper LOGIN SUPERUSER")
    (server.data / "pg_hba.conf").write_text(RULES)
    password = tmp_path / "password"
    password.write_text("sesame\n")
    password.chmod(0o600)
    await asyncio.to_thread(server.stop)
    records = {"url": own_database.url, "password_file": str(password), "commit_timeout": "1s"}
    async with RelayProcess(tmp_path, upstream.port, records=records) as relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.greeting()
            await client.ehlo()
            for number in range(3):
                await send(client, number)
            await ready_says(relay, "cannot be reached")

            await asyncio.to_thread(server.start)
            await ready_says(relay, "password authentication failed")
            await ready_says(relay, "change records.password_file")
            for number in range(3, 6):
                await send(client, number)
            assert await relay.metric("records_spooled") == 6

            await asyncio.to_thread(server.sql, "ALTER ROLE relay PASSWORD 'sesame'", user="keeper")
            await relay.until("records_spooled", 0, timeout_s=BOUND_S)
            await send(client, 6)
        assert await relay.terminate() == 0
        said = relay.log_file.read_text()
    assert "rows go to the spool" in said
    assert "sesame" not in said
    rows = server.sql("SELECT sender FROM task_done ORDER BY id", own_database.name, user="keeper")
    assert rows == [[f"{number}@example.com"] for number in range(7)]


@pytest.mark.timeout(120)
async def test_a_server_that_does_not_answer_holds_no_stop_up(
    tmp_path: Path, upstream: ScriptedUpstream, own_database: PostgresDatabase
) -> None:
    """Much would be said there at the end: that the relay is gone, and what it has kept others from."""
    relay = RelayProcess(tmp_path, upstream.port, records={"url": own_database.url, "commit_timeout": "1s"})
    relay.environment = {f"RELAY__LIMITS__0__{key}": value for key, value in LIMIT.items()}
    async with relay:
        await relay.start()
        async with Client(relay.port) as client:
            await client.greeting()
            await client.ehlo()
            await send(client, 1)
            with own_database.server.frozen():
                await send(client, 2)
                assert await relay.terminate() == 0
        assert [row["kind"] for row in waiting(relay)] == ["record"]


async def test_a_home_that_is_not_its_own_is_no_server_that_is_away(tmp_path: Path) -> None:
    """As under a supervisor that changes the user and not HOME: libpq's files are looked for in there."""
    home = tmp_path / "home"
    (home / ".postgresql").mkdir(parents=True)
    home.chmod(0o000)
    records = {"url": "postgresql://relay:sesame@127.0.0.1:1/relay"}
    relay = RelayProcess(tmp_path, 25, module="tests.support.without_rights", records=records)
    relay.environment = {"HOME": str(home)}
    try:
        async with relay:
            await relay.spawn()
            assert await relay.ended() == 1
            said = relay.errors()
    finally:
        home.chmod(0o700)
    assert f"{home}/.postgresql/postgresql.key cannot be read: Permission denied; set HOME" in said
    assert "sesame" not in said
