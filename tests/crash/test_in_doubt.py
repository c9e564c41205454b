"""SIGKILL between an end of data and its outcome: the next start knows which messages were under way.

After each kill, what the upstream has accepted is in `task_done` or in `task_in_doubt`, nothing in both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.process import ROOT, RelayProcess
from tests.support.storm import Storm, moody
from tests.support.upstream import Delay, ScriptedUpstream

CONTENT = b"From: a@example.test\r\nX-Task-ID: %d\r\n\r\ntext\r\n"
KILLS = max(3, int(os.environ.get("CRASH_KILLS", "30")) // 3)


def doubts(relay: RelayProcess) -> list[dict[str, Any]]:
    return relay.rows("SELECT * FROM task_in_doubt ORDER BY id")


async def listed(relay: RelayProcess) -> list[dict[str, Any]]:
    """What `relay sends --in-doubt` shows, while the relay runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "sends", "--in-doubt", "--format", "json"),
        *("--config", str(relay.config)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    return [json.loads(line) for line in out.splitlines()]


async def until_read_back(relay: RelayProcess) -> None:
    """Wait until what an earlier process has left is in the store."""
    await relay.until("records_spooled", 0)
    await relay.until("records_pending", 0)


async def send(relay: RelayProcess, number: int) -> list[int]:
    """Return the codes that a client hears before the relay is gone."""
    async with Client(relay.port) as client:
        await client.ehlo()
        with contextlib.suppress(ConnectionError):
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT % number)
            return [reply.code for reply in replies]
    return []


async def test_killed_before_the_verdict_there_is_exactly_one_entry(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """Killed again before the entry could be kept: still one. Everything but the verdict is known."""
    never = asyncio.Event()
    upstream.script = {"end_of_data": Delay(never)}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        clients = [asyncio.create_task(send(relay, number)) for number in range(3)]
        await upstream.wait_for(lambda: len(upstream.messages) == 3)
        await relay.kill()
        assert await asyncio.gather(*clients) == [[]] * 3

        with contextlib.closing(sqlite3.connect(relay.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            await relay.start()
            await relay.kill()
        for _ in range(3):
            await relay.start()
            await until_read_back(relay)
            entries = await listed(relay)
            assert sorted(entry["client_task_id"] for entry in entries) == ["0", "1", "2"]
            await relay.kill()
        for entry in entries:
            assert entry["reason"] == "the relay was killed before the upstream's answer came"
            assert entry["data"] == {"relay": "relay.test", "client_reply": None, "journal": True}
            assert entry["recipients"] == ["b@example.test"]
            assert (entry["sender"], entry["upstream"]) == ("a@example.test", "primary")
            assert entry["size"] == len(CONTENT % 0)
        assert relay.rows() == []
        await relay.start()
        assert [line for line in relay.log() if line["event"] == "in doubt"] == []  # all was kept before
        assert await relay.terminate() == 0
    assert relay.errors() == ""


async def test_killed_after_the_commit_there_is_no_entry(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port, module="tests.support.killed_when_durable") as relay:
        await relay.start()
        assert await send(relay, 1) == []
        assert await relay.ended() == -9
        assert [row["client_task_id"] for row in relay.rows()] == ["1"]
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        (line,) = (line for line in relay.log() if line["event"] == "in doubt")
        assert line["task_id"] == relay.rows()[0]["task_id"]
        await until_read_back(relay)
        assert await listed(relay) == []
        assert len(relay.rows()) == 1
        assert await relay.terminate() == 0


async def test_killed_with_the_row_in_the_spool_alone_there_is_no_entry_in_the_end(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    killed = RelayProcess(
        tmp_path,
        upstream.port,
        module="tests.support.killed_when_durable",
        records={"commit_timeout": "50ms"},
    )
    async with killed as relay:
        await relay.start()
        with contextlib.closing(sqlite3.connect(relay.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            assert await send(relay, 1) == []
            assert await relay.ended() == -9
        assert relay.rows() == []
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await until_read_back(relay)
        assert [row["client_task_id"] for row in relay.rows()] == ["1"]
        assert await listed(relay) == []
        assert await relay.terminate() == 0


@pytest.mark.timeout(300 + 5 * KILLS)
async def test_after_kills_what_the_upstream_has_is_recorded_or_in_doubt(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    dice = random.Random()
    upstream.script = {"end_of_data": lambda *_: moody(dice, 0.05)}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        async with Storm(relay, upstream, seed=dice.randrange(1 << 32)) as applications:
            for _ in range(KILLS):
                await applications.kill(dice.uniform(0.0, 0.3))
            await relay.start()
        await until_read_back(relay)
        assert await relay.terminate() == 0
    findings, figures = await applications.settle()
    done = {row["client_task_id"] for row in relay.rows()}
    doubtful = [entry["client_task_id"] for entry in doubts(relay)]
    print(f"\n{figures}, in doubt {len(doubtful)}")

    assert findings == []
    assert len(set(doubtful)) == len(doubtful)
    assert done & set(doubtful) == set()
    assert set(applications._accepted) <= done | set(doubtful)
    # And nothing is in doubt of which the client was told a verdict.
    assert {applications.told[key] for key in doubtful} <= {None, 451}
    assert figures.accepted == figures.rows + figures.accepted_in_doubt


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_the_journal_costs_no_system_call(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Of all that the relay's threads ask of the system for a message nothing has to do with the journal."""
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        async with Client(relay.port) as client:
            await client.ehlo()
            await client.message("a@example.test", ["b@example.test"], CONTENT % 0)
            trace = tmp_path / "trace"
            tracer = await asyncio.create_subprocess_exec(
                *("strace", "-f", "-y", "-o", str(trace), "-p", str(relay.pid)),
                stderr=asyncio.subprocess.PIPE,
            )
            assert tracer.stderr is not None
            said = (await tracer.stderr.readline()).decode()
            if "attached" not in said:
                pytest.skip(f"strace cannot trace a process here: {said.strip()}")
            for number in range(1, 21):
                await client.message("a@example.test", ["b@example.test"], CONTENT % number)
            tracer.terminate()
            await tracer.communicate()
        # It was used: the slot of the last message still has its octets, all but the header.
        slot = (relay.spool / "journal").read_bytes()[:400]
        assert slot[:8] == bytes(8)
        assert b'"20",' in slot
        assert await relay.terminate() == 0
    lines = trace.read_text().splitlines()
    calls = [match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))]
    assert calls.count("fdatasync") >= 20
    assert [line for line in lines if f"{relay.spool}/journal" in line] == []
    assert not {"msync", "mmap", "munmap", "mremap", "fallocate", "ftruncate"} & set(calls)
    print({name: round(calls.count(name) / 20, 2) for name in sorted(set(calls))})
