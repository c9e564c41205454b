"""A relay that cannot start says why in one line, with the exit status of spec: never a traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

BAD_CONFIGURATION = 2
CANNOT = 1
"""Good configuration, but what was asked for cannot be done here and now."""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def fails(relay: RelayProcess, status: int) -> str:
    """Start the relay, expect it to end with this status and one line; return the line."""
    await relay.spawn()
    assert await relay.ended() == status
    (line,) = relay.errors().splitlines()
    assert line.startswith("relay: ")
    return line


async def test_a_bad_configuration(tmp_path: Path) -> None:
    async with RelayProcess(tmp_path, 25, server={"hostnam": "relay.test"}) as relay:
        line = await fails(relay, BAD_CONFIGURATION)

    assert str(relay.config) in line
    assert "server.hostnam" in line
    assert not relay.database.parent.exists()


async def test_an_address_that_is_taken(tmp_path: Path, taken: int) -> None:
    async with RelayProcess(tmp_path, 25, listener={"address": f"127.0.0.1:{taken}"}) as relay:
        assert f"127.0.0.1:{taken}: Address already in use" in await fails(relay, CANNOT)


async def test_an_http_address_that_is_taken(tmp_path: Path, taken: int) -> None:
    async with RelayProcess(tmp_path, 25, http={"address": f"127.0.0.1:{taken}"}) as relay:
        assert f"http.address: cannot listen on 127.0.0.1 port {taken}" in await fails(relay, CANNOT)


@pytest.mark.parametrize("key", ["url", "spool"])
async def test_a_directory_that_cannot_be_written(tmp_path: Path, key: str) -> None:
    # A file stands where the directory would be: that stops root, too.
    (tmp_path / "file").touch()
    values: dict[str, Any] = {
        "url": f"sqlite:///{tmp_path / 'file' / 'rows.db'}",
        "spool": str(tmp_path / "file" / "spool"),
    }
    async with RelayProcess(tmp_path, 25, records={key: values[key]}) as relay:
        assert str(tmp_path / "file") in await fails(relay, CANNOT)


async def test_a_second_relay_on_the_same_files(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = RelayProcess(tmp_path / "first", upstream.port)
    records = {"url": f"sqlite:///{first.database}", "spool": str(first.spool)}
    async with first, RelayProcess(tmp_path / "second", upstream.port, records=records) as second:
        await first.start()
        assert f"spool {first.spool} is in use" in await fails(second, CANNOT)
        async with Client(first.port) as client:
            await client.ehlo()
            replies = await client.message("a@example.test", ["b@example.test"], b"From: a@b.test\r\n\r\n")
            assert replies[-1].code == 250
        assert await first.terminate() == 0
