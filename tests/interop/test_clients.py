"""Mail clients that applications use, unmodified, through a live relay to a scripted upstream.

For each: what the upstream got, octet for octet what the client wrote; the rows; what the client reported.
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.interop.senders import CLIENTS, Client, Mail
from tests.interop.tap import Tap
from tests.support import client as raw
from tests.support.upstream import Connection, Delay, ScriptedUpstream

if TYPE_CHECKING:
    from email.message import EmailMessage

    from tests.support.upstream import Message

MEBIBYTE = 1024 * 1024
THREE = ("first@example.test", "second@example.test", "third@other.test")
NOBODY = "nobody@example.test"

every_client = pytest.mark.parametrize("sender", [client.param for client in CLIENTS])


def clients(*, keeps_connection: bool | None = None, smtputf8: bool | None = None) -> Any:
    """Return the parameters of those that can."""
    chosen = [
        client.param
        for client in CLIENTS
        if (keeps_connection is None or client.keeps_connection is keeps_connection)
        and (smtputf8 is None or client.smtputf8 is smtputf8)
    ]
    return pytest.mark.parametrize("sender", chosen)


def parsed(message: Message) -> EmailMessage:
    found = email.message_from_bytes(message.content, policy=email.policy.default)
    assert not found.defects
    return found


def text_of(message: EmailMessage) -> str:
    """The text, its charset UTF-8 whether the client says so or not, its line ends CRLF."""
    body = message.get_body()
    assert body is not None
    octets = body.get_payload(decode=True)
    assert isinstance(octets, bytes)
    return octets.decode().replace("\r\n", "\n").replace("\n", "\r\n")


@every_client
async def test_a_mail_arrives_as_its_client_wrote_it(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    mail = Mail(recipients=THREE, attachment=random.Random(sender.name).randbytes(3 * MEBIBYTE))
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [mail])

        assert report.ok, report.text
        assert report.refused == ()
        (message,) = upstream.messages
        assert tap.carried(message)
        assert message.recipients == [b"<%b>" % address.encode() for address in THREE]
        found = parsed(message)
        assert found["Subject"] == mail.subject
        assert text_of(found).rstrip("\r\n") == mail.body.rstrip("\r\n")
        (attachment,) = found.iter_attachments()
        assert attachment.get_content() == mail.attachment
        (row,) = running.rows()
        assert (row["sender"], row["task_type"]) == (mail.sender, mail.task_type)
        assert row["size"] == len(message.content)
        assert row["message_id"] == found["Message-ID"]
        assert row["upstream_reply"] == "250 2.0.0 accepted as 1"
        rows = running.rows("SELECT recipient FROM task_done_recipient ORDER BY ordinal")
        assert tuple(each["recipient"] for each in rows) == THREE
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 1
        assert running.metric("message_bytes_total", direction="out") == len(message.content)
    assert upstream.violations == []


@every_client
async def test_a_refused_recipient_is_the_clients_to_know(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"RCPT": {NOBODY: b"550 5.1.1 no such user\r\n"}}
    mail = Mail(recipients=(THREE[0], NOBODY, THREE[2]))
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [mail])

        assert b"550 5.1.1 no such user\r\n" in tap.sessions[0].heard
        if sender.partial == "gives up":
            assert not report.ok
            assert "550 5.1.1 no such user" in report.text
            assert upstream.messages == []
            assert running.rows() == []
            assert running.metric("messages_total", upstream="primary", outcome="accepted") == 0
            return
        assert report.ok, report.text
        assert report.refused == ((NOBODY,) if sender.partial == "reports" else ())
        (message,) = upstream.accepted
        assert message.recipients == [b"<first@example.test>", b"<third@other.test>"]
        (row,) = running.rows()
        assert "550 5.1.1 no such user" in row["data"]
        rows = running.rows("SELECT recipient FROM task_done_recipient ORDER BY ordinal")
        assert [each["recipient"] for each in rows] == [THREE[0], THREE[2]]
        assert running.metric("recipients_total", upstream="primary", outcome="accepted") == 2
        assert running.metric("recipients_total", upstream="primary", outcome="rejected") == 1


@pytest.mark.parametrize(
    ("stage", "reply", "outcome"),
    [
        ("MAIL", "550 5.7.1 not from you", "rejected"),
        ("MAIL", "450 4.7.1 not from you now", "deferred"),
        ("RCPT", "550 5.1.1 no such user", "rejected"),
        ("DATA", "451 4.3.0 no room for it", "deferred"),
        ("end_of_data", "554 5.7.1 looks like spam", "rejected"),
        ("end_of_data", "452 4.2.2 mailbox full", "deferred"),
    ],
)
@every_client
async def test_the_upstreams_no_reaches_the_application(
    sender: Client, stage: str, reply: str, outcome: str, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {stage: reply.encode() + b"\r\n"}
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [Mail(recipients=THREE[:2])])

        assert not report.ok
        assert reply.encode() + b"\r\n" in tap.sessions[0].heard
        assert reply in report.text or reply.partition(" ")[2] in report.text
        assert upstream.accepted == []
        await tap.ended()
        assert running.rows() == []
        assert running.metric("messages_total", upstream="primary", outcome=outcome) == 1
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 0
    assert upstream.violations == []


@clients(keeps_connection=True)
async def test_one_connection_carries_many_mails(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {
        "RCPT": {"nobody": b"550 5.1.1 no such user\r\n"},
        "end_of_data": [None, None, b"554 5.7.1 looks like spam\r\n"],
    }
    mails = [Mail(recipients=(f"user{number}@example.test",), task_type=f"t{number}") for number in range(12)]
    mails[5] = Mail(recipients=(NOBODY,))
    async with start(upstream.port) as running, Tap(running.port) as tap:
        reports = await sender.send(tap.port, mails)

        assert [report.ok for report in reports] == [number not in (2, 5) for number in range(12)]
        assert len(tap.sessions) == (1 if sender.keeps_after_failure else 3)
        assert len(upstream.connections) == 1, upstream.transcript()
        sent = [number for number in range(12) if number not in (2, 5)]
        assert [row["task_type"] for row in running.rows()] == [f"t{number}" for number in sent]
        for message in upstream.messages:
            assert tap.carried(message)
    assert upstream.violations == []


@clients(smtputf8=True)
async def test_non_ascii_addresses_go_through_as_they_are(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    mail = Mail(sender="büro@example.test", recipients=("jürgen@example.test", "用户@example.test"))
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [mail])

        assert report.ok, report.text
        (message,) = upstream.accepted
        assert tap.carried(message)
        assert b"SMTPUTF8" in message.mail.upper().split()
        assert message.reverse_path == b"<" + mail.sender.encode() + b">"
        assert message.recipients == [b"<" + who.encode() + b">" for who in mail.recipients]
        (row,) = running.rows()
        assert row["sender"] == mail.sender
        rows = running.rows("SELECT recipient FROM task_done_recipient ORDER BY ordinal")
        assert tuple(each["recipient"] for each in rows) == mail.recipients


@clients(smtputf8=True)
async def test_non_ascii_addresses_are_the_clients_to_settle_where_the_upstream_cannot(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    mail = Mail(sender="büro@example.test", recipients=("jürgen@example.test",))
    upstream.extensions = ["PIPELINING", "8BITMIME"]
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [mail])

        assert not report.ok
        assert not re.search(rb"^250[- ]SMTPUTF8", tap.sessions[0].heard, re.MULTILINE)
        assert upstream.messages == []
        assert running.rows() == []


async def test_an_international_domain_goes_as_django_encodes_it(
    start: Any, upstream: ScriptedUpstream
) -> None:
    (sender,) = (client for client in CLIENTS if client.name == "django")
    async with start(upstream.port) as running, Tap(running.port) as tap:
        (report,) = await sender.send(tap.port, [Mail(recipients=("user@bücher.test",))])

        assert report.ok, report.text
        (message,) = upstream.accepted
        assert message.recipients == [b"<user@xn--bcher-kva.test>"]
        assert tap.carried(message)


def once_data_is_here(upstream: ScriptedUpstream) -> Any:
    """Return a plan that holds back the reply to MAIL until the relay has run ahead of it as far as DATA."""
    here = asyncio.Event()
    watching = []

    def plan(_stage: str, _line: bytes, connection: Connection) -> Delay:
        async def watch() -> None:
            await upstream.wait_for(lambda: b"\r\nDATA\r\n" in connection.wire.waiting)
            here.set()

        watching.append(asyncio.create_task(watch()))
        return Delay(here)

    return plan


async def test_a_pipelined_group_goes_up_without_waiting(start: Any, upstream: ScriptedUpstream) -> None:
    upstream.script = {"MAIL": once_data_is_here(upstream)}
    async with start(upstream.port) as running, raw.Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", THREE, b"Subject: x\r\n\r\n", pipelined=True)

        assert [reply.code for reply in replies] == [250, 250, 250, 250, 354, 250]
        assert len(running.rows()) == 1


@pytest.mark.parametrize("sender", [c.param for c in CLIENTS if c.name == "swaks-pipeline"])
async def test_swaks_pipelines_up_to_the_upstream(
    sender: Client, start: Any, upstream: ScriptedUpstream
) -> None:
    upstream.script = {"MAIL": once_data_is_here(upstream)}
    async with start(upstream.port) as running:
        (report,) = await sender.send(running.port, [Mail(recipients=THREE)])

        assert report.ok, report.text
        assert len(running.rows()) == 1
