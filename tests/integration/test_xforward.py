"""XFORWARD: each message carries its own client's attributes, on connections that clients share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client
from tests.support.upstream import EXTENSIONS, Close, Garbage, Reset, ScriptedUpstream
from tests.support.watch import counted, eventually, nothing_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.upstream import Connection

ATTRIBUTES = "XFORWARD NAME ADDR PROTO HELO SOURCE PORT IDENT"  # as Postfix 3.7 offers it
ON = {"xforward": True}
OK = b"250 2.0.0 Ok\r\n"
REFUSED = b"550 5.7.0 Error: insufficient authorization\r\n"
MAIL = b"MAIL FROM:<a@example.test>"
CONTENT = b"Subject: one\r\n\r\ntext\r\n"


@pytest.fixture
async def server() -> AsyncIterator[ScriptedUpstream]:
    """An upstream that offers XFORWARD and takes it."""
    async with ScriptedUpstream(extensions=[*EXTENSIONS, ATTRIBUTES]) as upstream:
        yield upstream


async def send(client: Client) -> None:
    replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
    assert [reply.code for reply in replies] == [250, 250, 354, 250]


def told(line: bytes) -> dict[str, str]:
    verb, *words = line.decode("ascii").split(" ")
    assert verb == "XFORWARD"
    return dict(word.split("=") for word in words)


def verbs(connection: Connection) -> list[str]:
    return [command.verb for command in connection.commands]


def introductions(upstream: ScriptedUpstream) -> list[dict[str, str]]:
    return [
        told(command.line)
        for connection in upstream.connections
        for command in connection.commands
        if command.verb == "XFORWARD"
    ]


async def test_off_by_default(start: Any, server: ScriptedUpstream) -> None:
    async with start(server.port) as running, Client(running.port) as client:
        await client.ehlo()
        await send(client)
        assert "XFORWARD" not in client.extensions
    assert "XFORWARD" not in verbs(server.connections[0])


async def test_not_to_an_upstream_that_does_not_offer_it(start: Any, upstream: ScriptedUpstream) -> None:
    async with start(upstream.port, upstream=ON) as running, Client(running.port) as client:
        await client.ehlo()
        await send(client)
    assert "XFORWARD" not in verbs(upstream.connections[0])


async def test_two_clients_in_turn_on_one_connection(start: Any, server: ScriptedUpstream) -> None:
    async with (
        start(server.port, upstream=ON) as running,
        Client(running.port) as first,
        Client(running.port) as second,
    ):
        await first.ehlo("first.test")
        await second.greeting()
        await second.command("HELO second=+.test", 250)
        for client in (first, second, first):
            await send(client)
        await second.ehlo("third.test")
        await send(second)

        rows = running.rows()
        found = introductions(server)
    assert len(server.connections) == 1
    assert verbs(server.connections[0]) == ["EHLO", *["XFORWARD", "MAIL", "RCPT", "DATA"] * 4, "QUIT"]
    assert [each["HELO"] for each in found] == ["first.test", "second+3D+2B.test", "first.test", "third.test"]
    assert [each["PROTO"] for each in found] == ["ESMTP", "SMTP", "ESMTP", "ESMTP"]
    assert {each["ADDR"] for each in found} == {"127.0.0.1"}
    assert {each["SOURCE"] for each in found} == {"LOCAL"}
    assert {each["NAME"] for each in found} == {"[UNAVAILABLE]"}
    assert found[0]["PORT"] == found[2]["PORT"] != found[1]["PORT"] == found[3]["PORT"]
    assert [each["IDENT"] for each in found] == [row["task_id"] for row in rows]
    assert not server.violations


async def test_one_command_at_a_time_where_the_upstream_does_not_pipeline(start: Any) -> None:
    async with (
        ScriptedUpstream(extensions=["8BITMIME", "XFORWARD ADDR"]) as server,
        start(server.port, upstream=ON) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        replies = await client.message("a@example.test", ["b@example.test"], CONTENT, pipelined=True)
        assert [reply.code for reply in replies] == [250, 250, 354, 250]
        assert server.connections[0].lines[1] == b"XFORWARD ADDR=127.0.0.1"
        assert not server.violations


@pytest.mark.parametrize("extensions", [EXTENSIONS, ["8BITMIME"]], ids=["pipelined", "not pipelined"])
@pytest.mark.parametrize("refusal", [REFUSED, b"451 4.3.0 not now\r\n", b"501 5.5.4 Bad ADDR\r\n"], ids=repr)
async def test_refused_mail_goes_on_without_and_it_is_said_once_a_connection(
    refusal: bytes, extensions: list[str], start: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedUpstream({"XFORWARD": refusal}, extensions=[*extensions, ATTRIBUTES]) as server:
        settings = {"upstream": {**ON, "max_messages": 3}}
        async with start(server.port, **settings) as running, Client(running.port) as client:
            await client.ehlo()
            for _ in range(4):
                await send(client)
            await counted(running, accepted=4)
    # 501 is about the values of one client, and the next one's may do; the rest is about the command.
    tried = [3, 1] if refusal.startswith(b"501") else [1, 1]
    assert [verbs(each).count("XFORWARD") for each in server.connections] == tried
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if "xforward refused" in line]
    assert [(line["level"], line["upstream"], line["reason"]) for line in lines] == [
        ("warning", "primary", refusal.decode().rstrip())
    ] * 2


async def test_what_was_said_of_a_client_whose_mail_was_refused_is_taken_back(
    start: Any, server: ScriptedUpstream
) -> None:
    """RSET ends what XFORWARD said; a MAIL that was refused does not (XFORWARD_README, server operation)."""
    server.script = {"XFORWARD": [OK, REFUSED], "MAIL": [b"550 5.7.1 not you\r\n"]}
    async with start(server.port, upstream=ON) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command(MAIL, 550)
        await eventually(lambda: "0 active, 1 idle" in repr(running.pool))
        await send(client)
    expected = ["EHLO", "XFORWARD", "MAIL", "RSET", "XFORWARD", "MAIL", "RCPT", "DATA", "QUIT"]
    assert verbs(server.connections[0]) == expected


@pytest.mark.parametrize("end", [Close(b"421 4.3.2 bye\r\n"), Close(), Reset()], ids=repr)
@pytest.mark.parametrize("extensions", [EXTENSIONS, ["8BITMIME"]], ids=["pipelined", "not pipelined"])
async def test_an_idle_connection_that_ends_there_is_replaced_unseen(
    end: Any, extensions: list[str], start: Any
) -> None:
    script = {"XFORWARD": [OK, end]}
    async with (
        ScriptedUpstream(script, extensions=[*extensions, ATTRIBUTES]) as server,
        start(server.port, upstream=ON) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        await send(client)
        await send(client)
        await counted(running, accepted=2)
    first, second = server.connections
    assert [each.accepted for each in (*first.messages, *second.messages)].count(True) == 2
    assert verbs(second) == ["EHLO", "XFORWARD", "MAIL", "RCPT", "DATA", "QUIT"]


async def test_the_replacement_is_told_what_it_offers(start: Any) -> None:
    """The upstream has been restarted without XFORWARD: its connection must not hear the old command."""
    async with ScriptedUpstream(extensions=[*EXTENSIONS, ATTRIBUTES]) as server:

        def restart(_stage: str, _line: bytes, connection: Connection) -> Any:
            if connection.messages:
                server.extensions = list(EXTENSIONS)
                return Close(b"421 4.3.2 restarting\r\n")
            return OK

        server.script = {"XFORWARD": restart}
        async with start(server.port, upstream=ON) as running, Client(running.port) as client:
            await client.ehlo()
            await send(client)
            await send(client)
    assert verbs(server.connections[1]) == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]


@pytest.mark.parametrize(
    ("end", "heard"),
    [
        (Close(b"421 4.3.2 bye\r\n"), "451 4.3.2 bye"),
        (Close(), "451 4.4.2 The upstream server closed"),
        (b"354 go ahead\r\n", "451 4.4.2 The upstream server closed"),
        (Garbage(), "451 4.4.2 The upstream server closed"),
    ],
    ids=repr,
)
async def test_a_new_connection_that_ends_there_is_unavailable(
    end: Any, heard: str, start: Any, server: ScriptedUpstream
) -> None:
    server.script = {"XFORWARD": end}
    async with start(server.port, upstream=ON) as running, Client(running.port) as client:
        await client.ehlo()
        assert str(await client.command(MAIL, 451)).startswith(heard)
        await client.quit()
        await counted(running, unavailable=1)
        await nothing_left(running)
        assert running.rows() == []


async def test_two_replies_to_it_are_believed_neither(start: Any) -> None:
    """The second is not taken for the reply to MAIL: the upstream is out of step."""
    async with (
        ScriptedUpstream({"XFORWARD": OK + OK}, extensions=["8BITMIME", ATTRIBUTES]) as server,
        start(server.port, upstream=ON) as running,
        Client(running.port) as client,
    ):
        await client.ehlo()
        await client.command(MAIL, 451)
        await counted(running, unavailable=1)
        assert "MAIL" not in verbs(server.connections[0])


async def test_a_client_cannot_introduce_itself_as_another(start: Any, server: ScriptedUpstream) -> None:
    async with start(server.port, upstream=ON) as running, Client(running.port) as client:
        await client.ehlo()
        await client.command("XFORWARD ADDR=192.0.2.1", 500)
        await client.ehlo("x ADDR=192.0.2.1")
        await send(client)
    (line,) = [line for line in server.connections[0].lines if line.startswith(b"XFORWARD")]
    assert line.endswith(b" ADDR=127.0.0.1")
    assert b" HELO=x?ADDR+3D192.0.2.1 " in line
