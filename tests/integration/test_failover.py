"""A message whose upstream cannot be had: when another one gets it, and when none may."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from relay.upstream.breaker import LONGEST_PAUSE, THRESHOLD
from relay.upstream.health import AGAIN_S
from tests.support.client import Client
from tests.support.several import configured, look, scripted, transactions, verbs
from tests.support.upstream import (
    CHUNKING,
    EXTENSIONS,
    TOO_MANY,
    Close,
    Delay,
    Garbage,
    HalfReply,
    Reset,
    ScriptedUpstream,
    Silence,
)
from tests.support.watch import eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from tests.conftest import Running
    from tests.support.client import Reply
    from tests.support.script import Action

CONTENT = b"Subject: one\r\n\r\ntext\r\n"
NAMES = ("primary", "spare", "none")


async def send(running: Running, *, pipelined: bool = False, source: str = "") -> list[Reply]:
    """Send one message in a session of its own; return the replies to it."""
    async with Client(running.port, source=source) as client:
        await client.ehlo()
        return await client.message("a@example.test", ["b@example.test"], CONTENT, pipelined=pipelined)


def codes(replies: list[Reply]) -> list[int]:
    return [reply.code for reply in replies]


def pair(primary: ScriptedUpstream, spare: ScriptedUpstream, **keys: Any) -> list[dict[str, Any]]:
    """Settings of two upstreams of which the second stands by."""
    return [configured("primary", primary, **keys), configured("spare", spare, priority=20)]


# Stage by stage: before MAIL is answered the spare gets the message, afterwards nobody does

GONE: dict[str, Action] = {
    "closes": Close(),
    "resets": Reset(),
    "says half a reply": HalfReply(),
    "says 421": b"421 4.3.2 not now\r\n",
    "says 421 and closes": Close(b"421 4.3.2 not now\r\n"),
    "says garbage": Garbage(),
}
MOVES = {
    **{
        f"{stage} {fault}": (stage, action)
        for stage in ("greeting", "EHLO")
        for fault, action in GONE.items()
    },
    "greeting says 554": ("greeting", b"554 5.3.2 no service\r\n"),
    "EHLO says 550": ("EHLO", b"550 5.7.1 go away\r\n"),
    "connect closes": ("connect", Close()),
    "connect resets": ("connect", Reset()),
    **{f"MAIL {fault}": ("MAIL", action) for fault, action in GONE.items()},
}


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
@pytest.mark.parametrize("case", MOVES)
async def test_until_mail_is_answered_the_next_one_gets_the_message(
    start: Any, case: str, pipelined: bool
) -> None:
    stage, action = MOVES[case]
    async with scripted(2) as (primary, spare):
        primary.script = {stage: action}
        async with start(0, upstreams=pair(primary, spare)) as running:
            assert codes(await send(running, pipelined=pipelined)) == [250, 250, 354, 250]
            await nothing_left(running)
            assert outcomes(running, NAMES) == {"accepted": 1}
            (row,) = running.rows()
            assert row["upstream"] == "spare"
            assert running.metric("messages_total", upstream="spare", outcome="accepted") == 1
            assert running.metric("upstream_failovers_total", upstream="primary") == 1
            assert running.metric("upstream_failovers_total", upstream="spare") == 0
        assert primary.messages == []
        assert verbs(spare) == ["MAIL", "RCPT", "DATA"]
        assert not primary.violations + spare.violations


MAIL_REFUSED = [
    "450 4.2.0 later",
    "451 4.3.0 later",
    "452 4.3.1 full",
    "503 5.5.1 no",
    "550 5.7.1 no",
    "552 5.3.4 no",
]
BROKEN: dict[str, Action] = {key: GONE[key] for key in GONE if key != "resets"} | {
    "says 4yz": b"451 4.3.0 later\r\n",
    "says 5yz": b"554 5.0.0 no\r\n",
}
STAYS = {
    **{f"MAIL {reply}": ("MAIL", f"{reply}\r\n".encode()) for reply in MAIL_REFUSED},
    **{
        f"{stage} {fault}": (stage, action)
        for stage in ("RCPT", "DATA", "end_of_data")
        for fault, action in BROKEN.items()
    },
    "RCPT resets": ("RCPT", Delay(0.05, Reset())),
    "body closes": ("body", Close()),
    "body resets": ("body", Reset()),
}


# Pipelined garbage makes the replies before it, in the same segment, unbelievable: MAIL may be among them.
CASES = [
    (case, pipelined)
    for case in STAYS
    for pipelined in (False, True)
    if not (pipelined and "garbage" in case)
]


@pytest.mark.parametrize(("case", "pipelined"), CASES)
async def test_once_mail_is_answered_nobody_else_gets_it(start: Any, case: str, pipelined: bool) -> None:
    stage, action = STAYS[case]
    async with scripted(2) as (primary, spare):
        primary.script = {stage: action}
        async with start(0, upstreams=pair(primary, spare)) as running:
            replies = await send(running, pipelined=pipelined)
            assert replies[-1].code >= 400
            if stage == "MAIL":
                assert str(replies[0]) == case.removeprefix("MAIL ")
            await nothing_left(running)
            assert running.rows() == []
            assert sum(outcomes(running, ["primary"]).values()) == 1
            assert outcomes(running, ["spare", "none"]) == {}
            assert running.metric("upstream_failovers_total", upstream="primary") == 0
        assert verbs(spare) == []
        assert transactions(primary) == 1


@pytest.mark.parametrize("stage", ["greeting", "EHLO"])
async def test_an_upstream_that_says_nothing_is_given_up_after_its_time(start: Any, stage: str) -> None:
    async with scripted(2) as (primary, spare):
        primary.script = {stage: Silence()}
        async with start(0, upstreams=pair(primary, spare, connect_timeout="50ms")) as running:
            assert codes(await send(running)) == [250, 250, 354, 250]
        assert len(spare.accepted) == 1


async def test_an_upstream_that_does_not_answer_mail_is_given_up_after_its_time(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.script = {"MAIL": Silence()}
        async with start(0, upstreams=pair(primary, spare, reply_timeout="50ms")) as running:
            assert codes(await send(running, pipelined=True)) == [250, 250, 354, 250]
        assert len(spare.accepted) == 1


async def test_nobody_listens(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.unlisten()
        async with start(0, upstreams=pair(primary, spare)) as running:
            assert codes(await send(running)) == [250, 250, 354, 250]
            assert "upstream primary: down: " in "\n".join(running.relay.readiness()[1])


async def test_no_free_connection_in_time(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        keys = {"max_connections": 1, "lease_wait_timeout": "50ms"}
        async with (
            start(0, upstreams=pair(primary, spare, **keys)) as running,
            Client(running.port) as first,
        ):
            await first.ehlo()
            await first.command(b"MAIL FROM:<a@example.test>", 250)
            assert codes(await send(running, source="127.0.0.2")) == [250, 250, 354, 250]
            assert len(spare.accepted) == 1
            await first.command(b"RSET", 250)


async def test_an_idle_connection_found_dead_is_replaced_before_another_upstream_is_asked(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running:
            await send(running)
            primary.script = {"MAIL": [Close()]}
            assert codes(await send(running, pipelined=True)) == [250, 250, 354, 250]
        assert len(primary.accepted) == 2
        assert transactions(spare) == 0


async def test_an_idle_connection_dies_and_no_new_one_can_be_had(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running:
            await send(running)
            primary.script = {"MAIL": Close(), "greeting": b"554 no\r\n"}
            assert codes(await send(running, pipelined=True)) == [250, 250, 354, 250]
        assert len(spare.accepted) == 1


async def test_the_last_one_that_was_tried_is_named(start: Any) -> None:
    async with scripted(3) as (first, second, third):
        first.script = {"MAIL": b"421 4.3.2 first\r\n"}
        second.script = {"greeting": b"554 second\r\n"}
        third.script = {"MAIL": b"421 4.3.2 third\r\n"}
        upstreams = [
            configured("first", first, priority=1),
            configured("second", second, priority=2),
            configured("third", third, priority=3),
        ]
        async with start(0, upstreams=upstreams) as running:
            async with Client(running.port) as client:
                await client.ehlo()
                reply = await client.command(b"MAIL FROM:<a@example.test>")
                assert str(reply) == "451 4.3.2 third"
                await client.quit()
            assert running.metric("messages_total", upstream="third", outcome="unavailable") == 1
            assert running.metric("upstream_failovers_total", upstream="second") == 1


async def test_chunks_go_along(start: Any) -> None:
    async with scripted(2, extensions=(*EXTENSIONS, *CHUNKING)) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running, Client(running.port) as client:
            primary.script = {"MAIL": Close(b"421 4.3.2 not now\r\n")}
            await client.ehlo()
            replies = await client.chunks(
                "a@example.test", ["b@example.test"], [b"Subject: x\r\n", b"\r\nx\r\n"]
            )
            assert codes(replies) == [250, 250, 250, 250]
        assert len(spare.accepted) == 1


async def test_a_client_that_goes_takes_its_failover_with_it(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.script = {"greeting": [None, Silence()]}
        keys = {"connect_timeout": "10s", "max_messages": 1}
        async with start(0, upstreams=pair(primary, spare, **keys)) as running:
            await send(running)
            async with Client(running.port) as client:
                await client.ehlo()
                await client.send(b"MAIL FROM:<a@example.test>\r\n")
                await eventually(lambda: len(primary.connections) == 2)
                client.reset()
            await eventually(
                lambda: running.metric("messages_total", upstream="primary", outcome="aborted") == 1
            )
            await nothing_left(running)
        assert transactions(spare) == 0


# The breaker


async def test_three_failures_and_messages_go_past(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running:
            look(running, 3600)  # what the start has opened is retired
            await eventually(lambda: not primary.open_connections)
            primary.script = {"greeting": b"554 no service\r\n"}
            tried = len(primary.connections)
            for _ in range(THRESHOLD + 5):
                assert codes(await send(running)) == [250, 250, 354, 250]
            assert len(primary.connections) - tried == THRESHOLD
            assert running.metric("upstream_failovers_total", upstream="primary") == THRESHOLD + 5
            assert running.metric("upstream_up", upstream="primary") == 0
            (line,) = [line for line in running.relay.readiness()[1] if "primary" in line]
            assert line.startswith("upstream primary: down: ")
            assert ", next try in " in line
        assert len(spare.accepted) == THRESHOLD + 5


async def test_it_recovers_without_traffic(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running:
            look(running, 3600)
            await eventually(lambda: not primary.open_connections)
            primary.script = {"greeting": b"554 no service\r\n"}
            for _ in range(THRESHOLD):
                await send(running)
            failed = len(primary.connections)
            look(running, LONGEST_PAUSE)  # still down: a longer pause
            await primary.wait_for(lambda: len(primary.connections) > failed)
            await eventually(lambda: running.pool._trying is None)
            assert running.pool.avoided
            primary.script = {}
            look(running, LONGEST_PAUSE)
            await eventually(lambda: not running.pool.avoided)
            assert "upstream primary: up" in running.relay.readiness()[1]
            assert running.metric("upstream_up", upstream="primary") == 1
            await send(running)
        assert len(primary.accepted) == 1
        assert transactions(primary) == 1, "a probe is nobody's message"
        assert len(spare.accepted) == THRESHOLD


async def test_one_failure_is_not_the_last_word_where_there_is_no_mail(start: Any) -> None:
    """A relay that is started before its upstream, or one bad moment in a quiet night."""
    async with scripted(1) as (primary,):
        primary.unlisten()
        async with start(0, upstreams=[configured("primary", primary)]) as running:
            assert running.metric("upstream_up", upstream="primary") == 0
            await primary.listen()
            look(running, AGAIN_S / 2)
            assert running.pool._trying is None
            look(running, AGAIN_S)
            await eventually(lambda: running.metric("upstream_up", upstream="primary"))
            assert "upstream primary: up" in running.relay.readiness()[1]
            await eventually(lambda: running.pool._trying is None)
            look(running, AGAIN_S / 2)
            assert running.pool._trying is None
            assert transactions(primary) == 0


async def test_an_upstream_that_stays_away_is_known_to_before_there_is_mail(start: Any) -> None:
    async with scripted(1) as (primary,):
        primary.unlisten()
        async with start(0, upstreams=[configured("primary", primary)]) as running:
            for _ in range(THRESHOLD - 1):
                assert not running.pool.avoided
                look(running, AGAIN_S)
                await eventually(lambda: running.pool._trying is None)
            assert running.pool.avoided
            await primary.listen()
            look(running, LONGEST_PAUSE)
            await eventually(lambda: not running.pool.avoided)
            assert codes(await send(running))[-1] == 250


async def test_a_login_that_was_refused_is_not_tried_again_without_mail(start: Any) -> None:
    """Servers lock accounts for that."""
    async with scripted(1) as (primary,):
        primary.users = {"relay": "changed"}
        login = {"username": "relay", "password": "sesame"}
        async with start(0, upstreams=[configured("primary", primary, **login)]) as running:
            assert running.metric("upstream_connects_total", upstream="primary", outcome="auth") == 1
            look(running, 10 * AGAIN_S)
            assert running.pool._trying is None
            assert len(primary.connections) == 1


async def test_new_connections_that_are_dropped_at_mail_open_it_too(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.script = {"MAIL": Close()}
        async with start(0, upstreams=pair(primary, spare)) as running:
            for _ in range(THRESHOLD + 3):
                assert codes(await send(running)) == [250, 250, 354, 250]
            assert running.pool.avoided
        assert THRESHOLD <= transactions(primary) <= THRESHOLD + 1  # one of them on the start's connection
        assert len(spare.accepted) == THRESHOLD + 3


async def test_a_mail_that_is_answered_in_between_keeps_it_shut(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running:
            for _ in range(2):
                primary.script = {"MAIL": Close()}
                for _ in range(THRESHOLD - 1):
                    await send(running)
                assert not running.pool.avoided
                primary.script = {}
                await send(running)
        assert [len(primary.accepted), len(spare.accepted)] == [2, 2 * (THRESHOLD - 1)]


async def test_connections_that_stand_are_used_while_new_ones_are_refused(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        async with start(0, upstreams=pair(primary, spare)) as running, Client(running.port) as holder:
            await holder.ehlo()
            await holder.command(b"MAIL FROM:<a@example.test>", 250)
            primary.script = {"greeting": Close()}
            for _ in range(THRESHOLD):
                await send(running)
            assert running.pool.avoided
            await holder.command(b"RSET", 250)
            await eventually(lambda: "0 active, 1 idle" in repr(running.pool))
            await send(running)
        assert [len(primary.accepted), len(spare.accepted)] == [1, THRESHOLD]


async def test_who_waits_in_vain_for_one_that_is_full_goes_to_the_next(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        upstreams = pair(primary, spare, lease_wait_timeout="100ms")
        async with start(0, upstreams=upstreams) as running, Client(running.port) as holder:
            await holder.ehlo()
            await holder.command(b"MAIL FROM:<a@example.test>", 250)
            primary.script = {"greeting": TOO_MANY}
            for _ in range(THRESHOLD):
                assert codes(await send(running)) == [250, 250, 354, 250]
            assert not running.pool.avoided
        assert [len(primary.accepted), len(spare.accepted)] == [0, THRESHOLD]


async def test_a_login_of_the_relay_that_is_refused_opens_it(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.users = {"relay": "changed"}
        keys = {"username": "relay", "password": "sesame"}
        async with start(0, upstreams=pair(primary, spare, **keys)) as running:
            for _ in range(THRESHOLD):
                assert codes(await send(running)) == [250, 250, 354, 250]
            assert running.pool.avoided
            assert len(primary.connections) == THRESHOLD, "no more guesses than that"


@pytest.mark.parametrize("action", [Close(), b"535 5.7.8 no\r\n", b"454 4.7.0 later\r\n"], ids=str)
async def test_a_client_cannot_open_it_by_what_it_logs_in_with(
    start: Any, upstream: ScriptedUpstream, action: Action
) -> None:
    upstream.users = {"ann": "sesame"}
    clients = {"auth": "passthrough", "auth_without_tls": True}
    async with start(upstream.port, clients=clients) as running:
        upstream.script = {"AUTH": action}
        for number in range(THRESHOLD + 2):
            async with Client(running.port, source=f"127.0.0.{number + 2}") as client:
                await client.ehlo()
                reply = await client.command(b"AUTH PLAIN AGFubgB3cm9uZw==")
                assert reply.code in (454, 535)
        assert not running.pool.avoided
        upstream.script = {}
        async with Client(running.port) as client:
            await client.ehlo()
            await client.command(b"AUTH PLAIN AGFubgBzZXNhbWU=", 235)
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert codes(replies) == [250, 250, 354, 250]


async def test_a_login_fails_at_once_while_it_is_open(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.users = {"ann": "sesame"}
    upstream.script = {"greeting": b"554 no service\r\n"}
    clients = {"auth": "passthrough", "auth_without_tls": True}
    async with start(upstream.port, clients=clients) as running, Client(running.port) as client:
        await client.ehlo()
        for _ in range(THRESHOLD + 2):
            await client.command(b"AUTH PLAIN AGFubgBzZXNhbWU=", 454)
        assert len(upstream.connections) == THRESHOLD


async def test_all_are_down_and_come_back(start: Any) -> None:
    async with scripted(2) as (primary, spare):
        primary.unlisten()
        spare.unlisten()
        async with start(0, upstreams=pair(primary, spare)) as running:
            async with Client(running.port) as client:
                await client.ehlo()
                for _ in range(2 * THRESHOLD):
                    reply = await client.command(b"MAIL FROM:<a@example.test>")
                    assert str(reply).startswith("451 4.4.1 The upstream server cannot be reached now")
                ready, lines = running.relay.readiness()
                assert ready, "a fleet taken out of rotation helps nobody"
                assert [", next try in " in line for line in lines] == [True, True]
                await primary.listen()
                await spare.listen()
                look(running, LONGEST_PAUSE)
                pools = running.relay.upstreams.pools.values()
                await eventually(lambda: not any(pool.avoided for pool in pools))
                replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
                assert codes(replies) == [250, 250, 354, 250]
            assert running.metric("messages_total", upstream="spare", outcome="unavailable") == 2 * THRESHOLD
            assert running.rows()[0]["upstream"] == "primary"


async def test_one_upstream_alone_has_a_breaker_too(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"greeting": b"554 no service\r\n"}
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for _ in range(10):
            await client.command(b"MAIL FROM:<a@example.test>", 451)
        assert len(upstream.connections) == THRESHOLD
        upstream.script = {}
        look(running, LONGEST_PAUSE)
        await eventually(lambda: not running.pool.avoided)
        await client.command(b"MAIL FROM:<a@example.test>", 250)


async def test_those_who_wait_for_room_fail_with_the_upstream(start: Any, upstream: ScriptedUpstream) -> None:
    """The permits that come free while the upstream is down are of no use to anybody."""
    held = asyncio.Event()
    upstream.script = {"greeting": Delay(held, b"554 no service\r\n")}
    limits = {"max_connections": 3, "lease_wait_timeout": "1h"}
    clients = [Client(0) for _ in range(10)]
    started = start(upstream.port, upstream={**limits, "connect_timeout": "10s"})
    upstream.unlisten()  # the start gets no connection, and one failure
    async with started as running:
        await upstream.listen()
        for client in clients:
            client.port = running.port
            await client.__aenter__()
            await client.ehlo()
            await client.send(b"MAIL FROM:<a@example.test>\r\n")
        await eventually(lambda: "3 connecting, 7 waiting" in repr(running.pool), lambda: running.pool)
        held.set()
        for client in clients:
            await client.expect(451)
            await client.__aexit__()
        assert len(upstream.connections) == 3
        await nothing_left(running)


# Much at once


async def test_upstreams_that_come_and_go_cost_no_message_and_double_none(start: Any) -> None:
    """2,000 messages while both upstreams refuse, close, drop at MAIL and recover, again and again."""
    messages, applications = 2000, 20
    dice = random.Random(20261123)
    faults: list[dict[str, Any]] = [
        {},
        {"greeting": b"421 4.3.2 busy\r\n"},
        {"MAIL": Close()},
        {"MAIL": b"421 4.3.2 going\r\n"},
        {"EHLO": Close()},
        {"RCPT": Close(b"421 4.3.2 going\r\n")},
    ]
    told: dict[str, int] = {}

    async def application(number: int, running: Running) -> None:
        for turn in range(messages // applications):
            sender = f"{number}.{turn}@example.test"
            for _ in range(500):
                async with Client(running.port, source=f"127.0.0.{number + 2}") as client:
                    await client.ehlo()
                    replies = await client.message(
                        sender, ["b@example.test"], CONTENT, pipelined=bool(turn % 2)
                    )
                told[sender] = replies[-1].code
                if told[sender] == 250:
                    break
                await asyncio.sleep(0.01)

    async def weather(running: Running, upstreams: list[ScriptedUpstream]) -> None:
        while True:
            for upstream in upstreams:
                upstream.script = dice.choice(faults)
                if dice.random() < 0.3:
                    for connection in upstream.open_connections:
                        if not connection.messages or connection.messages[-1].complete:
                            connection.wire.abort()
            await asyncio.sleep(0.02)
            look(running, dice.choice([0.0, LONGEST_PAUSE]))

    async with scripted(2, keep_content=False) as upstreams:
        both = [configured(name, each) for name, each in zip(("one", "two"), upstreams, strict=True)]
        async with start(0, upstreams=both) as running:
            changing = asyncio.create_task(weather(running, upstreams))
            await asyncio.gather(*(application(number, running) for number in range(applications)))
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
            rows = running.rows()
            await eventually(
                lambda: all(pool.transactions == 0 for pool in running.relay.upstreams.pools.values())
            )
    assert set(told.values()) == {250}
    assert len(told) == messages
    had = {
        name: [message.reverse_path.decode().strip("<>") for message in each.accepted]
        for name, each in zip(("one", "two"), upstreams, strict=True)
    }
    assert not set(had["one"]) & set(had["two"])
    assert sorted(had["one"] + had["two"]) == sorted(told), "each message once"
    assert sorted((row["sender"], row["upstream"]) for row in rows) == sorted(
        (sender, name) for name, senders in had.items() for sender in senders
    )
    assert min(len(senders) for senders in had.values()) > messages / 20
    assert not any(each.violations for each in upstreams)
