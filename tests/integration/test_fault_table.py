"""The fault table: the upstream fails at every stage in every way; what the client hears, what is counted.

Each line of TABLE is run against a live relay. At the stages of a transaction each is run four times: the
client sends its commands one by one or MAIL to DATA in one piece (RFC 2920), to an upstream that has
PIPELINING or has not. For each:

- the client hears the reply of the line, at the command of the line, and no 2yz after it;
- exactly one message is counted, with the outcome of the line; there is no row;
- the session goes on: once the upstream has recovered, the next message on it passes, with its row, over the
  connection that the line names: `same` (kept, since it saw nothing but clean replies) or `new`.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.content import stuff
from tests.support.upstream import (
    EXTENSIONS,
    AfterOctets,
    Close,
    Garbage,
    HalfReply,
    Reset,
    ScriptedUpstream,
    Silence,
    StopReading,
)
from tests.support.watch import counted, eventually, nothing_left, outcomes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from tests.conftest import Running
    from tests.support.client import Reply

# stage       | failure      | heard at    | reply                              | outcome     | next message
#
# A reply in quotes is the upstream's own, every octet; else it is the relay's: code and enhanced code.
#
# Not in the table, since they cannot be:
#   connect by 4yz, 5yz, 421, garbage, half a reply: TCP has no replies; what comes first is the greeting.
#   body by silence of an upstream that reads on: it owes no reply there; that is end of data by silence.
TABLE = """
connect       | refused      | MAIL        | 451 4.4.1                          | unavailable | new
connect       | silence      | MAIL        | 451 4.4.1                          | unavailable | new
connect       | close        | MAIL        | 451 4.4.1                          | unavailable | new
connect       | reset        | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | 4yz          | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | 5yz          | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | 421          | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | close        | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | reset        | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | silence      | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | garbage      | MAIL        | 451 4.4.1                          | unavailable | new
greeting      | half a reply | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | 4yz          | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | 5yz          | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | 421          | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | close        | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | reset        | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | silence      | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | garbage      | MAIL        | 451 4.4.1                          | unavailable | new
EHLO          | half a reply | MAIL        | 451 4.4.1                          | unavailable | new
STARTTLS      | not offered  | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | 4yz          | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | 5yz          | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | 421          | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | close        | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | reset        | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | silence      | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | garbage      | MAIL        | 451 4.7.0                          | unavailable | new
STARTTLS      | half a reply | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | not offered  | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | 4yz          | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | 5yz          | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | 421          | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | close        | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | reset        | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | silence      | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | garbage      | MAIL        | 451 4.7.0                          | unavailable | new
AUTH          | half a reply | MAIL        | 451 4.7.0                          | unavailable | new
MAIL          | 4yz          | MAIL        | "450 4.7.9 not now"                | deferred    | same
MAIL          | 5yz          | MAIL        | "550 5.7.9 never"                  | rejected    | same
MAIL          | 421          | MAIL        | "451 4.3.2 going down"             | unavailable | new
MAIL          | close        | MAIL        | 451 4.4.2                          | unavailable | new
MAIL          | reset        | MAIL        | 451 4.4.2                          | unavailable | new
MAIL          | silence      | MAIL        | 451 4.4.2                          | unavailable | new
MAIL          | garbage      | MAIL        | 451 4.4.2                          | unavailable | new
MAIL          | half a reply | MAIL        | 451 4.4.2                          | unavailable | new
MAIL          | 354          | MAIL        | 451 4.4.2                          | unavailable | new
RCPT          | 4yz          | RCPT        | "450 4.7.9 not now"                | deferred    | same
RCPT          | 5yz          | RCPT        | "550 5.7.9 never"                  | rejected    | same
RCPT          | 421          | RCPT        | "451 4.3.2 going down"             | unavailable | new
RCPT          | close        | RCPT        | 451 4.4.2                          | unavailable | new
RCPT          | reset        | RCPT        | 451 4.4.2                          | unavailable | new
RCPT          | silence      | RCPT        | 451 4.4.2                          | unavailable | new
RCPT          | garbage      | RCPT        | 451 4.4.2                          | unavailable | new
RCPT          | half a reply | RCPT        | 451 4.4.2                          | unavailable | new
RCPT          | 354          | RCPT        | 451 4.4.2                          | unavailable | new
DATA          | 4yz          | DATA        | "450 4.7.9 not now"                | deferred    | same
DATA          | 5yz          | DATA        | "550 5.7.9 never"                  | rejected    | same
DATA          | 421          | DATA        | "451 4.3.2 going down"             | unavailable | new
DATA          | close        | DATA        | 451 4.4.2                          | unavailable | new
DATA          | reset        | DATA        | 451 4.4.2                          | unavailable | new
DATA          | silence      | DATA        | 451 4.4.2                          | unavailable | new
DATA          | garbage      | DATA        | 451 4.4.2                          | unavailable | new
DATA          | half a reply | DATA        | 451 4.4.2                          | unavailable | new
DATA          | 250          | DATA        | 451 4.4.2                          | unavailable | new
body          | 4yz          | end_of_data | 451 4.4.2                          | unavailable | new
body          | 5yz          | end_of_data | 451 4.4.2                          | unavailable | new
body          | 421          | end_of_data | "451 4.3.2 going down"             | unavailable | new
body          | close        | end_of_data | 451 4.4.2                          | unavailable | new
body          | reset        | end_of_data | 451 4.4.2                          | unavailable | new
body          | not read     | end_of_data | 451 4.4.2                          | unavailable | new
body          | garbage      | end_of_data | 451 4.4.2                          | unavailable | new
body          | half a reply | end_of_data | 451 4.4.2                          | unavailable | new
body          | 250          | end_of_data | 451 4.4.2                          | unavailable | new
end_of_data   | 4yz          | end_of_data | "450 4.7.9 not now"                | deferred    | same
end_of_data   | 5yz          | end_of_data | "550 5.7.9 never"                  | rejected    | same
end_of_data   | 421          | end_of_data | "451 4.3.2 going down"             | deferred    | new
end_of_data   | close        | end_of_data | 451 4.4.2                          | in_doubt    | new
end_of_data   | reset        | end_of_data | 451 4.4.2                          | in_doubt    | new
end_of_data   | silence      | end_of_data | 451 4.4.2                          | in_doubt    | new
end_of_data   | garbage      | end_of_data | 451 4.4.2                          | in_doubt    | new
end_of_data   | half a reply | end_of_data | 451 4.4.2                          | in_doubt    | new
end_of_data   | 354          | end_of_data | 451 4.4.2                          | in_doubt    | new
"""

FAILURES = {
    "250": b"250 2.0.0 fine\r\n",
    "354": b"354 go ahead\r\n",
    "4yz": b"450 4.7.9 not now\r\n",
    "5yz": b"550 5.7.9 never\r\n",
    "421": Close(b"421 4.3.2 going down\r\n"),
    "close": Close(),
    "reset": Reset(),
    "silence": Silence(),
    "garbage": Garbage(),
    "half a reply": HalfReply(),
    "not read": StopReading(),
}
"""What the upstream does at the stage; `refused`, `not offered` and connect's `silence` are made below."""

