"""A real Postfix as the upstream: the client hears its replies; what it queues has a row, nothing else."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.interop.peers import AS_ROOT, needs
from tests.interop.postfix import MESSAGE_SIZE_LIMIT, Postfix
from tests.interop.postfix import postfix as run_postfix
from tests.support.client import Client, bdat

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [*needs("postfix", "postfix"), AS_ROOT]

HEAD = b"From: a@example.test\r\nTo: b@example.test\r\nDate: Mon, 5 Jan 2026 10:00:00 +0000\r\n"
"""What Postfix would otherwise add to a message from its own network."""


def content(number: int, extra: bytes = b"", body: bytes = b"text\r\n..dots\r\n") -> bytes:
    return HEAD + b"Message-ID: <%d@example.test>\r\n" % number + extra + b"Subject: x\r\n\r\n" + body


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server(authority: trustme.CA) -> Iterator[Postfix]:
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    with run_postfix(certificate.private_key_and_cert_chain_pem.bytes()) as instance:
        yield instance


@pytest.fixture
def postfix(server: Postfix) -> Postfix:
    server.empty()
    return server


def queue_id(reply: str) -> str:
    """Cut the queue id out of `250 2.0.0 Ok: queued as ID`, which names the size too after BDAT."""
    assert re.fullmatch(r"250 2\.0\.0 Ok: (\d+ bytes )?queued as \w+", reply), reply
    return reply.rpartition(" ")[2]


async def test_what_postfix_queues_has_its_row(postfix: Postfix, start: Any) -> None:
    before = datetime.now(UTC)
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        told = [
            (await client.message("a@example.test", [f"u{n}@example.test", "c@other.test"], content(n)))[-1]
            for n in range(10)
        ]
        rows = running.rows()

        queued = {message["queue_id"]: message for message in postfix.queue()}
        assert [row["upstream_reply"] for row in rows] == [str(reply) for reply in told]
        assert sorted(queue_id(row["upstream_reply"]) for row in rows) == sorted(queued)
        for number, row in enumerate(rows):
            message = queued[queue_id(row["upstream_reply"])]
            assert message["queue_name"] == "hold"
            assert message["sender"] == row["sender"] == "a@example.test"
            assert [who["address"] for who in message["recipients"]] == [
                f"u{number}@example.test",
                "c@other.test",
            ]
            assert postfix.message(message["queue_id"]) == content(number)
            assert row["message_id"] == f"<{number}@example.test>"
            sent_at = datetime.fromisoformat(row["sent_at"]).replace(tzinfo=UTC)
            assert before - timedelta(seconds=1) <= sent_at <= datetime.now(UTC) + timedelta(seconds=1)
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 10
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 1


async def test_recipients_that_postfix_refuses(postfix: Postfix, start: Any) -> None:
    recipients = ["u@example.test", "nobody@example.test", "greylisted@example.test", "v@example.test"]
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        for pipelined in (False, True):
            replies = await client.message("a@example.test", recipients, content(1), pipelined=pipelined)

            assert [reply.code for reply in replies] == [250, 250, 550, 450, 250, 354, 250]
            assert str(replies[2]) == (
                "550 5.1.1 <nobody@example.test>: Recipient address rejected: No such user"
            )
            assert str(replies[3]).startswith("450 4.7.1 <greylisted@example.test>: ")
        assert len(running.rows()) == len(postfix.queue()) == 2
        for row, message in zip(running.rows(), postfix.queue(), strict=True):
            assert "No such user" in row["data"]
            assert "Come back later" in row["data"]
            assert [who["address"] for who in message["recipients"]] == ["u@example.test", "v@example.test"]
        assert running.metric("recipients_total", upstream="primary", outcome="rejected") == 2
        assert running.metric("recipients_total", upstream="primary", outcome="deferred") == 2


async def test_all_recipients_refused(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        for pipelined in (False, True):
            replies = await client.message(
                "a@example.test", ["nobody@example.test"], content(1), pipelined=pipelined
            )
            assert [reply.code for reply in replies] == [250, 550, 554]
            assert (await client.command("RSET")).code == 250
        assert (await client.message("a@example.test", ["u@example.test"], content(2)))[-1].code == 250
        assert len(running.rows()) == len(postfix.queue()) == 1
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 2


async def test_a_sender_that_postfix_refuses(postfix: Postfix, start: Any) -> None:
    """With smtpd_delay_reject, its default, Postfix says so at RCPT."""
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("banned@example.test", ["u@example.test"], content(1))
        assert [reply.code for reply in replies] == [250, 550, 554]
        assert "Sender address rejected: Not from you" in replies[1].text
        assert running.rows() == postfix.queue() == []


async def test_a_message_that_postfix_refuses_after_its_content(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        replies = await client.message(
            "a@example.test", ["u@example.test"], content(1, b"X-Spam-Flag: YES\r\n")
        )
        assert str(replies[-1]) == "550 5.7.1 looks like spam"
        assert running.rows() == postfix.queue() == []
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 1
        assert (await client.message("a@example.test", ["u@example.test"], content(2)))[-1].code == 250
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 1
        assert len(running.rows()) == len(postfix.queue()) == 1


async def test_what_postfix_refuses_at_the_end_of_data_is_not_the_next_clients(
    postfix: Postfix, start: Any
) -> None:
    """By `smtpd_end_of_data_restrictions`: Postfix keeps that transaction open, and 503 would be for MAIL."""
    async with start(postfix.plain) as running:
        for sender, code in [("full@example.test", 452), ("a@example.test", 250), ("full@example.test", 452)]:
            async with Client(running.port) as client:
                await client.ehlo()
                replies = await client.message(sender, ["u@example.test"], content(1))
                assert [reply.code for reply in replies] == [250, 250, 354, code]
        (row,) = running.rows()
        assert row["sender"] == "a@example.test"
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 1


async def test_a_declared_size_that_postfix_refuses(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert client.extensions["SIZE"] == str(MESSAGE_SIZE_LIMIT)
        reply = await client.command(f"MAIL FROM:<a@example.test> SIZE={MESSAGE_SIZE_LIMIT + 1}")
        assert str(reply) == "552 5.3.4 Message size exceeds fixed limit"
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 1
        assert running.rows() == []


async def test_content_that_grows_beyond_what_postfix_takes(postfix: Postfix, start: Any) -> None:
    """Where Postfix does not tell its limit, the whole message goes up and the reply is its own."""
    large = content(1, body=b"".join(b"%09d\r\n" % n for n in range(MESSAGE_SIZE_LIMIT // 10)))
    async with start(postfix.no_size) as running, Client(running.port, deadline_s=30) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["u@example.test"], large)
        assert str(replies[-1]) == "552 5.3.4 Error: message file too big"
        assert running.rows() == postfix.queue() == []
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 1


async def test_chunks_that_postfix_queues(postfix: Postfix, start: Any) -> None:
    """Postfix stuffs dots where it sends on; what looks like an end of data in a chunk stays content."""
    message = content(1, body=b".\r\n..dots\r\n.\r\nMAIL FROM:<evil@example.test>\r\n" + b"line\r\n" * 20_000)
    cuts = [0, 1, 70, 80, 5000, len(message)]
    chunks = [message[start:end] for start, end in itertools.pairwise(cuts)]
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert "CHUNKING" in client.extensions
        assert "BINARYMIME" not in client.extensions
        for sent in (chunks, [message], [*chunks, b""]):
            replies = await client.chunks("a@example.test", ["u@example.test", "nobody@example.test"], sent)
            assert [reply.code for reply in replies] == [250, 250, 550] + [250] * len(sent)
            assert [reply.text[:10] for reply in replies[3:-1]] == ["2.0.0 Ok: "] * (len(sent) - 1)
            row = running.rows()[-1]
            assert row["upstream_reply"] == str(replies[-1])
            assert row["size"] == len(message)
            assert postfix.message(queue_id(str(replies[-1]))) == message
        assert len(running.rows()) == len(postfix.queue()) == 3
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 3
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 1


async def test_chunks_that_postfix_refuses_or_that_are_given_up(postfix: Postfix, start: Any) -> None:
    async with start(postfix.no_size) as running, Client(running.port, deadline_s=30) as client:
        await client.ehlo()
        # Refused by content, after the last chunk.
        refused = content(1, b"X-Spam-Flag: YES\r\n")
        replies = await client.chunks("a@example.test", ["u@example.test"], [refused[:50], refused[50:]])
        assert [reply.code for reply in replies] == [250, 250, 250, 550]
        # Too large, in the middle: the rest is read, thrown away, and answered by Postfix.
        large = [
            content(1),
            *[b"x" * 70 + b"\r\n"] * 3,
            b"%09d\r\n" % 1 * (MESSAGE_SIZE_LIMIT // 11),
            b"end\r\n",
        ]
        replies = await client.chunks("a@example.test", ["u@example.test"], large)
        assert [reply.code for reply in replies[:6]] == [250] * 6
        assert replies[-1].code >= 500
        assert running.rows() == postfix.queue() == []
        assert running.metric("messages_total", upstream="primary", outcome="rejected") == 2
        # Given up between two chunks.
        for line in (b"MAIL FROM:<a@example.test>\r\n", b"RCPT TO:<u@example.test>\r\n", bdat(content(1))):
            await client.send(line)
            await client.expect(250)
        await client.command("RSET", 250)
        replies = await client.chunks("a@example.test", ["u@example.test"], [content(2)])
        assert replies[-1].code == 250
        assert len(running.rows()) == len(postfix.queue()) == 1
        assert postfix.message(queue_id(str(replies[-1]))) == content(2)


async def test_delivery_status_parameters_reach_postfix(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert "DSN" in client.extensions
        await client.command("MAIL FROM:<a@example.test> RET=HDRS ENVID=QQ+2B314159", 250)
        await client.command(
            "RCPT TO:<u@example.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Bob+2Bx@Example.Test", 250
        )
        await client.command("DATA", 354)
        await client.send(content(1) + b".\r\n")
        reply = await client.expect(250)
        envelope = postfix.envelope(queue_id(str(reply)))
        # Postfix keeps xtext decoded, and the lists as flags: HDRS is 2, SUCCESS 2 and FAILURE 4.
        assert "envelope_id=QQ+314159\n" in envelope
        assert "ret_flags=2\n" in envelope
        assert "notify_flags=6\n" in envelope
        assert "dsn_orig_rcpt=rfc822;Bob+x@Example.Test" in envelope


async def test_addresses_beyond_ascii_reach_postfix(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert "SMTPUTF8" in client.extensions
        await client.command("MAIL FROM:<büro@example.test> SMTPUTF8 BODY=8BITMIME", 250)
        await client.command("RCPT TO:<用户@例え.test>", 250)
        await client.command("DATA", 354)
        await client.send(content(1, body="Grüße\r\n".encode()) + b".\r\n")
        await client.expect(250)
        (message,) = postfix.queue()
        assert message["sender"] == "büro@example.test"
        assert [who["address"] for who in message["recipients"]] == ["用户@例え.test"]
        assert "Grüße" in postfix.received(message["queue_id"])
        (row,) = running.rows()
        assert row["sender"] == "büro@example.test"


async def test_only_what_postfix_has_and_the_relay_can_carry_is_offered(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert set(client.extensions) == {
            "PIPELINING",
            "SIZE",
            "8BITMIME",
            "SMTPUTF8",
            "DSN",
            "ENHANCEDSTATUSCODES",
            "CHUNKING",
            "LIMITS",
        }
    async with start(postfix.bare) as running, Client(running.port) as client:
        await client.ehlo()
        assert set(client.extensions) == {"PIPELINING", "SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "LIMITS"}
        replies = await client.message(
            "a@example.test", ["u@example.test", "nobody@example.test"], content(1), pipelined=True
        )
        assert [reply.code for reply in replies] == [250, 250, 550, 354, 250]
        assert len(running.rows()) == len(postfix.queue()) == 1


async def test_what_a_postfix_takes_no_connection_for_waits_for_one_that_it_has(
    postfix: Postfix, start: Any
) -> None:
    async def send(number: int) -> int:
        async with Client(running.port) as client:
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], content(number))
            return replies[-1].code

    async with start(postfix.few, upstream={"lease_wait_timeout": "1h"}) as running:
        assert await asyncio.gather(*(send(number) for number in range(20))) == [250] * 20
        assert running.metric("upstream_connects_total", upstream="primary", outcome="greeting") >= 1
        assert running.metric("upstream_up", upstream="primary") == 1
        assert len(running.rows()) == len(postfix.queue()) == 20
    assert "Connection concurrency limit exceeded" in postfix.log()


async def test_postfix_logs_the_client_that_xforward_names(postfix: Postfix, start: Any) -> None:
    listeners = [{"address": "127.0.0.1:0"}, {"address": "[::1]:0"}]
    async with start(postfix.xforward, listeners=listeners, upstream={"xforward": True}) as running:
        ports = [int(address.rpartition(":")[2]) for address in running.relay.reception.addresses]
        ids = []
        async with (
            Client(ports[0], source="127.0.0.5") as first,
            Client(ports[1], host="::1") as second,
        ):
            await first.ehlo("first+=.test")
            await second.greeting()
            await second.command("HELO second.test", 250)
            for client in (first, second, first):
                replies = await client.message("a@example.test", ["u@example.test"], content(1))
                ids.append(queue_id(str(replies[-1])))
        rows = running.rows()
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 1
    clients = [
        ("127.0.0.5", "127.0.0.5", "ESMTP", "first+=.test"),
        ("::1", "IPv6:::1", "SMTP", "second.test"),
        ("127.0.0.5", "127.0.0.5", "ESMTP", "first+=.test"),
    ]
    for each, (address, kept, protocol, helo), row in zip(ids, clients, rows, strict=True):
        # The address and the id as Postfix logs them when it takes the envelope, ...
        (line,) = [line for line in postfix.log().splitlines() if f" {each}: client=" in line]
        assert line.endswith(f", orig_queue_id={row['task_id']}, orig_client=unknown[{address}]")
        # ... and the rest as it keeps them with the message, for its own log and for filters behind it.
        envelope = postfix.envelope(each)
        assert f"log_client_address={kept}\n" in envelope
        assert f"log_protocol_name={protocol}\n" in envelope
        assert f"log_helo_name={helo}\n" in envelope


async def test_a_bounce_has_the_null_reverse_path(postfix: Postfix, start: Any) -> None:
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert (await client.message("", ["u@example.test"], content(1)))[-1].code == 250
        (message,) = postfix.queue()
        assert "sender: \n" in postfix.envelope(message["queue_id"])
        assert running.rows()[0]["sender"] == ""


@pytest.mark.parametrize("upstream_name", ["localhost", "127.0.0.1"])
async def test_starttls_with_a_verified_certificate(
    upstream_name: str, postfix: Postfix, authority: trustme.CA, start: Any, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    upstream = {
        "address": f"{upstream_name}:{postfix.tls}",
        "tls": "starttls",
        "ca_file": str(tmp_path / "ca.pem"),
    }
    async with start(postfix.tls, upstream=upstream) as running, Client(running.port) as client:
        await client.ehlo()
        replies = await client.message("a@example.test", ["u@example.test"], content(1))
        received = postfix.received(queue_id(str(replies[-1])))
        assert "(using TLSv1.3 with cipher" in received
        assert len(running.rows()) == len(postfix.queue()) == 1


@pytest.mark.parametrize("over", [{"tls": "starttls"}, {"tls": "none"}], ids=["not trusted", "not secured"])
async def test_no_mail_without_the_security_that_was_asked_for(
    over: dict[str, str], postfix: Postfix, start: Any
) -> None:
    """An authority that the system does not know: 451. No TLS although Postfix insists: its own 530."""
    expected = 451 if over["tls"] == "starttls" else 530
    async with start(postfix.tls, upstream=over) as running, Client(running.port) as client:
        await client.ehlo()
        reply = await client.command("MAIL FROM:<a@example.test>", expected)
        assert " 4.7.0 " in str(reply) or "Must issue a STARTTLS command first" in reply.text
        assert running.rows() == postfix.queue() == []


async def test_postfix_hangs_up_between_two_messages(postfix: Postfix, start: Any) -> None:
    """A connection that went idle and was closed by Postfix is replaced; the client notices nothing."""
    async with start(postfix.plain) as running, Client(running.port) as client:
        await client.ehlo()
        assert (await client.message("a@example.test", ["u@example.test"], content(1)))[-1].code == 250
        postfix.hang_up()
        assert (await client.message("a@example.test", ["u@example.test"], content(2)))[-1].code == 250
        assert len(running.rows()) == len(postfix.queue()) == 2
        assert running.metric("upstream_connects_total", upstream="primary", outcome="ok") == 2
