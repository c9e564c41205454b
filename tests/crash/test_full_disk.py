"""Disks that are really full, while applications send: the store's, the spool's, or one for both.

A small file system is mounted, and somebody writes it full and takes at once what is given free. Whatever is
full, no message that the upstream has accepted is answered with an error or left without a row, and no row is
in the log alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.storm import Storm
from tests.support.upstream import ScriptedUpstream

PATIENCE_S = 60.0


@contextlib.contextmanager
def small_disk(path: Path, size: str = "48m") -> Iterator[None]:
    """Mount a file system of `size` at `path`: room for all rows of a test, twice."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    path.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=False)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


class Hog:
    """Writes a disk full, and keeps it so until `stop`."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / "hog"
        self._over = threading.Event()
        self.full = threading.Event()
        self._thread = threading.Thread(target=self._eat)
        self._thread.start()

    def _eat(self) -> None:
        block = 1 << 20
        with self._file.open("wb", buffering=0) as file:
            while not self._over.is_set():
                try:
                    file.write(bytes(block))
                except OSError:  # no space left for so much
                    if block > 4096:
                        block = 4096
                        continue
                    self.full.set()
                    self._over.wait(0.002)

    def stop(self) -> None:
        """Give all the space back."""
        self._over.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def full(disk: Path) -> AsyncIterator[None]:
    """The disk is full as long as this lasts."""
    hog = Hog(disk)
    try:
        await asyncio.to_thread(hog.full.wait)
        yield
    finally:
        await asyncio.to_thread(hog.stop)


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """The store is away as long as this lasts."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None, timeout=PATIENCE_S)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def ready(relay: RelayProcess, status: int, reason: str = "") -> None:
    """Wait until /readyz has this status, and says the reason."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found, text = await relay.get("/readyz")
            if found == status and reason in text:
                return
            await asyncio.sleep(0.02)


async def more(applications: Storm, count: int) -> None:
    """Wait until so many more messages have been told 2yz."""
    wanted = applications.told_yes + count
    async with asyncio.timeout(PATIENCE_S):
        while applications.told_yes < wanted:
            await asyncio.sleep(0.02)


async def refused_at_mail(relay: RelayProcess) -> None:
    """Wait until new mail is told 451 4.3.0 at MAIL; messages that end make a little room first."""
    async with Client(relay.port) as client, asyncio.timeout(PATIENCE_S):
        await client.ehlo()
        while (reply := await client.command("MAIL FROM:<late@example.test>")).code == 250:
            await client.command("RSET", 250)
        assert str(reply).startswith("451 4.3.0 The relay cannot keep its records now")


async def settled(relay: RelayProcess, applications: Storm) -> None:
    """Compare the accounts when all is over."""
    await relay.until("records_spooled", 0, timeout_s=PATIENCE_S)
    assert await relay.metric("record_errors_total") == 0
    log = relay.log()
    assert await relay.terminate() == 0
    findings, figures = await applications.settle(killed=False)
    print(f"\n{figures}")
    assert findings == []
    assert figures.rows == figures.accepted == figures.told_yes
    assert not [line for line in log if line["event"] in ("row lost", "unforeseen")]
    assert relay.errors() == ""
    assert {path.name for path in relay.spool.iterdir()} <= {"lock", "journal", "relay_id"}


@pytest.mark.timeout(4 * PATIENCE_S)
async def test_store_and_spool_on_a_full_disk(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Rows fill the reserve, then new mail is refused, and when there is room again all of it is over."""
    relay = RelayProcess(tmp_path, upstream.port)
    with small_disk(tmp_path / "data"):
        async with relay:
            await relay.start()
            async with Storm(relay, upstream) as applications:
                await more(applications, 50)
                async with full(tmp_path / "data"):
                    await ready(relay, 503, "records cannot be kept: no disk space to take ahead: spool ")
                    await refused_at_mail(relay)
                    assert await relay.metric("records_spooled") > 0
                await ready(relay, 200)
                await more(applications, 50)
            await settled(relay, applications)


@pytest.mark.timeout(4 * PATIENCE_S)
async def test_only_the_disk_of_the_spool_is_full(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """With the store at work that costs nothing; with the store away the reserve holds what is accepted."""
    relay = RelayProcess(tmp_path, upstream.port, records={"commit_timeout": "100ms"})
    with small_disk(tmp_path / "data" / "spool"):
        async with relay:
            await relay.start()
            async with Storm(relay, upstream) as applications:
                async with full(relay.spool):
                    await more(applications, 100)
                    assert (await relay.get("/readyz"))[0] == 200
                    with locked(relay.database):
                        await ready(relay, 503)
                        await refused_at_mail(relay)
                    await ready(relay, 200)
                    await more(applications, 100)
                await more(applications, 50)
            await settled(relay, applications)


@pytest.mark.timeout(4 * PATIENCE_S)
async def test_only_the_disk_of_the_store_is_full(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Rows wait in the spool, mail flows, nobody is refused."""
    spool = tmp_path / "spool"
    relay = RelayProcess(tmp_path, upstream.port, records={"spool": str(spool)})
    relay.spool = spool
    with small_disk(tmp_path / "data"):
        async with relay:
            await relay.start()
            async with Storm(relay, upstream) as applications:
                await more(applications, 50)
                async with full(tmp_path / "data"):
                    async with asyncio.timeout(PATIENCE_S):
                        while await relay.metric("records_spooled") == 0:
                            await more(applications, 20)
                    await more(applications, 100)
                    assert (await relay.get("/readyz"))[0] == 200
            await settled(relay, applications)
            assert all(code == 250 for code in applications.told.values())


async def test_a_relay_that_starts_on_a_full_disk_refuses_mail_until_there_is_room(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    relay = RelayProcess(tmp_path, upstream.port)
    with small_disk(tmp_path / "data" / "spool"):
        async with relay:
            async with full(relay.spool):
                await relay.start()
                assert (await relay.get("/readyz"))[0] == 503
                await refused_at_mail(relay)
                assert await relay.metric("records_reserve_bytes") == 0
            await ready(relay, 200)
            assert await relay.metric("records_reserve_bytes") == 1 << 20
            async with Client(relay.port) as client:
                await client.ehlo()
                replies = await client.message(
                    "a@example.test", ["b@example.test"], b"Subject: x\r\n\r\nx\r\n"
                )
                assert replies[-1].code == 250
            assert len(relay.rows("SELECT task_id FROM task_done")) == 1
            assert await relay.terminate() == 0
