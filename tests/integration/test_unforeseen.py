"""An error that nobody foresaw: the client hears 451 with an id, the log has the cause, the relay goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.client import Client

if TYPE_CHECKING:
    from tests.support.upstream import ScriptedUpstream

CONTENT = b"Subject: x\r\n\r\nx\r\n"


async def test_while_a_connection_is_opened(
    start: Any,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upstream.script = {"greeting": [b"554 not yet\r\n"]}  # the start's own attempt: no connection is idle
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()
        with monkeypatch.context() as broken:

            async def dial(_: object) -> None:
                raise RuntimeError("secret detail")

            broken.setattr(running.pool._dialer, "dial", dial)
            reply = await client.command(b"MAIL FROM:<a@example.test>")

        assert (reply.code, reply.text[:5]) == (451, "4.3.0")
        assert "secret" not in reply.text
        identity = reply.text.rpartition(" ")[2]
        logged = [line for line in capsys.readouterr().out.splitlines() if identity in line]
        assert any("secret detail" in line for line in logged)
        assert (await client.message("a@example.test", ["b@example.test"], CONTENT))[-1].code == 250
        assert running.metric("messages_total", upstream="primary", outcome="unavailable") == 1


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_after_the_acceptance(
    when: str,
    start: Any,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Accepted means accepted: whatever fails then must not make the application send again."""
    async with start(upstream.port) as running, Client(running.port) as client:
        await client.ehlo()

        def record(_: object) -> asyncio.Future[None]:
            if when == "at once":
                raise RuntimeError("no row")
            kept = asyncio.get_running_loop().create_future()
            kept.set_exception(RuntimeError("no row"))
            return kept

        monkeypatch.setattr(running.relay.records.recorder, "record", record)
        assert (await client.message("a@example.test", ["b@example.test"], CONTENT))[-1].code == 250
        assert "no row" in capsys.readouterr().out
        assert running.metric("record_errors_total") == 1
        assert running.metric("messages_total", upstream="primary", outcome="accepted") == 1
