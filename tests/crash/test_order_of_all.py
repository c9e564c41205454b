"""The order of system calls for every message of a run: verdict read, row synced to disk, client answered.

Many clients at once on connections that are kept open, so that rows share commits and threads interleave;
`test_order.py` has the same for one message at a time. Each message's verdict is told by a number in it,
which is also in its row: the page of the write-ahead log, or the line of the spool, is seen as it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from itertools import count
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.connection import Connection
from tests.support.process import RelayProcess
from tests.support.trace import Call, calls, disorder, traced
from tests.support.upstream import ScriptedUpstream

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

CLIENTS = 20
EACH = 20


def needle(number: int) -> str:
    return f"accepted as no. {number:05};"


async def test_rows_in_the_store(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        found = await run(relay, upstream)

    assert disorders(found, relay) == {}
    commits = [call for call in found if call.name == "fdatasync" and call.file == f"{relay.database}-wal"]
    print(f"{CLIENTS * EACH} messages, {len(commits)} syncs of the log")
    assert 0 < len(commits) < CLIENTS * EACH, "no two rows shared a commit: that case was not seen"


async def test_rows_in_the_spool(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port, records={"commit_timeout": "50ms"}) as relay:
        await relay.start()
        with contextlib.closing(sqlite3.connect(relay.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            found = await run(relay, upstream)

    assert disorders(found, relay) == {}
    assert not [call for call in found if call.file == f"{relay.database}-wal" and "no. 0" in call.text]


async def test_a_relay_that_answers_before_it_has_recorded_is_found_out(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port, module="tests.support.early_answer") as relay:
        await relay.start()
        found = await run(relay, upstream)

    wrong = disorders(found, relay)
    assert len(wrong) == CLIENTS * EACH, "some were in order by chance: the proof would not be one"
    assert set(wrong.values()) == {"the client was answered before the row was written"}


async def run(relay: RelayProcess, upstream: ScriptedUpstream) -> list[Call]:
    """Have all clients send at once, and return what strace saw meanwhile."""
    numbers = count(1)

    def accepted(stage: str, line: bytes, connection: Connection) -> bytes:
        return b"250 2.0.0 %s\r\n" % needle(next(numbers)).encode()

    upstream.script = {"end_of_data": accepted}
    async with traced(relay) as file:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(send(relay, number))
        assert next(numbers) == CLIENTS * EACH + 1
    with file.open(encoding="ascii", errors="backslashreplace") as lines:
        return calls(line.rstrip("\n") for line in lines)


async def send(relay: RelayProcess, number: int) -> None:
    async with Client(relay.port, deadline_s=60.0) as client:
        await client.ehlo()
        for _ in range(EACH):
            content = b"From: a@client.test\r\n\r\nText\r\n"
            replies = await client.message(f"{number}@client.test", ["b@far.test"], content)
            assert replies[-1].code == 250, replies
        await client.quit()  # so that strace has seen the end of the call before


def disorders(found: list[Call], relay: RelayProcess) -> dict[int, str]:
    """Return what is wrong, by the message's number."""
    of: dict[int, str] = {}
    for number in range(1, CLIENTS * EACH + 1):
        wrong = disorder(found, needle(number), relay.database.parent)
        if wrong is not None:
            of[number] = wrong
    return of
