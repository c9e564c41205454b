"""SIGKILL while messages flow: what clients were told, what the upstream has and the rows agree afterwards.

`CRASH_KILLS=400 pytest -s tests/crash/test_kill.py` runs several hundred kills and prints the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.process import RelayProcess
from tests.support.storm import Figures, Storm, moody
from tests.support.upstream import CHUNKING, ScriptedUpstream

KILLS = int(os.environ.get("CRASH_KILLS", "30"))
"""In all tests of this module together."""


async def storm(
    relay: RelayProcess, upstream: ScriptedUpstream, kills: int, dice: random.Random
) -> tuple[list[str], Figures]:
    """Kill the relay `kills` times while applications send, then let it end in order; return the findings."""
    upstream.extensions += CHUNKING
    upstream.script = {"RCPT": lambda *_: moody(dice, 0.02), "end_of_data": lambda *_: moody(dice, 0.1)}
    async with Storm(relay, upstream, seed=dice.randrange(1 << 32)) as applications:
        for _ in range(kills):
            if dice.random() < 0.15:
                await applications.kill(dice.uniform(0.0, 1.0), starting=True)
            else:
                await applications.kill(dice.uniform(0.0, 0.3))
        await relay.start()
    await relay.until("records_spooled", 0)
    assert await relay.terminate() == 0
    findings, figures = await applications.settle()
    print(f"\n{figures}")
    assert relay.errors() == ""
    assert figures.told_yes == figures.messages >= kills
    return findings, figures


@pytest.mark.timeout(300 + 5 * KILLS)
async def test_after_kills_every_yes_has_its_row_and_every_row_its_acceptance(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        findings, figures = await storm(relay, upstream, KILLS - KILLS // 3, random.Random())

    assert findings == []
    assert figures.rows >= figures.told_yes


@pytest.mark.timeout(300 + 5 * KILLS)
async def test_after_kills_with_a_store_that_is_often_locked_the_spool_has_kept_the_rest(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    dice = random.Random()
    relay = RelayProcess(tmp_path, upstream.port, records={"commit_timeout": "20ms"})

    async with relay, _locked_now_and_then(relay, dice):
        findings, figures = await storm(relay, upstream, KILLS // 3, dice)

    assert findings == []
    assert figures.spooled > 0
    assert not (relay.spool / "corrupt.jsonl").exists()
    assert not (relay.spool / "rejected.jsonl").exists()


async def test_a_relay_that_answers_before_it_has_recorded_is_found_out(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    relay = RelayProcess(tmp_path, upstream.port, module="tests.support.early_answer")
    async with relay:
        async with Storm(relay, upstream) as applications:
            await relay.start()
            await upstream.wait_for(lambda: applications.told_yes > 0, 30.0)
            await relay.kill()
            await applications.take_account()
            await relay.start()
        assert await relay.terminate() == 0

    findings, _ = await applications.settle()

    assert any(finding.endswith("the client was told 250, and there is no row") for finding in findings)


@contextlib.asynccontextmanager
async def _locked_now_and_then(relay: RelayProcess, dice: random.Random) -> AsyncIterator[None]:
    """Keep the database locked for moments longer than the relay waits for it."""
    task = asyncio.create_task(_lock_now_and_then(relay, dice))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _lock_now_and_then(relay: RelayProcess, dice: random.Random) -> None:
    while True:
        await asyncio.sleep(dice.uniform(0.02, 0.1))
        if not relay.database.exists():
            continue
        with contextlib.closing(sqlite3.connect(relay.database, timeout=0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:  # the relay is writing; or has not made the file's schema yet
                continue
            await asyncio.sleep(dice.uniform(0.05, 0.15))