WAIT = "200ms"
"""Every wait for the upstream, in the cells where it is silent; the others never come near their waits."""

HANDSHAKE = ("connect", "greeting", "EHLO", "STARTTLS", "AUTH")
STEPS = ("MAIL", "RCPT", "DATA", "end_of_data")

CONTENT = b"Subject: one\r\n\r\n.a line with a dot\r\n"
MEDIUM = b"Subject: medium\r\n\r\n" + (b"x" * 998 + b"\r\n") * 100
"""So many octets that some go up before the end of data."""
LARGE = b"Subject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 20_000
"""More octets than all socket buffers on the way take: what is not read comes to a halt."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    stage: str
    failure: str
    heard_at: str
    reply: str
    outcome: str
    connection: str

    @property
    def silent(self) -> bool:
        return self.failure in ("silence", "not read")

    @property
    def in_transaction(self) -> bool:
        return self.stage not in HANDSHAKE


LINES = [Line(*(cell.strip() for cell in line.split("|"))) for line in TABLE.strip().splitlines()]
HANDSHAKE_LINES = [line for line in LINES if not line.in_transaction]
TRANSACTION_LINES = [line for line in LINES if line.in_transaction]


def names(lines: Sequence[Line]) -> list[str]:
    return [f"{line.stage}-{line.failure}".replace(" ", "_") for line in lines]


@pytest.mark.parametrize("line", HANDSHAKE_LINES, ids=names(HANDSHAKE_LINES))
async def test_the_upstream_fails_in_the_handshake(line: Line, start: Any, tmp_path: Path) -> None:
    certificates = Certificates()
    over: dict[str, Any] = {"connect_timeout": WAIT} if line.silent else {}
    upstream = ScriptedUpstream()
    if line.stage in ("STARTTLS", "AUTH"):
        upstream.tls = certificates.server()
        over |= {"tls": "starttls", "ca_file": str(certificates.write_authority(tmp_path / "ca.pem"))}
    if line.stage == "AUTH":
        upstream.users = {"relay": "geheim"}
        over |= {"username": "relay", "password": "geheim"}
    async with upstream, contextlib.AsyncExitStack() as failing:
        fail_in_handshake(upstream, line, failing)
        async with start(upstream.port, upstream=over) as running, Client(running.port) as client:
            await client.ehlo()
            check(line, await transaction(client, CONTENT, pipelined=False))
            await client.command("RSET", 250)
            await counted(running, **{line.outcome: 1})
            assert running.rows() == []
            assert upstream.messages == []
            await failing.aclose()
            await next_message_passes(client, running, upstream, line)
            client.close()
            await nothing_left(running)


@pytest.mark.parametrize("pipelined", [False, True], ids=["one_by_one", "pipelined"])
@pytest.mark.parametrize("extensions", [EXTENSIONS, ("8BITMIME",)], ids=["to_pipelining", "to_one_by_one"])
@pytest.mark.parametrize("line", TRANSACTION_LINES, ids=names(TRANSACTION_LINES))
async def test_the_upstream_fails_in_the_transaction(
    line: Line, extensions: Sequence[str], pipelined: bool, start: Any
) -> None:
    over = {"reply_timeout": WAIT, "end_of_data_timeout": WAIT} if line.silent else {}
    async with ScriptedUpstream(extensions=extensions) as upstream:
        async with start(upstream.port, upstream=over) as running, Client(running.port) as client:
            failure = FAILURES[line.failure]
            upstream.script = {line.stage: AfterOctets(1, failure) if line.stage == "body" else failure}

            async def noticed() -> None:
                """Let the relay learn of a failure in the body before the client goes on."""
                if line.stage == "body" and not line.silent:
                    await eventually(lambda: "0 active, 0 idle" in repr(running.pool))

            await client.ehlo()
            content = CONTENT
            if line.stage == "body":
                content = LARGE if line.failure == "not read" else MEDIUM
            check(line, await transaction(client, content, pipelined=pipelined, halfway=noticed))
            await client.command("RSET", 250)
            await counted(running, **{line.outcome: 1})
            assert running.rows() == []
            assert bool(upstream.messages) == (line.stage == "end_of_data")
            upstream.script = {}
            if line.stage == "MAIL" and pipelined and "PIPELINING" in extensions:
                # What went up behind the MAIL was out of sequence: servers count such errors.
                line = replace(line, connection="new")
            await next_message_passes(client, running, upstream, line)
            assert outcomes(running) == {line.outcome: 1, "accepted": 1}
            client.close()
            await nothing_left(running)
        assert upstream.violations == []


def fail_in_handshake(upstream: ScriptedUpstream, line: Line, failing: contextlib.AsyncExitStack) -> None:
    """Make the upstream fail, from before the relay starts until `failing` is closed."""
    users, tls = upstream.users, upstream.tls

    def recover() -> None:
        upstream.script, upstream.users, upstream.tls = {}, users, tls

    failing.callback(recover)
    if line.failure == "not offered":
        upstream.users = {}
        upstream.tls = None if line.stage == "STARTTLS" else tls
    elif line.failure == "refused" or (line.stage, line.failure) == ("connect", "silence"):
        upstream.unlisten()
        failing.push_async_callback(upstream.listen)
        if line.failure == "silence":
            never_answer(upstream.port, failing)
    else:
        upstream.script = {line.stage: FAILURES[line.failure]}


def never_answer(port: int, failing: contextlib.AsyncExitStack) -> None:
    """Fill the queue of a listener, so that the kernel drops every further SYN as if nobody were there."""
    deaf = failing.enter_context(socket.socket())
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    deaf.bind(("127.0.0.1", port))
    deaf.listen(0)
    for _ in range(4):
        waiting = failing.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(("127.0.0.1", port))


async def nothing_to_wait_for() -> None:
    """Go on at once."""


async def transaction(
    client: Client,
    content: bytes,
    *,
    pipelined: bool,
    halfway: Callable[[], Awaitable[None]] = nothing_to_wait_for,
) -> list[Reply]:
    """Run a transaction as far as it goes; return the replies to MAIL, RCPT, DATA and the end of data."""
    commands = [b"MAIL FROM:<a@example.test>", b"RCPT TO:<b@example.test>", b"DATA"]
    if pipelined:
        await client.send(b"".join(command + b"\r\n" for command in commands))
        replies = await client.replies(len(commands))
    else:
        replies = []
        for command in commands:
            replies.append(await client.command(command))
            if replies[-1].code >= 400:
                return replies
    if replies[-1].code == 354:
        wire = stuff(content) + b".\r\n"
        half = len(wire) // 2
        await client.send(wire[:half])
        await halfway()
        await client.send(wire[half:])
        replies.append(await client.reply())
    return replies


def check(line: Line, replies: list[Reply]) -> None:
    """Compare what the client heard with the line: the reply in its place, nothing positive from there on."""
    place = STEPS.index(line.heard_at)
    if line.failure == "garbage" and line.in_transaction:
        # Replies that arrive in one piece with garbage are not believed either: it may come sooner.
        place = min(place, [reply.code >= 400 for reply in replies].index(True))
    assert [reply.code for reply in replies[:place]] == [250, 250, 354][:place]
    assert all(400 <= reply.code < 600 for reply in replies[place:])
    heard = replies[place]
    if line.reply.startswith('"'):
        assert heard.raw.decode() == line.reply.strip('"') + "\r\n"
    else:
        code, enhanced = line.reply.split()
        assert (str(heard.code), heard.text.split()[0]) == (code, enhanced)
        assert "upstream" in heard.text, "a reply of the relay's own says whose fault it is"


async def next_message_passes(
    client: Client, running: Running, upstream: ScriptedUpstream, line: Line
) -> None:
    before = len(upstream.connections)
    if line.connection == "same":
        # The relay says RSET on it first; in the meantime a message would get another one.
        await eventually(lambda: " 0 active, 1 idle" in repr(running.pool))
    replies = await client.message("a@example.test", ["b@example.test"], CONTENT)
    assert [reply.code for reply in replies] == [250, 250, 354, 250]
    (accepted,) = upstream.accepted
    assert accepted.content == CONTENT
    (used,) = (each for each in upstream.connections if accepted in each.messages)
    assert used.number == before - 1 if line.connection == "same" else used.number >= before
    (row,) = running.rows()
    assert row["upstream_reply"].startswith("250 2.0.0 accepted")
