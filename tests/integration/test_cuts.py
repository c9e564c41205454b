"""One whole dialogue, the TCP stream cut at every octet of it, at the client's side and at the upstream's.

Each cut is a message of its own with an id of its own; all of one test go through one relay. At the end the
checker compares what was told, what the upstream has, and what is recorded. The cuts by FIN say exactly which
messages pass; after an RST octets that had arrived may be lost unread, at either end, so there the upstream's
account says what was to be expected.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from relay.upstream import breaker
from tests.conftest import Running, merged
from tests.support.client import Client, bdat
from tests.support.faulty import DOWN, Cut, Fault, FaultyProxy, Stall
from tests.support.ledger import ID_HEADER, Ledger, check, id_of, ids
from tests.support.script import Script
from tests.support.storm import is_uncertain
from tests.support.upstream import CHUNKING, Message, ScriptedUpstream

SETTINGS: dict[str, Any] = {
    "server": {"max_connections_per_client": 1000},
    "upstream": {"max_connections": 200, "max_messages": 1},
}
"""A connection to the upstream carries one message, so that each cut has its own."""
SHORT = "1s"
"""By this limit stalls end. Who is too slow for it only for want of CPU is counted as stalled."""
PATIENCE: dict[str, Any] = {
    "client": {"server": {"idle_timeout": SHORT, "lease_idle_timeout": SHORT}},
    "upstream": {
        "upstream": {"connect_timeout": SHORT, "reply_timeout": SHORT, "end_of_data_timeout": SHORT}
    },
}
AT_ONCE = 64
"""Cuts by a stall that wait side by side."""


def settings(side: str, way: str) -> dict[str, Any]:
    return merged(SETTINGS, PATIENCE[side]) if way == "stall" else SETTINGS


def content(key: str) -> bytes:
    # The id comes last in the header section, and the text has a line to be stuffed.
    return b"Subject: x\r\n%b: %b\r\n\r\n.text\r\n" % (ID_HEADER.encode(), key.encode())


ENVELOPE = (b"MAIL FROM:<a@a.test>\r\n", b"RCPT TO:<b@b.test>\r\n", b"RCPT TO:<c@b.test>\r\n")


def by_data(key: str) -> tuple[bytes, ...]:
    """What the client says, in the pieces that are answered one by one."""
    stuffed = content(key).replace(b"\r\n.", b"\r\n..")
    return (b"EHLO a\r\n", *ENVELOPE, b"DATA\r\n", stuffed + b".\r\n", b"QUIT\r\n")


def by_bdat(key: str) -> tuple[bytes, ...]:
    whole = content(key)
    return (b"EHLO a\r\n", *ENVELOPE, bdat(whole[:21]), bdat(whole[21:], last=True), b"QUIT\r\n")


Dialogue = Callable[[str], tuple[bytes, ...]]
DIALOGUES = pytest.mark.parametrize("dialogue", [by_data, by_bdat], ids=["DATA", "BDAT"])
WAYS = pytest.mark.parametrize("way", ["fin", "rst", "stall"])
VERDICT = -2
"""Where in the dialogue the message ends and is answered."""


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """Its replies are the same octets each time."""
    script: Script = {"end_of_data": lambda *_: b"250 2.0.0 accepted\r\n"}
    async with ScriptedUpstream(script, extensions=("PIPELINING", *CHUNKING)) as server:
        yield server


@dataclass
class Account:
    """What clients were told."""

    told: dict[str, int | None] = field(default_factory=dict)
    uncertain: set[str] = field(default_factory=set)

    async def say(self, client: Client, key: str, dialogue: Dialogue, octets: int) -> None:
        """Say so many octets of the dialogue, each piece after the reply to the one before it.

        After an error the client says QUIT.
        """
        self.told[key] = None
        *before, last, bye = dialogue(key)
        await client.greeting()
        for piece in (*before, last, bye):
            await client.send(piece[:octets])
            if octets < len(piece):
                return
            octets -= len(piece)
            reply = await client.reply()
            if piece is last or reply.code >= 400:
                self.told[key] = reply.code
                self.uncertain |= {key} if is_uncertain([reply]) else set()
            if reply.code >= 400:
                await client.quit()
                return


# The client's side


@DIALOGUES
@WAYS
async def test_the_clients_stream_is_cut(
    way: str, dialogue: Dialogue, start: Any, upstream: ScriptedUpstream
) -> None:
    account = Account()

    async def cut(running: Running, octets: int) -> None:
        key = f"c{octets:03}"
        async with Client(running.port) as client:
            await account.say(client, key, dialogue, octets)
            match way:
                case "fin":
                    client.half_close()
                case "rst":
                    client.reset()
            if way != "rst":
                await client.expect_closed()

    pieces = dialogue("c000")
    whole = sum(map(len, pieces))
    async with start(upstream.port, **settings("client", way)) as running:
        await side_by_side(lambda octets: cut(running, octets), range(whole + 1))
        await a_message_passes(running)
    ledger = books(running, account, upstream)

    assert check(ledger) == []
    assert ledger.in_doubt == []
    in_step(upstream)
    if way == "fin":
        passes = range(sum(map(len, pieces[: VERDICT + 1])), whole + 1)
        expected = [f"c{octets:03}" for octets in passes]
        assert sorted(ledger.rows) == [*expected, "last"]
        assert sorted(key for key, code in account.told.items() if code == 250) == [*expected, "last"]


# The upstream's side


@DIALOGUES
@WAYS
async def test_the_upstreams_stream_is_cut(
    way: str, dialogue: Dialogue, start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each cut is to meet a dial of its own; a breaker that opens would keep the next ones from it.
    monkeypatch.setattr(breaker, "THRESHOLD", 1 << 30)
    account = Account()
    replies = await upstreams_half(upstream, dialogue)
    ends = list(itertools.accumulate(map(len, replies)))
    # After each octet; and where a reply would begin also when it is under way, not only before that.
    cuts = [(octets, False) for octets in range(ends[-1])] + [(octets, True) for octets in (0, *ends[:-1])]
    numbers = itertools.count()

    def plan(number: int) -> Fault | None:
        if not 1 <= number <= len(cuts):  # the first one is the relay's own, made at its start
            return None
        after, late = cuts[number - 1]
        if way == "stall":
            return Stall(DOWN, after, late=late)
        return Cut(DOWN, after, by=way, late=late)  # type: ignore[arg-type]

    async def send(running: Running, proxy: FaultyProxy) -> None:
        while proxy.accepted <= len(cuts):
            key = f"u{next(numbers):03}"
            async with Client(running.port) as client:
                await account.say(client, key, dialogue, 1000)

    async with FaultyProxy(lambda: upstream.port, plan) as proxy:
        async with start(proxy.port, **settings("upstream", way)) as running:
            await side_by_side(lambda _: send(running, proxy), range(AT_ONCE if way == "stall" else 1))
            proxy.plan = lambda _: None
            await eventually_passes(running)
        struck = sum(proxy.faults.values())
    ledger = books(running, account, upstream)

    assert struck == len(cuts)
    assert check(ledger, settled=False) == []
    in_step(upstream)
    numbers_by_key = {key: proxy.ports[port] for key, port in whole_at(upstream)}
    unread = {key: number for key, number in numbers_by_key.items() if key not in ledger.rows}
    # In doubt is just what had gone up whole without an answer that the relay got; and the one message whose
    # end of data was written as the connection was cut, before any of it: that it is lost nobody else knows.
    assert unread.keys() <= set(ledger.in_doubt)
    assert len(set(ledger.in_doubt) - unread.keys()) <= (way != "stall")
    begin, end = ends[VERDICT - 1], ends[VERDICT]
    if way == "fin":
        expected = [(octets, False) for octets in range(begin + 1, end)] + [(begin, True)]
        assert [cuts[number - 1] for number in sorted(unread.values())] == expected


async def upstreams_half(upstream: ScriptedUpstream, dialogue: Dialogue) -> list[bytes]:
    """Return the greeting and all replies of one dialogue, as the relay will get them."""
    pieces = dialogue("clean")
    replies = []
    async with Client(upstream.port) as client:
        replies.append((await client.greeting()).raw)
        for piece in pieces:
            await client.send(piece)
            replies.append((await client.reply()).raw)
    await upstream.wait_for(lambda: not upstream.open_connections)
    for seen in (upstream.messages, upstream.connections):
        seen.clear()
    return replies


def whole_at(upstream: ScriptedUpstream) -> Iterator[tuple[str, int]]:
    """Give the id of each message that the upstream has whole, and the port that it came from."""
    for connection in upstream.connections:
        for message in connection.messages:
            if message.complete and id_of(message.content) != "last":
                yield id_of(message.content), connection.wire.peer_port


# Both


async def side_by_side(work: Callable[[int], Awaitable[None]], numbers: range) -> None:
    """Do the work for each number, AT_ONCE at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with room:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(one(number))


