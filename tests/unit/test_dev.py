"""The built-in upstream, asked over a real connection how it treats whom."""

from __future__ import annotations

import asyncio
import smtplib
from collections.abc import AsyncIterator

import pytest

from relay.dev import DevUpstream, Manner, by_local_part, listen


@pytest.fixture
async def port() -> AsyncIterator[int]:
    listening = listen("127.0.0.1", 0)
    async with DevUpstream(listening, slow_s=0.2) as upstream:
        yield listening.getsockname()[1]
        assert all("reject" not in message.recipients[0] for message in upstream.messages)


def send(port: int, *recipients: str) -> object:
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as smtp:
        try:
            return smtp.sendmail("a@example.com", list(recipients), b"Subject: x\r\n\r\nx\r\n")
        except smtplib.SMTPRecipientsRefused as error:
            return {address: code for address, (code, _) in error.recipients.items()}
        except smtplib.SMTPDataError as error:
            return error.smtp_code
        except smtplib.SMTPServerDisconnected:
            return "gone"


@pytest.mark.parametrize(
    ("recipient", "manner"),
    [
        ("ann@example.com", Manner.ACCEPT),
        ("reject@example.com", Manner.REJECT),
        ("Reject+ann@example.com", Manner.REJECT),
        ("defer.ann@example.com", Manner.DEFER),
        ("slowly@example.com", Manner.ACCEPT),
        ("reject", Manner.ACCEPT),
        ("drop@example.com", Manner.DROP),
    ],
)
def test_the_local_part_tells_how_a_recipient_is_treated(recipient: str, manner: Manner) -> None:
    assert by_local_part(recipient) is manner


@pytest.mark.parametrize(
    ("recipient", "heard"),
    [
        ("ann@example.com", {}),
        ("reject@example.com", {"reject@example.com": 550}),
        ("defer@example.com", {"defer@example.com": 451}),
        ("spam@example.com", 554),
        ("drop@example.com", "gone"),
        ("slow@example.com", {}),
    ],
)
async def test_it_does_as_the_recipient_asks(port: int, recipient: str, heard: object) -> None:
    assert await asyncio.to_thread(send, port, recipient) == heard


async def test_one_recipient_is_refused_and_the_other_gets_it(port: int) -> None:
    refused = await asyncio.to_thread(send, port, "ann@example.com", "reject@example.com")
    assert isinstance(refused, dict)
    assert list(refused) == ["reject@example.com"]
