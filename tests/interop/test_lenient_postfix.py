"""A real lenient receiver: Debian's Postfix takes LF for a line end (`smtpd_forbid_bare_newline = no`).

What is smuggled to it directly makes two messages of one; through the relay, as many are in its queue as were
sent. The model of Postfix that the exhaustive test uses (`tests/support/receivers.py`) is compared with it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import smtplib
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from tests.interop.peers import AS_ROOT, needs
from tests.interop.postfix import Postfix
from tests.interop.postfix import postfix as run_postfix
from tests.support import receivers
from tests.support.client import Client

pytestmark = [*needs("postfix", "postfix"), AS_ROOT]

HEAD = b"From: a@example.test\r\nTo: b@example.test\r\nSubject: x\r\n\r\nx"
SMUGGLED = b"MAIL FROM:<evil@example.test>\r\nRCPT TO:<u@example.test>\r\nDATA\r\nSubject: y\r\n\r\ny\r\n"
PUBLISHED = (
    # SEC Consult's list, and those of the tools that were published with it and after it.
    *(b"\n.\n", b"\n.\r\n", b"\n.\r", b"\r\n.\n", b"\r\n.\r", b"\r.\r", b"\r.\n", b"\r.\r\n", b"\n\n.\r\n"),
    *(
        b"\r\n\0.\r\n",
        b"\r\n\0.\r",
        b"\r\n\0.\n",
        b"\r\n.\0\r\n",
        b"\n\0.\n",
        b"\0\r\n.\0\r\n",
        b"\r\0\n.\r\0\n",
    ),
    # CVE-2023-51764 once more, where bare LF is forbidden but CR CR LF is one line end.
    *(b"\r\r\n.\r\r\n", b"\r\n.\r\r\n", b"\r\r\n.\r\n", b"\n.\r\r\n", b"\n..\r\n", b"\r\n..\r\n", b"\n..\n"),
)
SAMPLE = 240
SEED = 1


def sample() -> list[bytes]:
    """Return some of the exhaustive test's contents: one half as they come, one half those that betray."""
    dice = random.Random(SEED)
    betraying = [
        content
        for content in map(bytes, itertools.product(b"\r\n.a\0", repeat=6))
        if any(receiver(content) for receiver in receivers.RECEIVERS) and not receivers.strict(content)
    ]
    anything = [bytes(dice.choices(b"\r\n.a\0", k=7)) for _ in range(SAMPLE // 2)]
    return [content for content in anything if not receivers.strict(content)] + dice.sample(
        betraying, SAMPLE // 2
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Postfix]:
    certificate = trustme.CA().issue_cert("localhost")
    with run_postfix(certificate.private_key_and_cert_chain_pem.bytes()) as instance:
        yield instance


@pytest.fixture
def postfix(server: Postfix) -> Postfix:
    server.empty()
    return server


async def transfer(client: Client, wire: bytes) -> int:
    """Send one message as these octets; return the code of the reply to its end."""
    await client.command("MAIL FROM:<a@example.test>", 250)
    await client.command("RCPT TO:<u@example.test>", 250)
    await client.command("DATA", 354)
    await client.send(wire)
    return (await client.reply()).code


def senders(postfix: Postfix) -> list[str]:
    return [message["sender"] for message in postfix.queue()]


@pytest.mark.parametrize("end", PUBLISHED, ids=repr)
async def test_directly_this_postfix_is_as_lenient_as_its_model(end: bytes, postfix: Postfix) -> None:
    """What the next tests show is worth something only while this one holds."""
    wire = HEAD + end + SMUGGLED + b".\r\n"
    smuggles = receivers.postfix(wire) != len(wire)
    async with Client(postfix.plain) as client:
        await client.ehlo()
        assert await transfer(client, wire) == 250
        if smuggles:
            assert [reply.code for reply in await client.replies(4)] == [250, 250, 354, 250]
        await client.command(b"NOOP", 250)
    assert sorted(senders(postfix)) == ["a@example.test", "evil@example.test"][: 1 + smuggles]


def test_some_published_forms_betray_this_postfix() -> None:
    betraying = [end for end in PUBLISHED if receivers.postfix(HEAD + end)]
    assert betraying == [
        *(b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\n\n.\r\n"),
        *(b"\r\r\n.\r\r\n", b"\r\n.\r\r\n", b"\r\r\n.\r\n", b"\n.\r\r\n"),
    ]


@pytest.mark.parametrize("bare_newlines", ["normalize", "refuse"])
async def test_through_the_relay_one_is_one(bare_newlines: str, postfix: Postfix, start: Any) -> None:
    told = []
    contents = [*PUBLISHED, *sample()]
    async with start(postfix.plain, server={"bare_newlines": bare_newlines}) as running:
        for content in contents:
            async with Client(running.port) as client:
                await client.ehlo()
                told.append(await transfer(client, HEAD + content + SMUGGLED + b".\r\n"))
                await client.command(b"NOOP", 250)
        assert set(told) == {250, 550}
        queued = postfix.queue()
        assert {message["sender"] for message in queued} == {"a@example.test"}
        assert len(queued) == len(running.rows()) == told.count(250)
    clean = [code for content, code in zip(contents, told, strict=True) if is_clean(content)]
    mended = [code for content, code in zip(contents, told, strict=True) if b"\0" not in content]
    assert told.count(250) == len(mended if bare_newlines == "normalize" else clean)


async def test_bytes_arrive_as_when_smtplib_sends_them_directly(postfix: Postfix, start: Any) -> None:
    """Given bytes, smtplib leaves their LF alone, and stuffs the lines that those end all the same."""
    content = (
        b"Subject: x\nMessage-ID: <1@example.test>\nDate: x\nFrom: a@example.test\n\n.one\n..two\n...\n.\nx\n"
    )

    def send(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, local_hostname="client.test", timeout=30) as server:
            server.sendmail("a@example.test", "u@example.test", content)

    async with start(postfix.plain) as running:
        for port in (postfix.plain, running.port):
            await asyncio.to_thread(send, port)
    direct, relayed = [postfix.message(message["queue_id"]) for message in postfix.queue()]
    assert direct.endswith(b"\r\n\r\n.one\r\n..two\r\n...\r\n.\r\nx\r\n\r\n")
    assert relayed == direct


def is_clean(content: bytes) -> bool:
    """Whether CR and LF stand in pairs only, and no NUL; the text before and behind changes nothing."""
    rest = content.replace(b"\r\n", b"")
    return not any(octet in rest for octet in b"\r\n\0")
