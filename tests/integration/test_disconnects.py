"""The client leaves, at every stage and in every way; and verdicts that come when nobody waits any more.

Whatever the client does: the upstream gets no end of data that the client did not send, an end of data that
it did send is settled and recorded, one message is counted, and nothing stays behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client
from tests.support.upstream import CHUNKING, Close, Delay, ScriptedUpstream
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from tests.conftest import Running

COMMANDS = (b"MAIL FROM:<a@example.test>", b"RCPT TO:<b@example.test>", b"DATA")
CONTENT = b"Subject: one\r\n\r\ntext\r\n"
LINES = b" and so on, line by line, for longer than anybody reads\r\n" * 1000
"""So many octets that some go up before the end of data."""

# The client says so many of the COMMANDS and these octets behind them, then it leaves.
# "unanswered": it has not had the reply to the last thing that it said, and the upstream not given it.
#
# stage                      | commands | octets               | outcome
STAGES = {
    "before the greeting":      (0,       b"",                   None),
    "before EHLO":              (0,       b"",                   None),
    "in a command":             (0,       b"MAIL FROM:<a@exam",  None),
    "MAIL unanswered":          (1,       b"",                   "aborted"),
    "MAIL":                     (1,       b"",                   "aborted"),
    "RCPT unanswered":          (2,       b"",                   "aborted"),
    "RCPT":                     (2,       b"",                   "aborted"),
    "DATA unanswered":          (3,       b"",                   "aborted"),
    "DATA":                     (3,       b"",                   "aborted"),
    "in the header":            (3,       b"Subject: o",         "aborted"),
    "in a long header":         (3,       b"Subject: o\r\n" + LINES, "aborted"),
    "in the body":              (3,       CONTENT[:-4],          "aborted"),
    "in a long body":           (3,       CONTENT + LINES,       "aborted"),
    "before the end of data":   (3,       CONTENT,               "aborted"),
    "after its period":         (3,       CONTENT + b".",        "aborted"),
    "one octet before its end": (3,       CONTENT + b".\r",      "aborted"),
    "verdict unanswered":       (3,       CONTENT + b".\r\n",    "accepted"),
    "verdict":                  (3,       CONTENT + b".\r\n",    "accepted"),
}  # fmt: skip
HELD = {
    "MAIL unanswered": "MAIL",
    "RCPT unanswered": "RCPT",
    "DATA unanswered": "DATA",
    "verdict unanswered": "end_of_data",
}
"""Where the upstream waits until the client has left."""

WAYS = ("close", "reset", "half-close")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
async def test_the_client_leaves(stage: str, way: str, start: Any, upstream: ScriptedUpstream) -> None:
    commands, _, outcome = STAGES[stage]
    answer = asyncio.Event()
    if stage in HELD:
        upstream.script = {HELD[stage]: Delay(answer)}
    async with start(upstream.port) as running:
        async with Client(running.port) as client:
            await talk(client, stage, upstream)
            leave(client, way)
            if way == "reset":  # of any other way the relay learns only that nothing more will be said
                await eventually(lambda: "0 sessions" in repr(running.relay.reception))
            answer.set()
            if way == "half-close":
                await last_words(client, stage)
            await nothing_left(running)
        await counted(running, **({outcome: 1} if outcome else {}))
        if outcome == "accepted":
            assert [message.content for message in upstream.messages] == [CONTENT]
            (row,) = running.rows()
            # null: it heard nothing; no such key: it was told what the upstream replied.
            unheard = (stage, way) == ("verdict unanswered", "reset")
            heard = {"client_reply": None} if unheard else {}
            assert json.loads(row["data"]) == {"relay": "relay.test"} | heard
        else:
            assert running.rows() == []
            assert upstream.messages == []
            if commands == len(COMMANDS):
                await upstream.wait_for(lambda: not upstream.connections[0].open)
        await a_message_passes(running, upstream)


async def talk(client: Client, stage: str, upstream: ScriptedUpstream) -> None:
    """Say what the stage says, and wait until all of it has arrived where it can."""
    said, octets, _ = STAGES[stage]
    if stage == "before the greeting":
        return
    await client.greeting()
    if stage == "before EHLO":
        return
    await client.ehlo()
    last = COMMANDS[said - 1]
    for command in COMMANDS[:said]:
        await client.send(command + b"\r\n")
        if command is last and stage in HELD and stage != "verdict unanswered":
            await upstream.wait_for(lambda: upstream.connections[0].lines[-1] == last)
        else:
            await client.reply()
    await client.send(octets)
    if stage == "verdict":
        await client.expect(250)
    elif stage == "verdict unanswered":
        await upstream.message()
    elif len(octets) > len(LINES):
        await upstream.wait_for(lambda: upstream.incomplete[0].size > 0)


def leave(client: Client, way: str) -> None:
    match way:
        case "close":
            client.close()
        case "reset":
            client.reset()
        case "half-close":
            client.half_close()


async def last_words(client: Client, stage: str) -> None:
    """A client that has sent FIN may still read: it gets the reply to what it had said, and then the end."""
    said = await client.expect_closed()
    expected = {
        "before the greeting": b"220 ",
        "MAIL unanswered": b"250 ",
        "RCPT unanswered": b"250 ",
        "DATA unanswered": b"354 ",
        "verdict unanswered": b"250 ",
    }
    assert said.startswith(expected.get(stage, b""))
    assert said.count(b"\r\n") == (stage in expected)


async def a_message_passes(running: Running, upstream: ScriptedUpstream) -> None:
    before = len(upstream.messages)
    upstream.script = {}
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        await client.quit()
    assert len(upstream.messages) == before + 1
    assert len(running.rows()) == len(upstream.messages)


# Late verdicts: the client was told 451 when end_of_data_timeout was over; the upstream answers all the same.
# The times: the client is told at the first look after `at_once`; the upstream has 10 minutes to answer.

LOOKS = {"idle_timeout": "400ms"}
"""Waits are looked at four times within the shortest one."""


async def test_the_client_leaves_as_its_connection_is_ready(
    start: Any, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that comes when the dial is done may be swallowed: `wait_for` does so before 3.12."""
    upstream.script = {"greeting": [b"554 not yet\r\n"]}  # the start's own attempt: no connection is idle
    async with start(upstream.port) as running:
        dial, begun, go_on = running.pool._dialer.dial, asyncio.Event(), asyncio.Event()

        async def deaf_dial(credentials: Any) -> Any:
            begun.set()
            while not go_on.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await go_on.wait()
            return await dial(credentials)

        monkeypatch.setattr(running.pool._dialer, "dial", deaf_dial)
        async with Client(running.port) as client:
            await client.ehlo()
            await client.send(b"MAIL FROM:<a@example.test>\r\n")
            await begun.wait()
            client.reset()
            await eventually(lambda: "0 sessions" in repr(running.relay.reception))
            go_on.set()
        await nothing_left(running)
        await counted(running, aborted=1)
        (connection,) = upstream.open_connections
        assert connection.lines == [b"EHLO relay.test"]
        assert connection.idle


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (b"250 2.0.0 late\r\n", "accepted"),
        (b"251 2.0.0 late\r\n", "accepted"),
        (b"450 4.0.0 late\r\n", "deferred"),
        (b"550 5.0.0 late\r\n", "rejected"),
        (Close(b"421 4.0.0 late\r\n"), "deferred"),
        (Close(), "in_doubt"),
    ],
    ids=["250", "251", "450", "550", "421", "close"],
)
@pytest.mark.parametrize("client_stays", [True, False], ids=["client_stays", "client_leaves"])
async def test_a_late_verdict_is_the_truth(
    verdict: Any, outcome: str, client_stays: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": [Delay(answer, verdict)]}
    async with start(upstream.port, upstream=LOOKS) as running:
        running.pool.end_of_data_timeout = 0.0
        async with Client(running.port) as client:
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert replies[-1].raw.startswith(b"451 4.4.2 ")
            assert outcomes(running) == {}, "nothing is known yet"
            assert running.rows() == []
            if client_stays:
                await client.command("NOOP", 250)
            else:
                client.reset()
                await eventually(lambda: "0 sessions" in repr(running.relay.reception))
            answer.set()
            await counted(running, **{outcome: 1})
            if outcome == "accepted":
                (row,) = running.rows()
                assert row["upstream_reply"].endswith(" 2.0.0 late")
                assert json.loads(row["data"]) == {"relay": "relay.test", "client_reply": str(replies[-1])}
            else:
                assert running.rows() == []
            if client_stays:
                await client.quit()
            await nothing_left(running)
        assert len(upstream.messages) == 1


async def test_the_session_goes_on_while_a_verdict_is_overdue(start: Any, upstream: ScriptedUpstream) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": [Delay(answer, b"250 2.0.0 late\r\n")]}
    async with start(upstream.port, upstream=LOOKS) as running:
        running.pool.end_of_data_timeout = 0.0
        async with Client(running.port) as client:
            await client.ehlo()
            first = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert first[-1].code == 451
            running.pool.end_of_data_timeout = 600.0
            second = await client.message("a@example.test", ["c@example.test"], CONTENT)
            assert second[-1].code == 250
            await counted(running, accepted=1)
            answer.set()
            await counted(running, accepted=2)
            assert [json.loads(row["data"]) for row in running.rows()] == [
                {"relay": "relay.test"},
                {"relay": "relay.test", "client_reply": str(first[-1])},
            ]
            await client.quit()
        await nothing_left(running)


@pytest.mark.parametrize("verdict", [b"554 5.7.1 no\r\n", Close()])
async def test_the_session_goes_on_though_its_last_octets_were_not_taken(
    verdict: Any, start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": [Delay(answer, verdict)]}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for line, code in ((b"MAIL FROM:<a@b.test>", 250), (b"RCPT TO:<c@d.test>", 250), (b"DATA", 354)):
            await client.command(line, code)
        await client.send(CONTENT + b".\r\n")
        (message,) = await eventually(lambda: [*running.relay.reception.services.settling])
        message._lease.connection.pause_writing()  # as when the buffers are full
        answer.set()
        assert (await client.reply()).code in (451, 554)
        await client.command(b"NOOP", 250)
        replies = await client.message("a@example.test", ["c@example.test"], CONTENT)
        assert replies[-1].code == 250


async def test_the_session_goes_on_though_the_connection_was_replaced_that_took_nothing_more(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.message("a@example.test", ["b@example.test"], CONTENT)
        gate = asyncio.Event()
        upstream.script = {"MAIL": [Delay(gate, Close()), b"250 2.1.0 ok\r\n"]}
        await client.send(b"MAIL FROM:<a@b.test>\r\n")
        await eventually(lambda: any(each.lessee for each in running.pool._open))
        (connection,) = running.pool._open
        connection.pause_writing()  # as when the buffers are full
        gate.set()
        await client.expect(250)
        await client.command(b"NOOP", 250)


async def test_what_is_pipelined_behind_the_end_of_data_runs_after_the_verdict(
    start: Any, upstream: ScriptedUpstream
) -> None:
    answer = asyncio.Event()
    upstream.script = {"end_of_data": Delay(answer)}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in COMMANDS:
            await client.command(command)
        await client.send(CONTENT + b".\r\n" + COMMANDS[0] + b"\r\nRSET\r\nQUIT\r\n")
        await upstream.message()
        answer.set()
        replies = await client.replies(4)
        assert [reply.code for reply in replies] == [250, 250, 250, 221]
        await client.expect_eof()
        await counted(running, accepted=1, aborted=1)
        await nothing_left(running)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_peer_that_reset_before_it_came_in_is_nobody(loop: str, start: Any) -> None:
    """Nobody can say any more who it was, so it is no proxy either, whatever can still be read of it."""

    async def leave() -> None:
        listener = {"address": "127.0.0.1:0", "proxy_protocol": True}
        clients = {"allow": ["192.0.2.1"], "trusted_proxies": ["127.0.0.1"]}
        async with ScriptedUpstream() as upstream:
            upstream.extensions += CHUNKING
            async with start(upstream.port, listeners=[listener], clients=clients) as running:
                # Within one turn of the event loop: only then does the relay learn of the connection.
                peer = socket.create_connection(("127.0.0.1", running.port), source_address=("127.0.0.2", 0))
                peer.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 25\r\nEHLO x.test\r\n")
                peer.sendall(b"\r\n".join(COMMANDS[:2]) + b"\r\nBDAT %d LAST\r\n" % len(CONTENT) + CONTENT)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.close()
                address = listener["address"]
                await eventually(lambda: running.metric("client_sessions_total", listener=address) == 1)
                await nothing_left(running)
                assert running.rows() == []
                assert upstream.messages == []
                assert outcomes(running) == {}

    factory = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(leave())
