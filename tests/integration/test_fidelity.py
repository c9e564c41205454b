"""Any message, cut in any way: the upstream gets what the client sent, and one message for each one sent.

`FIDELITY_EXAMPLES=5000 pytest tests/integration/test_fidelity.py` tries more than the default.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.client import Client, Reply, bdat
from tests.support.content import stuff
from tests.support.upstream import CHUNKING, Command, Message, ScriptedUpstream

EXAMPLES = int(os.environ.get("FIDELITY_EXAMPLES", "100"))
"""For each test."""
COMMANDS = b"MAIL FROM:<a@example.test>\r\nRCPT TO:<b@example.test>\r\nDATA\r\n"
END = b"\r\n.\r\n"
MAX_PIECES = 100
STRAY = re.compile(rb"\r(?!\n)|(?<!\r)\n")

pytestmark = pytest.mark.timeout(60 + EXAMPLES)

# The relay and its upstream live as long as the test function; what an example leaves is cleared by `Path`.
given_often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Lines that have meant something to somebody, among any octets that a line may hold.
KNOWN_LINES = (
    *(b"", b".", b"..", b". ", b".x", b" ", b"\t", b"From x", b"QUIT", b"X-Task-ID: 1", b"Message-ID: <1@x>"),
    *(b"\x0b\x0c\x1c\x1d\x1e", b"\x85", b"\xe2\x80\xa8", b"\xff\xfe", b"x" * 1500, b"." * 1500),
)
LINES = st.sampled_from(KNOWN_LINES) | st.binary(max_size=60).map(
    lambda octets: octets.translate(None, b"\0\r\n")
)
MESSAGES = st.lists(LINES, max_size=12).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
UNTIDY = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"x", b" ", b"\n.\n", b"\r.\r", b"\xe9"]) | LINES,
    max_size=20,
).map(lambda parts: b"".join(parts) + b"\r\n")
TRICKS = (
    *(b"\r", b"\n", b"\r\n", b".", b"x", b"\0", b"\n.\n", b"\r.\r", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r"),
    *(b"\r.\r\n", b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\r\n", COMMANDS, b"RSET\r\n", b"QUIT\r\n"),
    *(COMMANDS.replace(b"\r\n", b"\n"), b"MAIL FROM:<evil@example.test>\r\n"),
)
HOSTILE = st.lists(st.sampled_from(TRICKS), max_size=20).map(b"".join)
CUTS = st.lists(st.integers(1, 60) | st.sampled_from([1, 2, 3, 4096]), min_size=1, max_size=10)


class Way:
    """The way from a client, on one connection that stays open over examples, to the upstream."""

    def __init__(self, running: Any, upstream: ScriptedUpstream) -> None:
        self.running = running
        self.upstream = upstream
        self._client: Client | None = None

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """Give the client, past its EHLO; after a failure the next example gets a new one."""
        self.upstream.messages.clear()
        self.upstream.log.clear()
        client, self._client = self._client, None
        if client is None:
            client = await Client.connect(self.running.port)
            await client.ehlo()
        try:
            yield client
            await client.command(b"NOOP", 250)  # client and relay are still in step
        except BaseException:
            await client.__aexit__()
            raise
        self._client = client

    async def close(self) -> None:
        """Leave."""
        if self._client is not None:
            await self._client.__aexit__()

    def messages(self) -> list[Message]:
        """What the upstream got, after a look at what it was asked."""
        assert self.upstream.violations == []
        mails = [seen for seen in self.upstream.log if isinstance(seen, Command) and seen.verb == "MAIL"]
        assert [mail.line for mail in mails] == [COMMANDS.split(b"\r\n")[0]] * len(mails)
        for message in self.upstream.messages:
            assert STRAY.search(message.wire) is None
            assert message.recipients == [b"<b@example.test>"]
        assert len(self.upstream.messages) <= len(mails)
        return self.upstream.messages


@pytest.fixture
async def way(start: Any, upstream: ScriptedUpstream) -> AsyncIterator[Way]:
    async with start(upstream.port) as running:
        way = Way(running, upstream)
        yield way
        await way.close()


@pytest.fixture
async def strict_way(start: Any, upstream: ScriptedUpstream) -> AsyncIterator[Way]:
    """The same through a relay that refuses stray newlines."""
    async with start(upstream.port, server={"bare_newlines": "refuse"}) as running:
        way = Way(running, upstream)
        yield way
        await way.close()


@given_often
@given(contents=st.lists(MESSAGES, min_size=1, max_size=3), cuts=CUTS, pipelined=st.booleans())
async def test_the_upstream_gets_what_the_client_sent(
    way: Way, contents: list[bytes], cuts: list[int], pipelined: bool
) -> None:
    async with way.client() as client:
        verdicts = await send(client, [stuff(content) for content in contents], cuts, pipelined=pipelined)

    assert [verdict.code for verdict in verdicts] == [250] * len(contents)
    assert [message.content for message in way.messages()] == contents
    rows = way.running.rows(f"SELECT size FROM task_done ORDER BY id DESC LIMIT {len(contents)}")
    assert [row["size"] for row in reversed(rows)] == [len(content) for content in contents]


@given_often
@given(contents=st.lists(UNTIDY, min_size=1, max_size=3), cuts=CUTS, pipelined=st.booleans())
async def test_stray_newlines_are_mended_and_nothing_else(
    way: Way, contents: list[bytes], cuts: list[int], pipelined: bool
) -> None:
    async with way.client() as client:
        verdicts = await send(client, [stuff(content) for content in contents], cuts, pipelined=pipelined)

    assert [verdict.code for verdict in verdicts] == [250] * len(contents)
    assert [message.content for message in way.messages()] == [mended(content) for content in contents]


@given_often
@given(contents=st.lists(UNTIDY, min_size=1, max_size=3), cuts=CUTS, pipelined=st.booleans())
async def test_stray_newlines_are_refused_and_nothing_else(
    strict_way: Way, contents: list[bytes], cuts: list[int], pipelined: bool
) -> None:
    async with strict_way.client() as client:
        verdicts = await send(client, [stuff(content) for content in contents], cuts, pipelined=pipelined)

    tidy = [content for content in contents if STRAY.search(content) is None]
    assert [verdict.code for verdict in verdicts] == [250 if each in tidy else 550 for each in contents]
    assert [message.content for message in strict_way.messages()] == tidy


@given_often
@given(wire=HOSTILE, cuts=CUTS)
async def test_no_octets_make_two_messages_of_one(way: Way, wire: bytes, cuts: list[int]) -> None:
    assume((b"\r\n" + wire + END).index(END) == len(wire) + 2)  # the true end of data is at its end

    async with way.client() as client:
        (verdict,) = await send(client, [wire + b"\r\n"], cuts, pipelined=False)

    messages = way.messages()
    if b"\0" in wire:
        assert str(verdict).startswith("550 5.6.0 ")
        assert messages == []
    else:
        assert verdict.code == 250
        assert len(messages) == 1


@pytest.fixture(params=["pipelining", "one by one"])
async def chunk_way(
    request: pytest.FixtureRequest, start: Any, upstream: ScriptedUpstream
) -> AsyncIterator[Way]:
    """The same to an upstream with CHUNKING."""
    upstream.extensions += CHUNKING
    if request.param != "pipelining":
        upstream.extensions.remove("PIPELINING")
    async with start(upstream.port) as running:
        way = Way(running, upstream)
        yield way
        await way.close()


@given_often
@given(contents=st.lists(MESSAGES | HOSTILE, min_size=1, max_size=3), borders=CUTS, cuts=CUTS)
async def test_chunks_hold_what_the_client_sent_or_are_refused(
    chunk_way: Way, contents: list[bytes], borders: list[int], cuts: list[int]
) -> None:
    """Whatever a chunk holds is content, of the one message to which it belongs."""
    chunks = [[*pieces(content, borders)] or [b""] for content in contents]
    wire = b"".join(
        COMMANDS.removesuffix(b"DATA\r\n") + b"".join(map(bdat, message[:-1])) + bdat(message[-1], last=True)
        for message in chunks
    )
    async with chunk_way.client() as client:
        for piece in pieces(wire, cuts):
            await write(client, piece)
        replies = [await client.replies(2 + len(message)) for message in chunks]

    tidy = [content for content in contents if re.search(rb"[\r\n\0]", content.replace(b"\r\n", b"")) is None]
    assert [each[-1].code for each in replies] == [250 if content in tidy else 550 for content in contents]
    assert [message.content for message in chunk_way.messages()] == tidy


async def send(
    client: Client, wires: Sequence[bytes], cuts: Sequence[int], *, pipelined: bool
) -> list[Reply]:
    """Send messages, given as the octets before the end of data; return the verdicts.

    All that a client may send without waiting is one stream, cut into writes of the lengths `cuts`, over and
    over. `pipelined`: the commands of each message follow the end of data before it (RFC 2920 3.1).
    """
    verdicts = []
    for number, wire in enumerate(wires):
        if number == 0 or not pipelined:
            for piece in pieces(COMMANDS, cuts):
                await write(client, piece)
        assert [(await client.reply()).code for _ in range(3)] == [250, 250, 354]
        more = COMMANDS if pipelined and number + 1 < len(wires) else b""
        for piece in pieces(wire + END[2:] + more, cuts):
            await write(client, piece)
        verdicts.append(await client.reply())
    return verdicts


async def write(client: Client, piece: bytes) -> None:
    """Write, and let the relay, in the same event loop, read it before there is more."""
    await client.send(piece)
    await asyncio.sleep(0)


def pieces(octets: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    """Cut into pieces of these lengths, over and over; what then is left is the last one."""
    start = 0
    for length in itertools.islice(itertools.cycle(cuts), MAX_PIECES):
        if start < len(octets):
            yield octets[start : start + length]
        start += length
    if start < len(octets):
        yield octets[start:]


def mended(content: bytes) -> bytes:
    """What `bare_newlines = "normalize"` promises: a bare CR becomes a space, a bare LF a CRLF.

    Of two dots behind a bare LF one is the client's stuffing.
    """
    content = re.sub(rb"(?<!\r)\n\.(?=\.)", b"\n", re.sub(rb"\r(?!\n)", b" ", content))
    return re.sub(rb"(?<!\r)\n", b"\r\n", content)