async def a_message_passes(running: Running) -> None:
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@a.test", ["b@b.test"], content("last"))
        assert [reply.code for reply in replies] == [250, 250, 354, 250]


async def eventually_passes(running: Running) -> None:
    """Send until the upstream is tried again: one that has failed so often may be left alone for a while."""
    async with asyncio.timeout(30):
        while True:
            async with Client(running.port) as client:
                await client.ehlo()
                if (await client.command(b"MAIL FROM:<a@a.test>")).code == 250:
                    break
            await asyncio.sleep(0.05)
    await a_message_passes(running)


def books(running: Running, account: Account, upstream: ScriptedUpstream) -> Ledger:
    """Return all accounts; the message that went through at the end is in each."""
    account.told["last"] = 250

    def having(condition: Callable[[Message], bool]) -> list[str]:
        return [id_of(message.content) for message in upstream.messages if condition(message)]

    return Ledger(
        told=account.told,
        uncertain=account.uncertain,
        accepted=having(lambda message: message.accepted),
        refused=having(lambda message: message.reply is not None and not message.accepted),
        unanswered=having(lambda message: message.reply is None),
        rows=ids(running.rows, "task_done"),
        in_doubt=ids(running.rows, "task_in_doubt"),
    )


def in_step(upstream: ScriptedUpstream) -> None:
    """Nothing reached the upstream that it did not understand, or with another message's octets in it."""
    assert upstream.violations == []
    for connection in upstream.connections:
        answers = [line for line in connection.transcript if line.startswith("S: 5")]
        assert answers == [], connection.transcript
    for message in upstream.messages:
        assert message.content == content(id_of(message.content))
