"""How upstream connections are shared, kept, replaced and given up, as clients and the upstream see it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client, bdat
from tests.support.upstream import CHUNKING, Close, Delay, Garbage, HalfReply, Reset, ScriptedUpstream
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Running
    from tests.support.upstream import Connection

MAIL = b"MAIL FROM:<a@example.test>"
RCPT = b"RCPT TO:<b@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"


async def send(running: Running, count: int = 1, *, pipelined: bool = False) -> None:
    """Send messages in one session; each must pass without the client noticing anything."""
    async with Client(running.port) as client:
        await client.ehlo()
        for _ in range(count):
            replies = await client.message("a@example.test", ["b@example.test"], CONTENT, pipelined=pipelined)
            assert [reply.code for reply in replies] == [250, 250, 354, 250]
        await client.quit()


def verbs(connection: Connection) -> list[str]:
    return [command.verb for command in connection.commands]


def messages(upstream: ScriptedUpstream) -> list[int]:
    """How many messages each connection has carried."""
    return [sum(message.accepted for message in each.messages) for each in upstream.connections]


async def idle(running: Running, count: int) -> None:
    pool = running.pool
    await eventually(lambda: f": 0 active, {count} idle, 0 connecting" in repr(pool), lambda: pool)


def look(running: Running, seconds: float) -> None:
    """Let the pool look at its connections as if it were so many seconds later."""
    running.pool.sweep(asyncio.get_running_loop().time() + seconds)


# Reuse


async def test_messages_of_many_sessions_share_one_connection(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port) as running:
        for _ in range(5):
            await send(running, 2)
    assert messages(upstream) == [10]
    assert verbs(upstream.connections[0]) == ["EHLO", *["MAIL", "RCPT", "DATA"] * 10, "QUIT"]


async def test_the_connection_that_came_back_last_is_taken_first(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """So that those which are not needed lie idle and go."""
    async with start(upstream.port) as running, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(running.port)) for _ in range(3)]
        for client in clients:
            await client.ehlo()
            await client.command(MAIL, 250)
        assert len(upstream.connections) == 3
        for back, number in enumerate((0, 2, 1), start=1):
            await clients[number].command("RSET", 250)
            await eventually(lambda: f", {back} idle" in repr(running.pool))  # noqa: B023
        await send(running, 2)
        assert messages(upstream) == [0, 2, 0]


# The bound


async def test_no_more_connections_than_allowed_however_many_clients(start: Any) -> None:
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, len(upstream.open_connections))

    async with ScriptedUpstream({"MAIL": count}) as upstream:
        bounded = {"max_connections": 5, "lease_wait_timeout": "1m"}
        async with start(upstream.port, upstream=bounded) as running:
            await asyncio.gather(*(send(running) for _ in range(50)))
            await counted(running, accepted=50)
            await nothing_left(running)
    assert most == 5
    assert len(upstream.connections) == 5
    assert sum(messages(upstream)) == len(upstream.accepted) == 50


async def test_who_waits_too_long_for_a_connection_hears_451(start: Any, upstream: ScriptedUpstream) -> None:
    bounded = {"max_connections": 1, "lease_wait_timeout": "50ms"}
    async with (
        start(upstream.port, upstream=bounded) as running,
        Client(running.port) as first,
        Client(running.port) as second,
    ):
        await first.ehlo()
        await second.ehlo()
        await first.command(MAIL, 250)
        assert (await second.command(MAIL, 451)).text.startswith("4.3.2 ")
        await counted(running, unavailable=1)
        await first.command("RSET", 250)
        await idle(running, 1)
        await second.command(MAIL, 250)
    assert len(upstream.connections) == 1


async def test_waiters_are_served_in_order(start: Any, upstream: ScriptedUpstream) -> None:
    bounded = {"max_connections": 1, "lease_wait_timeout": "1m"}
    async with start(upstream.port, upstream=bounded) as running, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(running.port)) for _ in range(4)]
        for number, client in enumerate(clients):
            await client.ehlo()
            await client.send(b"MAIL FROM:<%d@example.test>\r\n" % number)
            if number:
                await eventually(lambda: f"{number} waiting" in repr(running.pool))  # noqa: B023
        for client in clients:
            await client.expect(250)
            await client.command("RSET", 250)
        mails = [line for line in upstream.connections[0].lines if line.startswith(b"MAIL")]
        assert mails == [b"MAIL FROM:<%d@example.test>" % number for number in range(4)]


async def test_who_stops_waiting_costs_nobody_a_connection(start: Any, upstream: ScriptedUpstream) -> None:
    bounded = {"max_connections": 1, "lease_wait_timeout": "1m"}
    async with start(upstream.port, upstream=bounded) as running:
        async with Client(running.port) as first, Client(running.port) as second:
            await first.ehlo()
            await first.command(MAIL, 250)
            await second.ehlo()
            await second.send(MAIL + b"\r\n")
            await eventually(lambda: "1 waiting" in repr(running.pool))
            second.reset()
            await eventually(lambda: "0 waiting" in repr(running.pool))
            await first.command("RSET", 250)
            await first.quit()
        await send(running)
        assert messages(upstream) == [1]
        await counted(running, aborted=2, accepted=1)


# Retirement


async def test_a_connection_is_retired_by_count(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, upstream={"max_messages": 2}) as running:
        await send(running, 5)
        assert messages(upstream) == [2, 2, 1]
        await upstream.wait_for(lambda: len(upstream.open_connections) == 1)
    assert all(verbs(connection)[-1] == "QUIT" for connection in upstream.connections)


async def test_a_worn_connection_is_not_handed_to_who_waits(start: Any, upstream: ScriptedUpstream) -> None:
    limits = {"max_connections": 1, "max_messages": 1}
    async with start(upstream.port, upstream=limits) as running, Client(running.port) as first:
        await first.ehlo()
        await first.command(MAIL, 250)
        async with Client(running.port) as second:
            await second.ehlo()
            second.send_unread(MAIL + b"\r\n")
            await eventually(lambda: "1 waiting" in repr(running.pool))
            await first.command("RSET", 250)
            await second.expect(250)
    assert [verbs(each).count("MAIL") for each in upstream.connections] == [1, 1]


async def test_a_connection_is_retired_by_age(start: Any, upstream: ScriptedUpstream) -> None:
    settings = {"max_age": "5m", "idle_timeout": "1h"}
    async with start(upstream.port, upstream=settings) as running:
        await send(running)
        look(running, 299)
        await send(running)
        assert messages(upstream) == [2]
        look(running, 301)
        await upstream.wait_for(lambda: not upstream.open_connections)
        await send(running)
        assert messages(upstream) == [2, 1]


async def test_a_connection_in_use_grows_old_in_peace(start: Any, upstream: ScriptedUpstream) -> None:
    settings = {"max_age": "5m", "idle_timeout": "1h", "reply_timeout": "1h"}
    answer = asyncio.Event()
    upstream.script = {"end_of_data": [Delay(answer)]}
    async with start(upstream.port, upstream=settings) as running:
        sending = asyncio.create_task(send(running))
        await upstream.message()
        look(running, 301)
        answer.set()
        await sending
        assert messages(upstream) == [1]


@pytest.mark.parametrize(
    ("limits", "carried"),
    [
        ("LIMITS MAILMAX=2", [2, 2, 1]),
        ("limits RCPTMAX=5 mailmax=2", [2, 2, 1]),
        ("LIMITS MAILMAX=1000", [4, 1]),
        ("LIMITS MAILMAX=0", [4, 1]),
        ("LIMITS MAILMAX=two", [4, 1]),
        ("LIMITS", [4, 1]),
    ],
)
async def test_the_upstreams_own_limit_of_transactions_counts(
    limits: str, carried: list[int], start: Any, upstream: ScriptedUpstream
) -> None:
    """RFC 9422: what it says that it takes in one session; the smaller of both holds."""
    upstream.extensions.append(limits)
    async with start(upstream.port, upstream={"max_messages": 4}) as running:
        await send(running, 5)
        assert messages(upstream) == carried


async def test_an_idle_connection_is_retired_in_time(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, upstream={"idle_timeout": "60s"}) as running:
        await send(running)
        look(running, 59)
        await send(running)
        assert messages(upstream) == [2]
        look(running, 61)
        await upstream.wait_for(lambda: not upstream.open_connections)
        await send(running)
        assert messages(upstream) == [2, 1]
        assert verbs(upstream.connections[0])[-1] == "QUIT"


# Replacement: an idle connection is found dead, the client does not notice, one message arrives

DEATHS = {
    "close": Close(),
    "reset": Reset(),
    "421": Close(b"421 4.4.2 idle for too long\r\n"),
    "421 and stays": b"421 4.4.2 idle for too long\r\n",
    "garbage": Garbage(),
    "half a reply": HalfReply(),
}


@pytest.mark.parametrize("pipelined", [False, True], ids=["one_by_one", "pipelined"])
@pytest.mark.parametrize("earlier", [0, 1], ids=["from_the_start", "used_before"])
@pytest.mark.parametrize("death", DEATHS)
async def test_an_idle_connection_found_dead_at_mail_is_replaced_unseen(
    death: str, earlier: int, pipelined: bool, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running:
        await send(running, earlier)
        upstream.script = {"MAIL": [DEATHS[death]]}
        await send(running, pipelined=pipelined)
        assert messages(upstream) == [earlier, 1]
        await counted(running, accepted=earlier + 1)
        assert len(running.rows()) == earlier + 1


@pytest.mark.parametrize("death", ["close", "reset", "421", "garbage", "half a reply"])
async def test_a_connection_that_dies_while_idle_is_not_used(
    death: str, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running:
        await send(running)
        connection = upstream.connections[0]
        match DEATHS[death]:
            case Close(reply):
                connection.say(reply)
                connection.close()
            case Reset():
                connection.reset()
            case Garbage(octets) | HalfReply(octets):
                connection.say(octets)
        await idle(running, 0)
        await send(running)
        assert messages(upstream) == [1, 1]
        assert verbs(connection) == ["EHLO", "MAIL", "RCPT", "DATA"]


async def test_every_idle_connection_dead_is_still_one_new_connection(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """The replacement is opened anew: other idle ones are as old, and would cost the client a wait each."""
    async with start(upstream.port) as running, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(running.port)) for _ in range(3)]
        for client in clients:
            await client.ehlo()
            await client.command(MAIL, 250)
        for client in clients:
            await client.quit()
        await idle(running, 3)
        upstream.script = {"MAIL": [Close()]}
        await send(running)
        assert messages(upstream) == [0, 0, 0, 1]


async def test_a_new_connection_that_fails_at_mail_is_not_tried_again(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {"MAIL": Close()}
        await client.ehlo()
        await client.command(MAIL, 451)
        assert len(upstream.connections) == 2, "the idle one of the start, and one new one"
        await counted(running, unavailable=1)


@pytest.mark.parametrize("stage", ["RCPT", "DATA"])
async def test_a_connection_lost_after_mail_is_not_replaced(
    stage: str, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await send(running)
        upstream.script = {stage: [Close()]}
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert replies[["MAIL", "RCPT", "DATA"].index(stage)].text.startswith("4.4.2 ")
        assert len(upstream.connections) == 1


@pytest.mark.parametrize(
    "verdict",
    [
        Close(b"250 2.0.0 taken\r\n"),
        Reset(b"250 2.0.0 taken\r\n"),
        b"250 2.0.0 taken\r\n421 4.3.2 and good bye\r\n",
        b"250 2.0.0 taken\r\n250 2.0.0 twice\r\n",
        b"250 2.0.0 taken\r\nwhat is this\r\n",
        b"250-2.0.0 taken\r\n250 by two lines\r\n",
        b"299 2.0.0 taken\r\n",
    ],
    ids=["close", "reset", "421_behind", "reply_behind", "garbage_behind", "two_lines", "299"],
)
async def test_accepted_means_accepted_whatever_comes_behind(
    verdict: Any, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {"end_of_data": [verdict]}
        await client.ehlo()
        first = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert first[-1].code in (250, 299)
        assert "2.0.0 taken" in first[-1].text
        second = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert second[-1].code == 250
        await counted(running, accepted=2)
        assert len(running.rows()) == 2
        assert len(upstream.messages) == 2


async def test_what_comes_behind_a_verdict_answers_no_mail_that_waits_behind_it(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """The client has sent its next MAIL already: a connection that runs ahead of it does not get that."""
    upstream.script = {
        "end_of_data": [b"550 5.7.1 no\r\n250 2.1.0 ahead of you\r\n"],
        "MAIL": [None, b"450 4.7.1 later\r\n"],
    }
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for command in (MAIL, RCPT, b"DATA"):
            await client.command(command)
        await client.send(CONTENT + b".\r\n" + MAIL + b"\r\n")
        assert [reply.code for reply in await client.replies(2)] == [550, 450]
        assert len(upstream.connections) == 2


# RSET: only where a transaction is open on the connection, or may be

#            | what the client says                                  | script                          | RSET
ENDS = {
    "accepted": ((MAIL, RCPT, b"DATA", CONTENT + b"."),                {},                               0),
    "verdict":  ((MAIL, RCPT, b"DATA", CONTENT + b"."),                {"end_of_data": b"550 no\r\n"},   1),
    "MAIL":     ((MAIL,),                                              {"MAIL": b"550 no\r\n"},          0),
    "RCPT":     ((MAIL, RCPT, b"RSET"),                                {"RCPT": b"550 no\r\n"},          1),
    "DATA":     ((MAIL, RCPT, b"DATA", b"RSET"),                       {"DATA": b"450 no\r\n"},          1),
    "RSET":     ((MAIL, RCPT, b"RSET"),                                {},                               1),
    "EHLO":     ((MAIL, RCPT, b"EHLO client.test"),                    {},                               1),
    "QUIT":     ((MAIL, RCPT, b"QUIT"),                                {},                               1),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
async def test_rset_goes_up_only_where_a_transaction_is_open(
    end: str, start: Any, upstream: ScriptedUpstream
) -> None:
    said, script, resets = ENDS[end]
    async with start(upstream.port) as running:
        upstream.script = script
        async with Client(running.port) as client:
            await client.ehlo()
            for line in said:
                await client.command(line)
        await idle(running, 1)
        assert verbs(upstream.connections[0]).count("RSET") == resets
        upstream.script = {}
        await send(running)
        assert len(upstream.connections) == 1


@pytest.mark.parametrize("answer", [b"451 4.3.0 no\r\n", *DEATHS.values()], ids=["451", *DEATHS])
async def test_a_connection_that_fails_at_rset_is_given_up_unseen(
    answer: Any, start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {"RSET": answer}
        await client.ehlo()
        await client.command(MAIL, 250)
        await client.command("RSET", 250)
        await idle(running, 0)
        await send(running)
        assert messages(upstream) == [0, 1]
        assert outcomes(running) == {"aborted": 1, "accepted": 1}


REFUSED_RESETS = {**DEATHS, "451": b"451 4.3.0 no\r\n", "502": b"502 5.5.1 no\r\n"}


@pytest.mark.parametrize("way", ["DATA", "BDAT"])
@pytest.mark.parametrize("answer", [None, *REFUSED_RESETS])
async def test_who_comes_behind_a_refused_message_waits_for_no_rset(
    answer: str | None, way: str, start: Any, upstream: ScriptedUpstream
) -> None:
    """The next message has the connection before RSET is answered; if that fails, another one, unseen."""
    seen = asyncio.Event()
    upstream.extensions += CHUNKING
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {
            "end_of_data": [b"550 5.7.1 no\r\n"],
            "RSET": [Delay(seen, REFUSED_RESETS.get(answer or ""))],
        }
        await client.ehlo()
        refused = await client.message("a@example.test", ["b@example.test"], CONTENT)
        assert [reply.code for reply in refused] == [250, 250, 354, 550]
        await client.send(MAIL + b"\r\n" + RCPT + b"\r\n")
        if way == "BDAT":
            await client.send(bdat(CONTENT, last=True))
        await eventually(lambda: ": 1 active, 0 idle, 0 connecting" in repr(running.pool))
        seen.set()
        assert [reply.code for reply in await client.replies(2)] == [250, 250]
        if way == "DATA":
            await client.command(b"DATA", 354)
            await client.send(CONTENT + b".\r\n")
        await client.expect(250)
        assert messages(upstream) == ([1] if answer is None else [0, 1])
        assert outcomes(running) == {"rejected": 1, "accepted": 1}


# What the upstream refuses, and may count


async def test_a_connection_that_heard_no_three_times_in_a_row_is_not_used_again(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {"RCPT": b"550 5.1.1 nobody\r\n"}
        await client.ehlo()
        for _ in range(7):
            await client.command(MAIL, 250)
            await client.command(RCPT, 550)
            await client.command("RSET", 250)
            await eventually(lambda: ": 0 active" in repr(running.pool), lambda: running.pool)
        assert [verbs(each).count("MAIL") for each in upstream.connections] == [3, 3, 1]
        assert [verbs(each)[-2:] for each in upstream.connections[:2]] == [["RCPT", "QUIT"]] * 2


async def test_an_accepted_message_makes_up_for_what_was_refused(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        for _ in range(4):
            upstream.script = {"RCPT": b"550 5.1.1 nobody\r\n"}
            await client.command(MAIL, 250)
            await client.command(RCPT, 550)
            await client.command(RCPT, 550)
            await client.command("RSET", 250)
            await idle(running, 1)
            upstream.script = {}
            await send(running)
        assert messages(upstream) == [4]


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504])
async def test_a_connection_that_was_told_of_wrong_syntax_is_not_used_again(
    code: int, start: Any, upstream: ScriptedUpstream
) -> None:
    """Exim ends a connection at the fourth such error, whoever made them and whatever passed in between."""
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 250)
        upstream.script = {"RCPT": b"%d malformed address\r\n" % code}
        await client.command(RCPT, code)
        upstream.script = {}
        await client.command(RCPT, 250)
        await client.command("DATA", 354)
        await client.command(CONTENT + b".", 250)
        await send(running)
        assert messages(upstream) == [1, 1]


def counting(limit: int) -> dict[str, Any]:
    """Return the script of an upstream that ends a session at so many refusals, and forgets none."""
    refused: Counter[Connection] = Counter()

    def rcpt(stage: str, line: bytes, connection: Connection) -> Any:
        del stage
        if b"nobody" not in line:
            return None
        refused[connection] += 1
        if refused[connection] < limit:
            return b"550 5.1.1 nobody\r\n"
        return Close(b"421 4.5.0 Too many errors, bye\r\n")

    return {"RCPT": rcpt}


async def partly_refused(running: Running, refused: int = 1) -> list[int]:
    """Send a message to one recipient after so many unknown ones, from a client of its own."""
    recipients = ["nobody@example.test"] * refused + ["b@example.test"]
    async with Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", recipients, CONTENT, pipelined=False)
        await client.quit()
    return [reply.code for reply in replies]


async def test_where_refusals_are_counted_no_client_meets_those_of_another(
    start: Any, upstream: ScriptedUpstream
) -> None:
    """chasquid ends a session at its third error, whatever it accepts in between."""
    upstream.script = counting(3)
    async with start(upstream.port) as running:
        assert await partly_refused(running) == [250, 550, 250, 354, 250]
        assert await partly_refused(running) == [250, 550, 250, 354, 250]
        assert (await partly_refused(running))[:3] == [250, 451, 451], "the one by which it is known"
        for refused in (1, 2, 1, 2, 2):
            assert await partly_refused(running, refused) == [250, *[550] * refused, 250, 354, 250]
        assert messages(upstream) == [2, 1, 1, 1, 1, 1]
        await send(running, 2)
        assert messages(upstream) == [2, 1, 1, 1, 1, 1, 2]


async def test_what_lies_idle_with_a_refusal_ends_once_those_are_counted(
    start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = counting(2)
    async with start(upstream.port) as running:
        async with Client(running.port) as one, Client(running.port) as other:
            for client in (one, other):
                await client.ehlo()
                await client.command(MAIL, 250)
            for client in (one, other):
                await client.command(b"RCPT TO:<nobody@example.test>", 550)
                await client.command("RSET", 250)
            await idle(running, 2)
            await one.command(MAIL, 250)
            await one.command(b"RCPT TO:<nobody@example.test>", 451)
            await idle(running, 0)
        assert await partly_refused(running) == [250, 550, 250, 354, 250]
        assert sorted(verbs(each)[-1] for each in upstream.connections) == ["QUIT", "QUIT", "RCPT"]


@pytest.mark.parametrize(
    "first",
    [
        pytest.param([Close(b"421 4.3.2 closing\r\n")], id="for no refusal"),
        pytest.param([b"550 5.1.1 nobody\r\n"] * 2 + [Close(b"421 4.7.0 errors\r\n")], id="for its own"),
    ],
)
async def test_a_session_that_ends_for_other_reasons_says_nothing_of_refusals(
    first: list[Any], start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running, Client(running.port) as client:
        upstream.script = {"RCPT": first}
        await client.ehlo()
        await client.command(MAIL, 250)
        for _ in first[1:]:
            await client.command(RCPT, 550)
        await client.command(RCPT, 451)
        await client.command("RSET", 250)
        upstream.script = counting(9)
        for _ in range(3):
            assert await partly_refused(running) == [250, 550, 250, 354, 250]
        assert messages(upstream)[-1] == 3


# What the pool shows


async def test_the_gauges_show_the_pool(start: Any, upstream: ScriptedUpstream) -> None:
    def gauges(running: Running) -> Sequence[float]:
        look(running, 0)
        return [
            running.metric("upstream_connections", upstream="primary", state=state)
            for state in ("idle", "active", "connecting")
        ]

    async with start(upstream.port) as running, Client(running.port) as client:
        assert gauges(running) == [1, 0, 0]
        await client.ehlo()
        await client.command(MAIL, 250)
        assert gauges(running) == [0, 1, 0]
        upstream.script = {"greeting": Delay(asyncio.Event())}
        async with Client(running.port) as other:
            await other.ehlo()
            await other.send(MAIL + b"\r\n")
            await eventually(lambda: gauges(running) == [0, 1, 1])
