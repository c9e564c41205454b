"""The order of system calls: the upstream's 250 is read, the row synced to disk, the client's 250 written.

Seen by strace on a relay process, for a row that goes to the store and for one that goes to the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

MESSAGES = 3
CALLS = "read,recvfrom,recvmsg,write,writev,sendto,sendmsg,fsync,fdatasync"
_CALL = re.compile(r"(?P<pid>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)")


async def test_a_row_in_the_store(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        trace = await traced(relay)

    for number in range(1, MESSAGES + 1):
        assert f"{relay.database}-wal" in synced_between(trace, f"250 2.0.0 accepted as {number}\\r\\n")


async def test_a_row_in_the_spool(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port, records={"commit_timeout": "50ms"}) as relay:
        await relay.start()
        with contextlib.closing(sqlite3.connect(relay.database)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            trace = await traced(relay)

    for number in range(1, MESSAGES + 1):
        synced = synced_between(trace, f"250 2.0.0 accepted as {number}\\r\\n")
        assert any(path.startswith(f"{relay.spool}/") for path in synced), synced


async def test_a_relay_that_answers_before_it_has_recorded_is_found_out(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port, module="tests.support.early_answer") as relay:
        await relay.start()
        trace = await traced(relay)

    assert synced_between(trace, "250 2.0.0 accepted as 1\\r\\n") == []


async def traced(relay: RelayProcess) -> list[str]:
    """Send messages, one at a time, and return what strace saw meanwhile."""
    async with strace(relay) as file, Client(relay.port) as client:
        await client.ehlo()
        for _ in range(MESSAGES):
            replies = await client.message("a@example.test", ["b@example.test"], b"From: a@b.test\r\n\r\n")
            assert replies[-1].code == 250
    return file.read_text().splitlines()


def synced_between(trace: list[str], reply: str) -> list[str]:
    """Return the files that were synced, from begin to end, after `reply` was read, before it was written."""
    begun: dict[str, str] = {}
    synced: list[str] = []
    was_read = False
    for line in trace:
        match = _CALL.match(line)
        if match is None:
            continue
        name, rest = match["name"] or match["resumed"], match["rest"]
        if name in ("read", "recvfrom", "recvmsg"):
            was_read = was_read or reply in rest
        elif name in ("fsync", "fdatasync"):
            if match["name"]:
                begun.pop(match["pid"], None)
                if was_read:
                    begun[match["pid"]] = rest.partition("<")[2].partition(">")[0]
            if rest.endswith("= 0") and match["pid"] in begun:
                synced.append(begun.pop(match["pid"]))
        elif reply in rest:
            assert was_read, f"{reply} was written before it was read: {trace}"
            return synced
    raise AssertionError(f"{reply} was never written: {trace}")


@contextlib.asynccontextmanager
async def strace(relay: RelayProcess) -> AsyncIterator[Path]:
    """Trace the relay's threads into a file, from when strace has attached to when it has let go."""
    file = relay.directory / "trace"
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-y", "-s", "200", "-e", f"trace={CALLS}", "-o", str(file), "-p", str(relay.pid)),
        stderr=asyncio.subprocess.PIPE,
    )
    assert tracer.stderr is not None
    try:
        said = (await tracer.stderr.readline()).decode()
        if "attached" not in said:
            pytest.skip(f"strace cannot trace a process here: {said.strip()}")
        yield file
    finally:
        with contextlib.suppress(ProcessLookupError):
            tracer.terminate()
        await tracer.communicate()
