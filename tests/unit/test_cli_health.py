from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from relay.cli import main
from tests.support.upstream import ScriptedUpstream


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_CONFIG", raising=False)


class Said(NamedTuple):
    out: list[str]
    err: list[str]


def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Lines for people: the relay of the test logs to the same standard output."""
    out, err = capsys.readouterr()
    return Said([line for line in out.splitlines() if not line.startswith("{")], err.splitlines())


async def ask(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["health", *arguments])


async def test_a_relay_that_lives(
    start: Any,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with start(upstream.port) as running:
        # The wildcard is where it listens, and nothing to connect to; no upstream is configured here.
        monkeypatch.setenv("RELAY__HTTP__ADDRESS", f"0.0.0.0:{running.http_port}")
        assert await ask() == 0
        assert said(capsys).out == ["ok"]
        assert await ask("--ready") == 0
        assert said(capsys).out == ["ready", "upstream primary: up"]
        running.relay.reception.draining = True
        assert await ask() == 0
        assert said(capsys).out == ["ok"]
        assert await ask("--ready") == 1
        assert said(capsys) == ([], ["not ready", "draining", "upstream primary: up"])


async def test_no_relay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, so that nobody else listens there, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RELAY__HTTP__ADDRESS", address)
        assert await ask() == 1
    assert capsys.readouterr().err == f"relay: no answer from http://{address}/healthz: Connection refused\n"


async def test_somebody_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setenv("RELAY__HTTP__ADDRESS", f"127.0.0.1:{port}")
    async with server:
        assert await ask() == 1
    assert capsys.readouterr().err == (
        f"relay: no answer from http://127.0.0.1:{port}/healthz: 220 mail.example.com ESMTP\n"
    )


async def test_a_port_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY__HTTP__ADDRESS", "127.0.0.1:0")
    assert await ask() == 1
    assert "http.address has port 0" in capsys.readouterr().err


async def test_a_file_that_is_named_and_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert await ask("--config", "mine.toml") == 2
    assert "mine.toml: no such file" in capsys.readouterr().err


ROUTED = """
[clients]
auth = "passthrough"
passthrough_to = "primary"
auth_without_tls = true
[[upstreams]]
name = "primary"
address = "smtp.example.com:587"
[[upstreams]]
name = "other"
address = "smtp.example.net:587"
"""


RECORDS = '[records]\npassword_file = "/run/secrets/of-the-service"\n'


@pytest.mark.parametrize("text", [ROUTED, '[[listeners]]\naddress = "127.0.0.1:2526"\n', RECORDS])
async def test_what_else_the_file_says_does_not_matter(
    text: str,
    start: Any,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("relay.toml").write_text(text)
    async with start(upstream.port) as running:
        monkeypatch.setenv("RELAY__HTTP__ADDRESS", f"127.0.0.1:{running.http_port}")
        assert await ask("--config", "relay.toml") == 0
    assert said(capsys) == (["ok"], [])
