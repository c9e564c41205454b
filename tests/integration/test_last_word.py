"""The last word of a session that ends while its client goes on sending: it is heard, not reset away.

The clients here block: they send all they have before they read, as most libraries do.
"""

from __future__ import annotations

import asyncio
import smtplib
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest

from relay import maillog
from relay.session import session as session_module
from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.upstream import Delay, ScriptedUpstream
from tests.support.watch import eventually, nothing_left

if TYPE_CHECKING:
    from pathlib import Path

MAIL, RCPT = b"MAIL FROM:<a@example.test>\r\n", b"RCPT TO:<b@example.test>\r\n"
DATA = b"DATA\r\n"
LARGE = b"x" * 998 + b"\r\n"
LARGE *= 20_000
"""More octets than all socket buffers on the way take."""
SOON = 1.0


def all_then_read(port: int, octets: bytes) -> list[bytes]:
    """Send everything, then read until the server closes; return the lines that came behind EHLO's reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as peer:
        peer.recv(4096)
        peer.sendall(b"HELO client.test\r\n")
        peer.recv(4096)
        peer.sendall(octets)
        said = b""
        while more := peer.recv(4096):
            said += more
    return said.splitlines()


@pytest.mark.parametrize(
    ("octets", "said"),
    [
        (MAIL + RCPT + b"DATA\r\n" + LARGE, [b"250 2.1.0", b"550 5.1.1", b"554 5.5.0"]),
        (MAIL + RCPT + LARGE.replace(b"\r\n", b""), [b"250 2.1.0", b"550 5.1.1", b"500 5.5.2"]),
        (b"BDAT 20000000 LAST\r\n" + LARGE, [b"502 5.5.1"]),
        (b"GET / HTTP/1.1\r\n" + LARGE, [b"554 5.5.1"]),
    ],
    ids=["behind DATA", "an endless line", "a chunk", "HTTP"],
)
async def test_who_is_out_of_step_hears_it(
    octets: bytes, said: list[bytes], start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RCPT": b"550 5.1.1 no\r\n"}
    async with start(upstream.port) as running:
        lines = await asyncio.to_thread(all_then_read, running.port, octets)
        assert [line[:9] for line in lines] == said
        await nothing_left(running)


BY_TYPE = {"limits": [{"scope": "sender", "task_type": "mention", "max": 100, "per": "1d"}]}
BY_RECIPIENT = {"upstream": {"match": {"recipient_domain": ["example.test"]}}}


@pytest.mark.parametrize(
    ("settings", "waits", "groups", "codes"),
    [
        ({}, "RCPT", [MAIL + RCPT, DATA], [550, 503, 503, 554]),
        (BY_TYPE, "RCPT", [MAIL + RCPT + DATA], [550, 503, 503, 554]),
        (BY_RECIPIENT, "RCPT", [MAIL + RCPT, DATA], [250, 550, 550, 554]),
        ({}, "MAIL", [MAIL, DATA], [550, 503, 554]),
    ],
    ids=["MAIL refused", "the relay's own 354", "a route by recipient", "no RCPT"],
)
async def test_what_comes_before_the_reply_to_data_is_never_taken_for_commands(
    settings: Any,
    waits: str,
    groups: list[bytes],
    codes: list[int],
    start: Any,
    upstream: ScriptedUpstream,
) -> None:
    """Also where it is known already what DATA is answered, while replies before that are waited for."""
    answer = asyncio.Event()
    replies = {"MAIL": b"550 5.1.0 not you\r\n", "RCPT": b"503 5.5.1 MAIL first\r\n"}
    upstream.script = replies | {waits: Delay(answer, replies[waits])}
    async with start(upstream.port, **settings) as running, Client(running.port) as client:
        await client.ehlo()
        (session,) = running.relay.reception._sessions
        dialogue = session._dialogue
        for group in groups:
            await client.send(group)
            await eventually(lambda: dialogue._transaction is not None)
            course = dialogue._transaction.course
            await eventually(lambda: course.mail_refused or waits == "MAIL")  # noqa: B023  awaited here
        await eventually(lambda: len(dialogue._replies.owed) == 2)
        await client.send(MAIL.replace(b"<a@", b"<text@") + b"QUIT\r\n.\r\n")
        await eventually(lambda: dialogue.over)
        answer.set()
        assert [(await client.reply()).code for _ in codes] == codes
        await client.expect_eof()
        await nothing_left(running)
    assert "text@" not in upstream.transcript()


@pytest.mark.parametrize("mode", ["none", "implicit"])
async def test_a_message_far_too_large_is_told_so(
    mode: str, start: Any, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    authority = Certificates()
    cert, key = authority.write_server(tmp_path)
    listeners = [{"address": "127.0.0.1:0", "tls": mode}]
    tls = {"cert": str(cert), "key": str(key)}

    def send(port: int, context: ssl.SSLContext) -> tuple[int, bytes]:
        smtp: smtplib.SMTP
        if mode == "implicit":
            smtp = smtplib.SMTP_SSL("localhost", port, timeout=15, context=context)
        else:
            smtp = smtplib.SMTP("localhost", port, timeout=15)
        smtp.ehlo()
        smtp.mail("a@example.test")  # smtplib's `sendmail` says SIZE; other clients do not
        smtp.rcpt("b@example.test")
        try:
            return smtp.data(LARGE)
        finally:
            smtp.close()

    server = {"max_message_size": "1MiB"}
    async with start(upstream.port, server=server, listeners=listeners, tls=tls) as running:
        code, text = await asyncio.to_thread(send, running.port, authority.client())
        assert (code, text[:6]) == (552, b"5.3.4 ")
        await nothing_left(running)
        assert upstream.messages == []


async def test_who_stays_is_closed_on_and_who_never_ends_is_cut(
    start: Any, upstream: ScriptedUpstream
) -> None:
    async with start(upstream.port) as running:
        reception = running.relay.reception

        def look(seconds: float) -> None:
            reception.sweep(asyncio.get_running_loop().time() + seconds, 1.0)

        async with Client(running.port) as silent, Client(running.port) as endless:
            for client in (silent, endless):
                await client.command(b"GET / HTTP/1.1", 220)
                await client.expect(554)
                await client.expect_closed()  # FIN, so that those who wait for the end have it
            look(0.0)
            look(0.0)
            await eventually(lambda: len(reception._sessions) == 0)
        async with Client(running.port) as endless:
            await endless.command(b"GET / HTTP/1.1", 220)
            await endless.expect(554)
            (session,) = reception._sessions
            for _ in range(3):
                session._heard = False
                await endless.send(b"x")
                await eventually(lambda: session._heard)
                look(0.0)
            assert reception._sessions == {session}
            look(session_module.LINGER + SOON)
            await nothing_left(running)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_has_left_before_it_is_no_defect(
    loop: str, start: Any, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async def leave() -> None:
        async with ScriptedUpstream() as upstream, start(upstream.port) as running:
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", running.port)) as peer:
                    await eventually(lambda: len(running.relay.reception._sessions) == 1)
                    peer.recv(4096)  # what stays unread would reset the connection
                    peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
                await nothing_left(running)
        maillog.flush()

    maillog.configure("json", "info")
    factory = asyncio.new_event_loop if loop == "asyncio" else pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(leave())
    logged = capfdbinary.readouterr().out
    assert logged.count(b'"out_of_step"') == 5
    assert b'"unforeseen"' not in logged
