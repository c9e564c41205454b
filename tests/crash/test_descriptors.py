"""A relay that may open no more files: what is under way goes on, whatever clients write."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from relay.auth import edit
from relay.auth.hashing import Hasher
from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

DESCRIPTORS = 64
TIME_LIMIT_S = 10.0


@contextlib.asynccontextmanager
async def without_any_left(relay: RelayProcess) -> AsyncIterator[Client]:
    """Give a session that has sent a message, when all descriptors of the relay are taken."""
    relay.launcher = ("sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh")
    await relay.start()
    assert (await relay.get("/readyz"))[0] == 200
    async with contextlib.AsyncExitStack() as clients:
        client = await clients.enter_async_context(Client(relay.port))
        await client.ehlo()
        assert (await client.message("a@example.test", ["b@example.test"], b"\r\n"))[-1].code == 250
        descriptors = Path(f"/proc/{relay.pid}/fd")
        async with asyncio.timeout(TIME_LIMIT_S):
            while len(list(descriptors.iterdir())) < DESCRIPTORS:
                await clients.enter_async_context(Client(relay.port))
                await asyncio.sleep(0)
        yield client


async def test_a_header_that_does_not_print_is_logged(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        async with without_any_left(relay) as client:
            for _ in range(2):
                content = b"Message-ID: <\x1b[31m@example.test>\r\n\r\n"
                assert (await client.message("a@example.test", ["b@example.test"], content))[-1].code == 250
        assert await relay.terminate() == 0
        messages = [line for line in relay.log() if line["event"] == "message"]
        assert [line.get("message_id") for line in messages] == [None, *2 * [r"<\x1b[31m@example.test>"]]
    assert relay.errors() == ""


async def test_a_charset_that_cannot_be_loaded_refuses_no_mail(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    written = "=?gb2312?B?xOO6ww==?="
    content = f"X-Task-Type: {written}\r\n\r\n".encode()
    async with RelayProcess(tmp_path, upstream.port) as relay:
        async with without_any_left(relay) as client:
            for _ in range(2):
                assert (await client.message("a@example.test", ["b@example.test"], content))[-1].code == 250
        assert await relay.terminate() == 0
    assert [row["task_type"] for row in relay.rows()][1:] == 2 * [written]
    assert relay.errors() == ""


async def test_a_user_that_is_removed_meanwhile_is_none_afterwards(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    file = tmp_path / "users.toml"
    for name in ("app", "shop"):
        edit.put(file, name, Hasher(memory_kib=8, passes=1).hash("sesame"), (), replace=False)
    login = "AUTH PLAIN " + base64.b64encode(b"\0shop\0sesame").decode()
    clients = {
        "auth": "users",
        "users_file": str(file),
        "auth_without_tls": True,
        "allow": ["127.0.0.0/8"],
    }

    async def heard() -> int:
        with contextlib.suppress(ConnectionError):  # until the others have gone
            async with Client(relay.port) as client:
                await client.ehlo()
                return (await client.command(login)).code
        return 0

    async with RelayProcess(tmp_path, upstream.port, clients=clients) as relay:
        async with without_any_left(relay) as client:
            await client.command(login, 235)
            edit.remove(file, "shop")
            await relay.event("users not read")
        async with asyncio.timeout(TIME_LIMIT_S):
            while await heard() != 535:
                await asyncio.sleep(0.1)
        assert await relay.terminate() == 0
    said = [line["event"] for line in relay.log() if line["event"].startswith("users ")]
    assert said == ["users not read", "users read"]
