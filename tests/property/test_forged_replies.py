"""An upstream that says anything, at any stage, in any pieces: the client hears one reply for each command.

The upstream is honest but at one stage, where it says what the example has: replies of any code, several at
once, parts of replies, bare CR and LF, NUL, ESC, endless lines, raw octets. Then these hold:

- the client gets one well-formed, printable reply for each command, and the session is in step afterwards;
- there is a row if and only if the client was told 2yz at the end of data, and then the upstream had really
  read the end of data and answered it, and had answered each command before it once;
- an upstream whose whole 2yz stands first behind the end of data has its row, whatever it says behind it.

FORGED_EXAMPLES (default 300) in the environment makes longer runs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay import app as app_module
from relay.reply import MAX_LINE
from relay.upstream import breaker
from tests.support.client import Client
from tests.support.watch import eventually

if TYPE_CHECKING:
    from tests.conftest import Running

EXAMPLES = int(os.environ.get("FORGED_EXAMPLES", "300"))

HONEST = {
    "greeting": b"220 upstream.test ESMTP\r\n",
    "EHLO": b"250-upstream.test\r\n250 PIPELINING\r\n",
    "MAIL": b"250 2.1.0 ok\r\n",
    "RCPT": b"250 2.1.5 ok\r\n",
    "DATA": b"354 go ahead\r\n",
    "end_of_data": b"250 2.0.0 accepted\r\n",
}
STAGES = (*HONEST, "body")
PRINTABLE = re.compile(rb"(?:([2-5]\d\d)-[\t\x20-\x7e]*\r\n(?=\1))*[2-5]\d\d [\t\x20-\x7e]*\r\n")
WHOLE = re.compile(rb"(?:([2-5]\d\d)-[^\r\n\0]*\r\n(?=\1))*([2-5]\d\d)(?: [^\r\n\0]*)?\r\n")
TURNS = 12
"""Turns of the event loop in which octets that were written on loopback have been read and acted on."""

codes = st.sampled_from(
    [
        b"250",
        b"250",
        b"354",
        b"220",
        b"251",
        b"299",
        b"421",
        b"451",
        b"550",
        b"334",
        b"199",
        b"600",
        b"25",
        b"2500",
    ]
)
texts = st.sampled_from(
    [
        b"ok",
        b"",
        b"2.0.0 ok",
        b"\x1b[31mred",
        b"nul\0",
        b"\xff\xfe",
        b"a\rb",
        b"a\nb",
        b"x" * MAX_LINE,
        b"250 ok",
    ]
)
ends = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"", b"\r\r\n", b"\0\r\n", b"\n\r\n"])
lines = st.builds(
    lambda *parts: b"".join(parts), codes, st.sampled_from([b" ", b" ", b"-", b"", b"\t"]), texts, ends
)
honest = st.sampled_from(list(HONEST.values()))
said = st.one_of(
    st.lists(st.one_of(lines, honest), max_size=4).map(b"".join),
    st.binary(max_size=40),
    st.just(b"250-x\r\n" * 12_000),
)


class Forger(asyncio.Protocol):
    """One connection to the upstream: it reads by the letter, and answers as the plan has it."""

    def __init__(self, upstream: Forging) -> None:
        self._upstream = upstream
        self._transport: asyncio.Transport
        self._input = b""
        self._in_content = False
        self.commands = 0
        """Commands of the transaction that were read, the end of data not counted."""
        self.before = b""
        """What was said in answer to them, and in the body."""
        self.verdict = b""
        """What was said once the end of data had been read."""
        self.got_end = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._upstream.connections.append(self)
        self._say("greeting")

    def connection_lost(self, error: Exception | None) -> None:
        self._upstream.open.discard(self)

    def data_received(self, data: bytes) -> None:
        self._input += data
        if self._in_content:
            self._read_content()
        while not self._in_content and b"\r\n" in self._input:
            line, _, self._input = self._input.partition(b"\r\n")
            self._read_command(line[:4].upper().decode("latin-1"))

    def _read_command(self, verb: str) -> None:
        if verb in ("MAIL", "RCPT", "DATA"):
            self.commands += 1
            octets = self._say(verb)
            if verb == "DATA" and b"354" in octets:
                self._in_content = True
                if self._upstream.stage == "body":
                    self._say("body")
                self._read_content()
        elif verb == "EHLO":
            self._say(verb)
        else:  # RSET and QUIT
            self._write(b"250 2.0.0 ok\r\n")

    def _read_content(self) -> None:
        end = (b"\r\n" + self._input).find(b"\r\n.\r\n")
        if end >= 0:
            self._input = self._input[end + 3 :]
            self._in_content = False
            self.got_end = True
            self._say("end_of_data")

    def _say(self, stage: str) -> bytes:
        octets = HONEST.get(stage, b"")
        forged = stage == self._upstream.stage and not self._upstream.used
        if forged:
            self._upstream.used = True
            octets = self._upstream.octets
        if self.got_end:
            self.verdict += octets
        elif stage not in ("greeting", "EHLO"):
            self.before += octets
        if forged:
            self._upstream.say_in_pieces(self, octets, stage)
        else:
            self._write(octets)
        return octets

    def _write(self, octets: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(octets)

    def close(self) -> None:
        self._transport.close()


class Forging:
    """The upstream of one example after the other."""

    def __init__(self) -> None:
        self.connections: list[Forger] = []
        self.open: set[Forger] = set()
        self.stage = ""
        self.octets = b""
        self.used = True
        self._pieces: list[bytes] = []
        self._saying: asyncio.Task[None] | None = None
        self._server: asyncio.Server

    async def listen(self) -> int:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _connected(self) -> Forger:
        forger = Forger(self)
        self.open.add(forger)
        return forger

    def forge(self, stage: str, pieces: list[bytes]) -> None:
        """Begin an example."""
        self.connections.clear()
        self.stage, self.octets, self.used = stage, b"".join(pieces), False
        self._pieces = pieces

    def say_in_pieces(self, forger: Forger, octets: bytes, stage: str) -> None:
        """Say it piece by piece; what cannot answer ends with the connection, not with a wait."""
        answers = WHOLE.match(octets) is not None or (stage == "body" and not octets)

        async def say() -> None:
            for piece in self._pieces:
                forger._write(piece)
                await asyncio.sleep(0)
            for _ in range(TURNS):
                await asyncio.sleep(0)
            if not answers:
                forger.close()

        self._saying = asyncio.get_running_loop().create_task(say())

    async def quiet(self) -> None:
        """Return once all has been said, and the relay has read it."""
        if self._saying is not None:
            await self._saying
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def hang_up(self) -> None:
        """End all connections, and those that come meanwhile."""
        await self.quiet()
        await eventually(self.ended)

    def ended(self) -> bool:
        """Whether no connection is open; those that are end."""
        for forger in tuple(self.open):
            forger.close()
        return not self.open

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def stage_set(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[asyncio.Runner, Forging, Running]]:
    """Run a relay and its upstream in a loop that lasts for all examples."""
    monkeypatch.setattr(app_module, "SWEEP_INTERVAL", 0.02)
    monkeypatch.setattr(breaker, "THRESHOLD", sys.maxsize)  # else most examples find the upstream down
    # What cannot answer hangs up, so nothing waits for these; a busy machine may delay all else.
    waits = dict.fromkeys(["reply_timeout", "end_of_data_timeout", "connect_timeout"], "20s")
    with asyncio.Runner() as runner:
        upstream = Forging()
        relay = start(runner.run(upstream.listen()), upstream=waits)
        running = runner.run(relay.__aenter__())
        try:
            runner.run(upstream.hang_up())
            yield runner, upstream, running
        finally:
            runner.run(relay.__aexit__(None, None, None))
            upstream.close()


@pytest.mark.timeout(120 + EXAMPLES)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # long examples are meant
def test_whatever_the_upstream_says(stage_set: tuple[asyncio.Runner, Forging, Running]) -> None:
    runner, upstream, running = stage_set

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES == 300,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        stage=st.sampled_from(STAGES),
        octets=said,
        cuts=st.lists(st.integers(0, 80), max_size=4),
        pipelined=st.booleans(),
    )
    @example(stage="DATA", octets=b"354 go\r\n250 forged\r\n", cuts=[], pipelined=False)
    @example(stage="DATA", octets=b"354 go\r\n250 forged\r\n", cuts=[8], pipelined=True)
    @example(stage="DATA", octets=b"354 go\r\n250 for", cuts=[], pipelined=False)
    @example(stage="body", octets=b"250 for", cuts=[], pipelined=True)
    @example(stage="DATA", octets=b"250 forged\r\n354 go\r\n", cuts=[], pipelined=False)
    @example(stage="RCPT", octets=b"250 ok\r\n354 go\r\n250 forged\r\n", cuts=[8, 16], pipelined=False)
    @example(stage="MAIL", octets=b"250 ok\r\n250 ok\r\n354 go\r\n250 forged\r\n", cuts=[], pipelined=True)
    @example(stage="body", octets=b"250 forged\r\n", cuts=[], pipelined=False)
    @example(stage="end_of_data", octets=b"250-a\r\n550 b\r\n", cuts=[3], pipelined=False)
    @example(stage="end_of_data", octets=b"250 ok\r\n550 no\r\n", cuts=[], pipelined=False)
    @example(stage="end_of_data", octets=b"550 no\r\n250 ok\r\n", cuts=[8], pipelined=False)
    @example(stage="end_of_data", octets=b"250 o\nk\r\n", cuts=[], pipelined=False)
    def holds(stage: str, octets: bytes, cuts: list[int], pipelined: bool) -> None:
        places = [0, *sorted(cut for cut in cuts if cut < len(octets)), len(octets)]
        pieces = [octets[begin:end] for begin, end in itertools.pairwise(places)]
        runner.run(converse(upstream, running, stage, pieces, pipelined=pipelined))

    holds()


async def converse(
    upstream: Forging, running: Running, stage: str, pieces: list[bytes], *, pipelined: bool
) -> None:
    """Send one message, see that the session is in step, and compare what was said with what is known."""
    before = len(running.rows())
    # Nothing but this ends a connection that the relay has opened since the last example.
    await eventually(lambda: upstream.ended() and " 0 active, 0 idle, 0 connecting" in repr(running.pool))
    upstream.forge(stage, pieces)
    async with Client(running.port) as client:
        await client.greeting()
        await client.command(b"EHLO client.test", 250)
        told = await transaction(client, upstream, pipelined=pipelined)
        await client.command(b"RSET", 250)
        await client.command(b"NOOP", 250)
        assert client.wire.waiting == b""
    assert upstream.used, f"the example was not said: {told}"
    assert all(PRINTABLE.fullmatch(raw) for raw in told)
    await upstream.hang_up()
    rows = running.rows()[before:]
    ends = [forger for forger in upstream.connections if forger.got_end]
    accepted = len(told) == 4 and told[-1].startswith(b"2")
    assert len(rows) == accepted, (told, rows)
    if accepted:
        (forger,) = ends
        verdict = WHOLE.match(forger.verdict)
        assert verdict is not None
        assert verdict[2].startswith(b"2")
        answers = [match[2] for match in WHOLE.finditer(forger.before)]
        assert b"".join(match[0] for match in WHOLE.finditer(forger.before)) == forger.before
        assert len(answers) == forger.commands == 3
    elif ends and upstream.stage == "end_of_data":
        verdict = WHOLE.match(ends[0].verdict)
        assert verdict is None or not verdict[2].startswith(b"2") or len(verdict[0]) > MAX_LINE


async def transaction(client: Client, upstream: Forging, *, pipelined: bool) -> list[bytes]:
    """Return the replies to MAIL, RCPT, DATA and the end of data, as far as it goes."""
    commands = [b"MAIL FROM:<a@example.test>\r\n", b"RCPT TO:<b@example.test>\r\n", b"DATA\r\n"]
    told = []
    if pipelined:
        await client.send(b"".join(commands))
        told = [(await client.reply()).raw for _ in commands]
    else:
        for command in commands:
            await client.send(command)
            told.append((await client.reply()).raw)
            await upstream.quiet()
            if not told[-1].startswith((b"2", b"3")):
                return told
    if told[-1].startswith(b"354"):
        await upstream.quiet()
        await client.send(b"Subject: x\r\n\r\nx\r\n.\r\n")
        told.append((await client.reply()).raw)
    return told
