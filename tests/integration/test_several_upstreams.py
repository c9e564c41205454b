"""Several upstreams behind one relay: who gets a message, what EHLO offers, draining, changed settings."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client
from tests.support.several import configured, look, scripted, transactions, verbs
from tests.support.upstream import CHUNKING, EXTENSIONS, Close, Delay, ScriptedUpstream
from tests.support.watch import eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.settings import Settings
    from tests.conftest import Running
    from tests.support.client import Reply

CONTENT = b"Subject: one\r\n\r\ntext\r\n"
MAIL = b"MAIL FROM:<a@example.test>"


def codes(replies: list[Reply]) -> list[int]:
    return [reply.code for reply in replies]


async def send(running: Running, sender: str = "a@example.test", *, source: str = "", port: int = 0) -> str:
    """Send a message in a session of its own; return the upstream that the row names."""
    async with Client(port or running.port, source=source) as client:
        await client.ehlo()
        replies = await client.message(sender, ["b@example.test"], CONTENT)
        assert codes(replies) == [250, 250, 354, 250]
    return str(running.rows()[-1]["upstream"])


def readiness(running: Running) -> dict[str, str]:
    """Return what /readyz says of each upstream."""
    lines = [line for line in running.relay.readiness()[1] if line.startswith("upstream ")]
    return dict(line.removeprefix("upstream ").split(": ", 1) for line in lines)  # type: ignore[arg-type]


# Who gets a message


async def test_the_lowest_priority_gets_it(start: Any) -> None:
    async with scripted(3) as (last, first, middle):
        upstreams = [
            configured("last", last, priority=30),
            configured("first", first, priority=1),
            configured("middle", middle, priority=20),
        ]
        async with start(0, upstreams=upstreams) as running:
            assert [await send(running) for _ in range(3)] == ["first"] * 3
        assert transactions(middle) + transactions(last) == 0


async def test_equals_share_by_weight(start: Any) -> None:
    async with scripted(2) as (one, three):
        upstreams = [configured("one", one), configured("three", three, weight=3)]
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            running.relay.upstreams._random = Random(1)
            await client.ehlo()
            for _ in range(200):
                await client.message("a@example.test", ["b@example.test"], CONTENT)
            assert len(running.rows()) == 200
        # The seed makes it certain; six standard deviations are 37.
        assert abs(len(three.accepted) - 150) <= 37
        assert len(one.accepted) + len(three.accepted) == 200


BY_KEY: dict[str, tuple[dict[str, list[str]], str, str]] = {
    "sender": ({"sender_domain": ["example.com"]}, "a@example.com", "a@example.net"),
    "bounces": ({"sender_domain": ["<>"]}, "", "a@example.net"),
    "task type": ({"task_type": ["digest"]}, "digest@example.com", "a@example.com"),
}


@pytest.mark.parametrize("key", BY_KEY)
async def test_what_mail_says_chooses(start: Any, key: str) -> None:
    match, fitting, other = BY_KEY[key]
    rules = {"rules": [{"sender": "digest@example.com", "type": "digest"}]}
    async with scripted(2) as (general, special):
        upstreams = [configured("general", general), configured("special", special, match=match)]
        async with start(0, upstreams=upstreams, task_type=rules) as running:
            assert await send(running, fitting) == "special"
            assert await send(running, other) == "general"


async def test_the_default_type_is_known_at_mail_where_no_header_tells(start: Any) -> None:
    types = {"headers": [], "default": "plain", "rules": [{"sender": "digest@example.com", "type": "digest"}]}
    async with scripted(2) as (general, special):
        upstreams = [
            configured("general", general),
            configured("special", special, match={"task_type": ["plain"]}),
        ]
        async with start(0, upstreams=upstreams, task_type=types) as running:
            assert await send(running) == "special"
            assert await send(running, "digest@example.com") == "general"


async def test_the_client_chooses(start: Any) -> None:
    async with scripted(2) as (general, special):
        upstreams = [
            configured("general", general),
            configured("special", special, match={"client": ["127.0.0.0/24", "!127.0.0.3"]}),
        ]
        async with start(0, upstreams=upstreams) as running:
            assert await send(running, source="127.0.0.2") == "special"
            assert await send(running, source="127.0.0.3") == "general"
            assert await send(running, source="127.0.1.2") == "general"


async def test_the_listener_chooses(start: Any, tmp_path: Any) -> None:
    listeners = [{"address": "127.0.0.1:0"}, {"address": "[::1]:0"}]
    async with scripted(2) as (general, special):
        upstreams = [
            configured("general", general),
            configured("special", special, match={"listener": ["127.0.0.1:0"]}),
        ]
        async with start(0, upstreams=upstreams, listeners=listeners) as running:
            assert await send(running) == "special"
            port = int(running.relay.reception.addresses[1].rpartition(":")[2])
            async with Client(port, host="::1") as client:
                await client.ehlo()
                assert codes(await client.message("a@x.test", ["b@x.test"], CONTENT)) == [250, 250, 354, 250]
            assert running.rows()[-1]["upstream"] == "general"


async def test_the_general_one_stands_in_and_exclusion_keeps_mail_off_it(start: Any) -> None:
    async with scripted(2) as (general, special):
        special.script = {"greeting": b"554 closed\r\n"}
        mine = configured("special", special, match={"sender_domain": ["bulk.test", "news.test"]})
        others = configured("general", general, match={"sender_domain": ["!news.test"]})
        async with start(0, upstreams=[others, mine]) as running:
            assert await send(running, "a@bulk.test") == "general"
            async with Client(running.port) as client:
                await client.ehlo()
                await client.command(b"MAIL FROM:<a@news.test>", 451)
        assert len(general.accepted) == 1


async def test_nobody_fits(start: Any, upstream: ScriptedUpstream) -> None:
    upstreams = [configured("special", upstream, match={"sender_domain": ["example.com"]})]
    async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
        await client.ehlo()
        reply = await client.command(MAIL)
        assert str(reply) == "451 4.4.4 No upstream server takes this message now, try again later"
        replies = await client.message("a@example.com", ["b@example.test"], CONTENT)
        assert codes(replies) == [250, 250, 354, 250]
        assert running.metric("messages_total", upstream="none", outcome="unavailable") == 1


# By recipient: MAIL is held until the first RCPT


def by_recipient(one: ScriptedUpstream, general: ScriptedUpstream) -> list[dict[str, Any]]:
    return [
        configured("one", one, match={"recipient_domain": ["one.test", "*.one.test"]}),
        configured("general", general),
    ]


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
@pytest.mark.parametrize("extensions", [EXTENSIONS, EXTENSIONS[1:]], ids=["pipelining", "not pipelining"])
async def test_the_first_recipient_chooses(start: Any, pipelined: bool, extensions: tuple[str, ...]) -> None:
    async with scripted(2, extensions=extensions) as (one, general):
        async with start(0, upstreams=by_recipient(one, general)) as running, Client(running.port) as client:
            await client.ehlo()
            replies = await client.message(
                "a@x.test", ["b@one.test", "c@a.one.test"], CONTENT, pipelined=pipelined
            )
            assert codes(replies) == [250, 250, 250, 354, 250]
            assert str(replies[0]) == "250 2.1.0 Ok", "ours"
            replies = await client.message("a@x.test", ["b@two.test"], CONTENT, pipelined=pipelined)
            assert codes(replies) == [250, 250, 354, 250]
            assert [row["upstream"] for row in running.rows()] == ["one", "general"]
        assert verbs(one) == ["MAIL", "RCPT", "RCPT", "DATA"]
        assert verbs(general) == ["MAIL", "RCPT", "DATA"]
        assert not one.violations + general.violations


async def test_mail_is_held_only_where_a_recipient_is_needed(start: Any) -> None:
    async with scripted(2) as (one, general):
        match = {"recipient_domain": ["one.test"], "sender_domain": ["example.com"]}
        general.script = {"MAIL": b"250 2.1.5 theirs\r\n"}
        upstreams = [configured("one", one, match=match), configured("general", general)]
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            await client.ehlo()
            assert str(await client.command(b"MAIL FROM:<a@example.net>")) == "250 2.1.5 theirs"
            await client.command(b"RSET", 250)
            assert str(await client.command(b"MAIL FROM:<a@example.com>")) == "250 2.1.0 Ok"
            assert transactions(one) == 0
            await client.command(b"RSET", 250)
            await nothing_left_but(running, client)
            assert outcomes(running, ["one", "general", "none"]) == {"aborted": 2}
            assert running.metric("messages_total", upstream="none", outcome="aborted") == 1


async def nothing_left_but(running: Running, client: Client) -> None:
    """Wait until only the session of `client` is left, with nothing under way."""
    await client.command(b"NOOP", 250)
    services = running.relay.reception.services
    await eventually(lambda: not services.running and not services.settling)


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
@pytest.mark.parametrize("extensions", [EXTENSIONS, EXTENSIONS[1:]], ids=["pipelining", "not pipelining"])
@pytest.mark.parametrize(
    ("said", "outcome"), [(b"550 5.7.1 not you\r\n", "rejected"), (b"450 4.2.0 later\r\n", "deferred")]
)
async def test_a_refused_mail_is_the_answer_to_every_rcpt(
    start: Any, pipelined: bool, extensions: tuple[str, ...], said: bytes, outcome: str
) -> None:
    async with scripted(2, extensions=extensions) as (one, general):
        one.script = {"MAIL": [said]}
        async with start(0, upstreams=by_recipient(one, general)) as running, Client(running.port) as client:
            await client.ehlo()
            lines = [MAIL, b"RCPT TO:<b@one.test>", b"RCPT TO:<c@one.test>", b"RCPT TO:<d@one.test>"]
            if pipelined:
                await client.send(b"\r\n".join(lines) + b"\r\n")
                replies = await client.replies(len(lines))
            else:
                replies = [await client.command(line) for line in lines]
            assert replies[0].code == 250
            assert [reply.raw for reply in replies[1:]] == [said] * 3
            assert (await client.command(b"DATA")).code >= 400
            await client.command(b"RSET", 250)
            await nothing_left_but(running, client)
            assert outcomes(running, ["one", "general", "none"]) == {outcome: 1}
            assert running.metric("recipients_total", upstream="one", outcome=outcome) == 3
            replies = await client.message("a@x.test", ["b@one.test"], CONTENT, pipelined=pipelined)
            assert codes(replies) == [250, 250, 354, 250]
            # As good as before, unless something went up behind the MAIL: that was out of sequence.
            assert len(one.connections) == 1 + ("PIPELINING" in extensions)
        assert transactions(general) == 0
        assert not one.violations


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
async def test_a_recipient_of_another_route_comes_in_a_message_of_its_own(
    start: Any, pipelined: bool
) -> None:
    async with scripted(2) as (one, general):
        upstreams = by_recipient(one, general)
        upstreams[1]["match"] = {"recipient_domain": ["!one.test"]}
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            await client.ehlo()
            replies = await client.message(
                "a@x.test", ["b@one.test", "c@two.test", "d@one.test"], CONTENT, pipelined=pipelined
            )
            assert codes(replies) == [250, 250, 452, 250, 354, 250]
            assert str(replies[2]) == (
                "452 4.5.3 This recipient takes another route: send it in a message of its own"
            )
            (row,) = running.rows()
            assert row["upstream"] == "one"
            assert '"c@two.test"' in row["data"]
            found = running.rows("SELECT recipient FROM task_done_recipient ORDER BY ordinal")
            assert [each["recipient"] for each in found] == ["b@one.test", "d@one.test"]
        assert one.accepted[0].recipients == [b"<b@one.test>", b"<d@one.test>"]
        assert transactions(general) == 0


async def test_a_recipient_that_the_general_one_takes_goes_along_with_those_before(start: Any) -> None:
    async with scripted(2) as (one, general):
        async with start(0, upstreams=by_recipient(one, general)) as running, Client(running.port) as client:
            await client.ehlo()
            replies = await client.message("a@x.test", ["c@two.test", "b@one.test"], CONTENT)
            assert codes(replies) == [250, 250, 250, 354, 250]
        assert len(general.accepted) == 1
        assert transactions(one) == 0


@pytest.mark.parametrize("chunks", [False, True], ids=["DATA", "BDAT"])
async def test_a_recipient_without_any_route(start: Any, upstream: ScriptedUpstream, chunks: bool) -> None:
    upstream.extensions += CHUNKING
    upstreams = [configured("one", upstream, match={"recipient_domain": ["one.test"]})]
    async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 250)
        reply = await client.command(b"RCPT TO:<c@two.test>", 451)
        assert reply.text.startswith("4.4.4 ")
        await client.command(b"BDAT 0 LAST" if chunks else b"DATA", 554)
        await client.command(b"RSET", 250)
        assert running.metric("messages_total", upstream="none", outcome="unavailable") == 1
        assert running.metric("recipients_total", upstream="none", outcome="unavailable") == 1
        assert transactions(upstream) == 0
        replies = await client.message("a@x.test", ["c@two.test", "b@one.test"], CONTENT)
        assert codes(replies) == [250, 451, 250, 354, 250]
        assert running.metric("recipients_total", upstream="one", outcome="deferred") == 1
        assert running.metric("recipients_total", upstream="one", outcome="accepted") == 1


@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "pipelined"])
async def test_a_held_message_moves_on_without_those_who_may_not(start: Any, pipelined: bool) -> None:
    async with scripted(2) as (one, two):
        one.script = {"MAIL": b"421 4.3.2 not now\r\n"}
        upstreams = [
            configured("one", one, priority=1, match={"recipient_domain": ["one.test", "both.test"]}),
            configured("two", two, priority=2, match={"recipient_domain": ["both.test"]}),
        ]
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            await client.ehlo()
            replies = await client.message(
                "a@x.test", ["b@both.test", "c@one.test", "d@both.test"], CONTENT, pipelined=pipelined
            )
            assert codes(replies) == [250, 250, 452, 250, 354, 250]
            assert running.rows()[0]["upstream"] == "two"
        assert two.accepted[0].recipients == [b"<b@both.test>", b"<d@both.test>"]
        assert one.messages == []


async def test_nobody_can_be_had_for_a_held_message(start: Any) -> None:
    async with scripted(2) as (one, general):
        one.script = general.script = {"greeting": b"554 no\r\n"}
        async with start(0, upstreams=by_recipient(one, general)) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command(MAIL, 250)
            await client.command(b"RCPT TO:<b@one.test>", 451)
            await client.command(b"RCPT TO:<b@two.test>", 451)
            await client.command(b"DATA", 451)
            await client.command(b"QUIT", 221)
            assert running.metric("messages_total", upstream="general", outcome="unavailable") == 1


# EHLO


async def test_ehlo_offers_what_all_can_do(start: Any) -> None:
    async with scripted(3) as (small, large, away):
        small.extensions = ["PIPELINING", "8BITMIME", "SIZE 1000", "DSN", "LIMITS RCPTMAX=50"]
        large.extensions = ["8BITMIME", "SIZE 5000", "SMTPUTF8", "DSN", "LIMITS RCPTMAX=70 RCPTDOMAINMAX=9"]
        away.extensions = []
        away.unlisten()
        upstreams = [configured("small", small), configured("large", large), configured("away", away)]
        async with start(0, upstreams=upstreams) as running, Client(running.port) as client:
            await client.ehlo()
            assert client.extensions == {
                "PIPELINING": "", "SIZE": "1000", "8BITMIME": "", "DSN": "",
                "LIMITS": "RCPTDOMAINMAX=9 RCPTMAX=50",
            }  # fmt: skip


async def test_ehlo_is_about_those_that_the_client_may_be_routed_to(start: Any) -> None:
    async with scripted(3, extensions=("8BITMIME", "DSN", "SMTPUTF8")) as (general, special, drained):
        special.extensions = ["8BITMIME"]
        drained.extensions = []
        upstreams = [
            configured("general", general),
            configured("special", special, match={"client": ["127.0.0.2"], "sender_domain": ["x.test"]}),
            configured("drained", drained, weight=0),
        ]
        async with start(0, upstreams=upstreams) as running:
            for source, offered in (("127.0.0.1", True), ("127.0.0.2", False)):
                async with Client(running.port, source=source) as client:
                    await client.ehlo()
                    assert ("DSN" in client.extensions) is offered
                    assert "8BITMIME" in client.extensions


# Pass-through


USERS = {"ann": "sesame"}
LOGIN = b"AUTH PLAIN AGFubgBzZXNhbWU="  # ann, sesame


async def test_credentials_go_to_one_upstream_and_so_does_the_mail(start: Any) -> None:
    async with scripted(2) as (first, decides):
        decides.users = dict(USERS)
        decides.extensions = ["8BITMIME"]
        clients = {"auth": "passthrough", "auth_without_tls": True, "allow": ["127.0.0.9/32"]}
        clients["passthrough_to"] = "decides"
        upstreams = [configured("first", first, priority=1), configured("decides", decides, priority=2)]
        async with start(0, upstreams=upstreams, clients=clients) as running:
            async with Client(running.port) as client:
                await client.ehlo()
                assert "DSN" not in client.extensions, "its mail goes by the one that decides"
                await client.command(LOGIN, 235)
                replies = await client.message("a@x.test", ["b@x.test"], CONTENT)
                assert codes(replies) == [250, 250, 354, 250]
                decides.script = {"MAIL": Close(b"421 4.3.2 going\r\n"), "greeting": b"554 no\r\n"}
                await client.command(MAIL, 451)
            assert await send(running, source="127.0.0.9") == "first"
            assert [row["upstream"] for row in running.rows()] == ["decides", "first"]
        assert not [entry for entry in first.log if getattr(entry, "verb", "") == "AUTH"]
        assert transactions(first) == 1


# Draining


async def test_a_drained_upstream_gets_nothing_and_says_so(start: Any) -> None:
    async with scripted(2) as (drained, other):
        upstreams = [configured("drained", drained, priority=1, weight=0), configured("other", other)]
        async with start(0, upstreams=upstreams) as running:
            assert await send(running) == "other"
            assert readiness(running) == {"drained": "drained", "other": "up"}
            assert running.metric("upstream_drained", upstream="drained") == 1
            assert running.metric("upstream_drained", upstream="other") == 0
        assert drained.connections == []


# Settings that change


@pytest.fixture
def changed(settings_for: Callable[..., Settings]) -> Callable[..., Settings]:
    """Return a maker of the settings that a reload finds."""
    return lambda *upstreams, **over: settings_for(0, upstreams=list(upstreams), **over)


async def test_a_new_upstream_is_used_at_once(start: Any, changed: Any) -> None:
    async with scripted(2) as (old, new):
        async with start(0, upstreams=[configured("old", old)]) as running:
            assert await send(running) == "old"
            before = running.pool
            running.relay.upstreams.apply(changed(configured("old", old), configured("new", new, priority=1)))
            assert running.relay.upstreams.pools["old"] is before
            assert await send(running) == "new"
            assert running.metric("messages_total", upstream="new", outcome="accepted") == 1
        assert len(old.connections) == 1, "unchanged: it keeps its connection"


async def test_a_message_under_way_ends_where_it_began(start: Any, changed: Any) -> None:
    async with scripted(2) as (old, new):  # noqa: SIM117  the port is known only inside
        async with start(0, upstreams=[configured("old", old)]) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command(MAIL, 250)
            running.relay.upstreams.apply(changed(configured("new", new)))
            assert await send(running) == "new"
            assert readiness(running) == {"new": "up", "old": "draining, 1 transactions"}
            assert running.metric("upstream_drained", upstream="old") == 1
            await client.command(b"RCPT TO:<b@example.test>", 250)
            await client.command(b"DATA", 354)
            await client.send(CONTENT + b".\r\n")
            await client.expect(250)
            assert running.rows()[-1]["upstream"] == "old"
            await eventually(lambda: not old.open_connections)
            assert readiness(running) == {"new": "up"}
            replies = await client.message("a@x.test", ["b@x.test"], CONTENT)
            assert codes(replies) == [250, 250, 354, 250], "the session goes on"
            look(running)
            assert list(running.relay.upstreams._leaving) == [], "nothing is kept of it"


async def test_one_that_was_at_rest_is_looked_after_when_a_message_from_before_needs_it(
    start: Any, changed: Any
) -> None:
    async with scripted(2) as (old, new):
        by_recipient = configured("old", old, match={"recipient_domain": ["example.test"]})
        both = [by_recipient, configured("new", new)]
        async with start(0, upstreams=both) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command(MAIL, 250)  # its recipients say where it goes
            running.relay.upstreams.apply(changed(configured("new", new)))
            await eventually(lambda: not (look(running), running.relay.upstreams._leaving)[1])
            await client.command(b"RCPT TO:<b@example.test>", 250)
            assert readiness(running) == {"new": "up", "old": "draining, 1 transactions"}
            look(running)
            assert [pool.name for pool in running.relay.upstreams._leaving] == ["old"]
            await client.command(b"DATA", 354)
            await client.send(CONTENT + b".\r\n")
            await client.expect(250)
            assert running.rows()[-1]["upstream"] == "old"
            await eventually(lambda: not (look(running), running.relay.upstreams._leaving)[1])


@pytest.mark.parametrize("under_way", [False, True])
async def test_of_an_upstream_that_was_taken_out_the_end_is_told(
    start: Any, changed: Any, capsys: pytest.CaptureFixture[str], under_way: bool
) -> None:
    async with scripted(2) as (old, new):  # noqa: SIM117  the port is known only inside
        async with start(0, upstreams=[configured("old", old)]) as running, Client(running.port) as client:
            await send(running)
            if under_way:
                await client.ehlo()
                await client.command(MAIL, 250)
            look(running)
            state = "active" if under_way else "idle"
            assert running.metric("upstream_connections", upstream="old", state=state) == 1
            running.relay.upstreams.apply(changed(configured("new", new)))
            if under_way:
                look(running)
                await client.command(b"RSET", 250)
            await eventually(lambda: not old.open_connections)

            def none_left() -> bool:
                look(running)
                states = ("idle", "active", "connecting")
                return not any(
                    running.metric("upstream_connections", upstream="old", state=each) for each in states
                )

            await eventually(none_left)
            await asyncio.sleep(0)  # lines are written at the end of a turn
            assert capsys.readouterr().out.count('"event":"upstream drained","upstream":"old"') == 1


async def test_a_changed_upstream_is_connected_to_anew(start: Any, changed: Any) -> None:
    async with (
        scripted(2) as (old, new),
        start(0, upstreams=[configured("primary", old)]) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        await client.command(MAIL, 250)
        running.relay.upstreams.apply(changed(configured("primary", new)))
        await send(running)
        assert len(new.accepted) == 1
        assert readiness(running) == {"primary": "draining, 1 transactions"}
        look(running)
        assert running.metric("upstream_drained", upstream="primary") == 0
        assert running.metric("upstream_connections", upstream="primary", state="active") == 0
        await client.command(b"RSET", 250)
        await eventually(lambda: not old.open_connections)


async def test_draining_by_settings_and_back(
    start: Any, changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scripted(2) as (one, other):

        def upstreams(weight: int) -> list[dict[str, Any]]:
            return [configured("one", one, priority=1, weight=weight), configured("other", other)]

        async with start(0, upstreams=upstreams(1)) as running:
            assert await send(running) == "one"
            async with Client(running.port) as client:
                await client.ehlo()
                await client.command(MAIL, 250)
                before = running.pool
                running.relay.upstreams.apply(changed(*upstreams(0)))
                assert running.pool is before
                assert readiness(running)["one"] == "draining, 1 transactions"
                assert await send(running) == "other"
                await client.command(b"RSET", 250)
            await eventually(lambda: not one.open_connections)
            assert readiness(running)["one"] == "drained"
            look(running)
            look(running)
            await asyncio.sleep(0)  # lines are written at the end of a turn
            assert capsys.readouterr().out.count('"event":"upstream drained","upstream":"one"') == 1
            running.relay.upstreams.apply(changed(*upstreams(1)))
            assert readiness(running)["one"] == "up"
            assert running.metric("upstream_drained", upstream="one") == 0
            assert await send(running) == "one"


async def test_who_waits_for_a_drained_upstream_still_gets_it(start: Any, changed: Any) -> None:
    async with scripted(2) as (one, other):
        limits = {"max_connections": 1, "lease_wait_timeout": "10s"}
        async with (
            start(0, upstreams=[configured("one", one, **limits)]) as running,
            Client(running.port) as first,
            Client(running.port, source="127.0.0.2") as second,
        ):
            await first.ehlo()
            await second.ehlo()
            await first.command(MAIL, 250)
            await second.send(MAIL + b"\r\n")
            await eventually(lambda: running.pool._shares.waiting)
            leaving = running.pool
            running.relay.upstreams.apply(changed(configured("other", other)))
            assert leaving.transactions == 2
            await first.command(b"RSET", 250)
            await second.expect(250)
            assert transactions(one) == 2
            await second.command(b"RSET", 250)
            await eventually(lambda: not one.open_connections)


async def test_an_upstream_that_comes_back_while_it_is_left(start: Any, changed: Any) -> None:
    async with scripted(2) as (one, other):  # noqa: SIM117  the port is known only inside
        async with start(0, upstreams=[configured("one", one)]) as running, Client(running.port) as client:
            await client.ehlo()
            await client.command(MAIL, 250)
            running.relay.upstreams.apply(changed(configured("other", other)))
            running.relay.upstreams.apply(changed(configured("one", one)))
            assert running.metric("upstream_drained", upstream="one") == 0
            look(running)
            assert running.metric("upstream_drained", upstream="one") == 0
            await send(running)
            await client.command(b"QUIT", 221)
            await nothing_left(running)


async def test_settings_that_cannot_be_used_change_nothing(start: Any, changed: Any, tmp_path: Any) -> None:
    async with scripted(2) as (one, other), start(0, upstreams=[configured("one", one)]) as running:
        gone = configured("other", other) | {"tls": "starttls", "ca_file": str(tmp_path / "gone.pem")}
        with pytest.raises(OSError, match=r"No such file"):
            running.relay.upstreams.apply(changed(configured("one", one, weight=1), gone))
        assert list(running.relay.upstreams.pools) == ["one"]
        assert await send(running) == "one"


async def test_credentials_go_nowhere_once_nobody_decides_about_them(start: Any, changed: Any) -> None:
    async with scripted(2) as (decides, other):
        decides.users = dict(USERS)
        clients = {"auth": "passthrough", "auth_without_tls": True}
        async with (
            start(0, upstreams=[configured("decides", decides)], clients=clients) as running,
            Client(running.port) as client,
        ):
            await client.ehlo()
            await client.command(LOGIN, 235)
            running.relay.upstreams.apply(changed(configured("other", other)))
            reply = await client.command(MAIL, 451)
            assert reply.text.startswith("4.4.4 ")
        assert not [entry for entry in other.log if getattr(entry, "verb", "") == "AUTH"]


async def test_reload_after_reload_under_load_loses_nothing(start: Any, changed: Any) -> None:
    """Messages keep going while upstreams are added, changed, drained and taken out."""
    async with scripted(3) as servers:
        named = [configured(f"u{number}", server) for number, server in enumerate(servers)]
        dice, done, sent = Random(7), asyncio.Event(), 0

        async def application(running: Running, number: int) -> None:
            nonlocal sent
            async with Client(running.port, source=f"127.0.0.{number + 2}") as client:
                await client.ehlo()
                for turn in range(60):
                    replies = await client.message(f"{number}.{turn}@x.test", ["b@x.test"], CONTENT)
                    assert codes(replies) == [250, 250, 354, 250]
                    sent += 1

        async with start(0, upstreams=named) as running:

            async def reloads() -> None:
                while not done.is_set():
                    chosen = dice.sample(named, dice.randint(1, 3))
                    found = [
                        each | {"priority": dice.randint(1, 3), "max_messages": dice.choice([3, 100])}
                        for each in chosen
                    ]
                    found[-1]["weight"] = 1 if len(found) == 1 else dice.randint(0, 1)
                    running.relay.upstreams.apply(changed(*found))
                    await asyncio.sleep(0.05)

            changing = asyncio.create_task(reloads())
            await asyncio.gather(*(application(running, number) for number in range(8)))
            done.set()
            await changing
            rows = running.rows()
        assert sent == len(rows) == 480
        had = [
            (m.reverse_path.decode().strip("<>"), f"u{n}") for n, s in enumerate(servers) for m in s.accepted
        ]
        assert sorted(had) == sorted((row["sender"], row["upstream"]) for row in rows)
        assert not any(server.violations for server in servers)


async def test_a_slow_upstream_does_not_keep_the_others_from_being_known(start: Any) -> None:
    async with scripted(2) as (slow, quick):
        held = asyncio.Event()
        slow.script = {"greeting": Delay(held)}
        upstreams = [configured("slow", slow, connect_timeout="200ms"), configured("quick", quick)]
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with start(0, upstreams=upstreams) as running:
            assert loop.time() - began < 10
            assert "DSN" in running.relay.upstreams.pools["quick"].capabilities
            assert readiness(running)["quick"] == "up"
        held.set()
