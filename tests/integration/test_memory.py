"""Memory and descriptors of a relay process: neither large messages nor idle sessions cost much."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from relay.records.bound import MAX_VERDICT
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import CHUNKING, ScriptedUpstream, StopReading

MIB = 1 << 20
LARGE = 50 * MIB
"""The default of `server.max_message_size`, and the SIZE that the upstream offers."""
GROWTH = 8 * MIB
SESSIONS = 1000
SESSION = 20 * 1024
IN_A_BODY = 100
REFUSED = 100
HALTED = 96 * 1024
"""Octets of a session in a body, with its connection to the upstream: a block, and what the two cost idle."""
PATIENCE_S = 120.0

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """An upstream that keeps digests only, so that the test itself stays small."""
    async with ScriptedUpstream(keep_content=False) as server:
        yield server


@pytest.fixture(scope="module")
def large() -> bytes:
    """A message of exactly LARGE octets, dots at line starts among them."""
    head = b"From: a@example.test\r\nX-Task-ID: large\r\n\r\n"
    line = b"." + b"x" * 75 + b"\r\n"
    lines, rest = divmod(LARGE - len(head), len(line))
    return head + line * (lines - 1) + b"y" * (len(line) + rest - 2) + b"\r\n"


async def test_a_message_of_50_mib_costs_no_memory_of_its_size(
    tmp_path: Path, upstream: ScriptedUpstream, large: bytes
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        await send(relay, b"From: a@example.test\r\n\r\nwarms up\r\n")
        relay.forget_peak()
        before = relay.memory("VmHWM")

        await send(relay, large)

        growth = relay.memory("VmHWM") - before
        print(f"\n50 MiB: peak {before / MIB:.1f} MiB + {growth / MIB:.2f} MiB")
        assert [row["size"] for row in relay.rows()][1:] == [LARGE]
        assert growth <= GROWTH


async def test_as_much_in_one_chunk_and_in_many_costs_no_more(
    tmp_path: Path, upstream: ScriptedUpstream, large: bytes
) -> None:
    upstream.extensions += CHUNKING
    many = [large[at : at + 100_000] for at in range(0, LARGE, 100_000)]
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        await send(relay, b"From: a@example.test\r\n\r\nwarms up\r\n")
        relay.forget_peak()
        before = relay.memory("VmHWM")
        for chunks in ([large], many):
            async with Client(relay.port, deadline_s=PATIENCE_S) as client:
                await client.ehlo()
                replies = await client.chunks("a@example.test", ["b@example.test"], chunks)
                assert {reply.code for reply in replies} == {250}
                await client.quit()

        growth = relay.memory("VmHWM") - before
        print(f"\n50 MiB by BDAT: peak {before / MIB:.1f} MiB + {growth / MIB:.2f} MiB")
        assert [row["size"] for row in relay.rows()][1:] == [LARGE] * 2
        digest = hashlib.sha256(large).hexdigest()
        assert [message.sha256 for message in upstream.messages[1:]] == [digest] * 2
        assert growth <= GROWTH


async def test_four_such_messages_to_an_upstream_that_reads_slowly(
    tmp_path: Path, upstream: ScriptedUpstream, large: bytes
) -> None:
    upstream.script = {"body": StopReading()}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        relay.forget_peak()
        before = relay.memory("VmHWM")
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(send(relay, large))
            await upstream.wait_for(lambda: sum(m.mail != b"" for m in upstream.incomplete) == 4, PATIENCE_S)
            await at_rest(relay)
            halted = relay.memory("VmHWM") - before
            reading = group.create_task(reads_by_fits_and_starts(upstream))
            await upstream.wait_for(lambda: len(upstream.accepted) == 4, PATIENCE_S)
            reading.cancel()

        growth = relay.memory("VmHWM") - before
        print(
            f"\n4 x 50 MiB, slow upstream: {halted / MIB:.2f} MiB while halted, {growth / MIB:.2f} MiB in all"
        )
        assert [row["size"] for row in relay.rows()] == [LARGE] * 4
        assert growth <= GROWTH


async def test_many_in_a_body_that_the_upstream_does_not_take(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    """What a client sends ahead waits with the kernel; the event loop alone would read 256 KiB at a time."""
    many = {"max_connections": IN_A_BODY}
    server = {"max_connections_per_client": IN_A_BODY}
    async with RelayProcess(tmp_path, upstream.port, server=server, upstream=many) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        await send(relay, b"From: a@example.test\r\n\r\nwarms up\r\n")
        before = relay.memory()
        upstream.script = {"body": StopReading()}
        sending = [asyncio.create_task(send_without_end(relay)) for _ in range(IN_A_BODY)]
        await upstream.wait_for(
            lambda: sum(m.mail != b"" for m in upstream.incomplete) == IN_A_BODY, PATIENCE_S
        )
        await at_rest(relay)
        each = (relay.memory() - before) / IN_A_BODY
        for task in sending:
            task.cancel()
        await asyncio.wait(sending)
        await relay.kill()

    print(f"\n{IN_A_BODY} sessions in a body: {each / 1024:.1f} KiB each")
    assert each < HALTED


async def test_what_is_said_of_many_refused_recipients(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """The client hears it all; row and log line hold the beginning, as of a verdict."""
    long = b"550-%b\r\n" % (b"x" * 1000) * 60 + b"550 end\r\n"
    upstream.script = {"RCPT": {"no": long}}
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        await send(relay, b"From: a@example.test\r\n\r\nwarms up\r\n")
        relay.forget_peak()
        before = relay.memory("VmHWM")
        async with Client(relay.port, deadline_s=PATIENCE_S) as client:
            await client.ehlo()
            to = [f"no{number}@example.test" for number in range(REFUSED)]
            replies = await client.message("a@example.test", [*to, "b@example.test"], b"\r\n")
            assert [reply.code for reply in replies] == [250, *[550] * REFUSED, 250, 354, 250]
            assert {len(reply.lines) for reply in replies[1:-3]} == {61}
            await client.quit()

        growth = relay.memory("VmHWM") - before
        print(f"\n{REFUSED} refused recipients: peak + {growth / MIB:.1f} MiB")
        refused = json.loads(relay.rows()[1]["data"])["refused"]
        assert [each["recipient"] for each in refused] == to
        (said,) = {each["reply"] for each in refused}
        assert len(said) <= MAX_VERDICT
        assert said.endswith("x ...")
        assert growth <= REFUSED * len(long) / 2


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for as many sockets on this side, and, inherited, on the relay's."""
    needed = 2 * SESSIONS + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"a process may have {hard} descriptors here, {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
