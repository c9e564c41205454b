"""A certificate that is replaced again and again under load: nobody is dropped, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import Certificates
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

if TYPE_CHECKING:
    from pathlib import Path

MESSAGE = b"Subject: under rotation\r\n\r\nHello\r\n"
SENDERS, CONNECTIONS, MESSAGES = 4, 8, 3


@pytest.mark.parametrize("mode", ["starttls", "implicit"])
async def test_nobody_is_dropped_while_the_certificate_changes(mode: str, tmp_path: Path) -> None:
    authority = Certificates()
    cert, key = authority.write_server(tmp_path)
    context = authority.client()
    tls = {"cert": str(cert), "key": str(key)}
    async with (
        ScriptedUpstream() as upstream,
        RelayProcess(tmp_path, upstream.port, listener={"tls": mode}, tls=tls) as relay,
    ):
        await relay.start()
        senders = [asyncio.ensure_future(send(relay.port, mode, context)) for _ in range(SENDERS)]
        rotations = 0
        while not all(sender.done() for sender in senders) or not rotations:
            _rotate(authority, tmp_path, rotations)
            os.kill(relay.pid, signal.SIGHUP)
            rotations += 1
            await asyncio.sleep(0.02)
        replies = [code for sender in senders for code in await sender]

        assert replies == [250] * (SENDERS * CONNECTIONS * MESSAGES)
        assert len(upstream.accepted) == len(relay.rows()) == len(replies)
        events = [line["event"] for line in relay.log()]
        assert "certificate read" in events
        assert "unforeseen" not in events
        assert "session refused" not in events
        assert await relay.terminate() == 0


def _rotate(authority: Certificates, directory: Path, turn: int) -> None:
    """Put a new pair in place; every third time, for a moment, a key that does not fit."""
    if turn % 3 == 2:
        (directory / "key.pem").write_bytes(b"not a key\n")
    else:
        authority.write_server(directory)


async def send(port: int, mode: str, context: ssl.SSLContext) -> list[int]:
    """Send over one connection after the other; return the verdicts."""
    codes = []
    for _ in range(CONNECTIONS):
        client = await Client.connect(port, tls=context if mode == "implicit" else None)
        try:
            await client.ehlo()
            if mode == "starttls":
                await client.starttls(context)
                await client.ehlo()
            for _ in range(MESSAGES):
                replies = await client.message("a@example.test", ["b@example.test"], MESSAGE)
                codes.append(replies[-1].code)
            await client.command("QUIT", 221)
        finally:
            client.wire.abort()
    return codes