async def test_a_thousand_idle_sessions(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    server = {"max_connections": SESSIONS + 10, "max_connections_per_client": SESSIONS + 10}
    async with RelayProcess(tmp_path, upstream.port, server=server) as relay:
        await relay.start()
        await relay.get("/healthz")  # all that a start loads is loaded
        await send(relay, b"From: a@example.test\r\n\r\nwarms up\r\n")
        await relay.until("client_sessions", 0)
        descriptors, before = relay.descriptors(), relay.memory()

        async with contextlib.AsyncExitStack() as sessions:
            for _ in range(SESSIONS):
                await (await sessions.enter_async_context(Client(relay.port))).ehlo()
            each = (relay.memory() - before) / SESSIONS
            assert relay.descriptors() >= SESSIONS
            await send(relay, b"From: a@example.test\r\n\r\npasses meanwhile\r\n")

        await relay.until("client_sessions", 0)
        print(f"\n{SESSIONS} idle sessions: {each / 1024:.2f} KiB each")
        assert each < SESSION
        while relay.descriptors() > descriptors:  # closing takes its moment; the time limit is pytest's
            await asyncio.sleep(0.02)
        assert len(relay.rows()) == 2


async def send(relay: RelayProcess, content: bytes) -> None:
    """Send one message and be told 250."""
    client = Client(relay.port, deadline_s=PATIENCE_S)
    async with client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], content)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        await client.quit()


async def send_without_end(relay: RelayProcess) -> None:
    """Send a message that goes on as long as the relay takes it."""
    async with Client(relay.port, deadline_s=PATIENCE_S) as client:
        await client.ehlo()
        for line in (b"MAIL FROM:<a@example.test>", b"RCPT TO:<b@example.test>", b"DATA"):
            await client.command(line)
        await client.send(b"From: a@example.test\r\n\r\n")
        while True:
            await client.send((b"x" * 76 + b"\r\n") * 1000)


async def at_rest(relay: RelayProcess) -> None:
    """Return once the relay's peak has not moved for a while: it takes no more, it waits for the upstream."""
    looks = [relay.memory("VmHWM")]
    while looks[-10:] != looks[-1:] * 10:
        await asyncio.sleep(0.05)
        looks.append(relay.memory("VmHWM"))


async def reads_by_fits_and_starts(upstream: ScriptedUpstream) -> None:
    """Let the upstream read for a moment and halt it again, over and over."""
    while True:
        for connection in upstream.open_connections:
            connection.wire.resume()
        await asyncio.sleep(0.02)
        for connection in upstream.open_connections:
            if connection.message is not None:
                connection.wire.pause()
        await asyncio.sleep(0.02)
