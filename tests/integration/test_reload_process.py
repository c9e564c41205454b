"""SIGHUP to a relay process: from the files to what is in force, and nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

from tests.support.client import Client
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

MESSAGES, SESSIONS = 2000, 20


async def send(client: Client, number: int) -> int:
    content = b"From: a@example.test\r\nX-Task-ID: %d\r\n\r\ntext\r\n" % number
    replies = await client.message("a@example.test", ["b@example.test"], content)
    assert [reply.code for reply in replies] == [250, 250, 354, 250]
    return number


async def test_reloads_under_load(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    """Every 20 ms a SIGHUP, every second file cannot be used; all sessions stay open to the last message."""
    sections: list[dict[str, Any]] = [
        {"server": {"max_recipients": 7}, "log": {"level": "info"}},
        {"server": {"max_recipients": "seven", "hostnam": "x"}},
        {"server": {"idle_timeout": "3m"}, "listener": {"address": f"unix:{tmp_path / 'relay.sock'}"}},
        {"log": {"level": "loud"}},
        {
            "upstream": {"max_connections": 9},
            "expiry": {"interval": "1s"},
            "http": {"address": "127.0.0.1:1"},
        },
        {"upstream": {"tls_verify": False}},
        {"task_type": {"default": "mention"}, "retention": {"default": "1d"}},
        {"records": {"when_unavailable": "sometimes"}},
    ]
    async with RelayProcess(tmp_path, upstream.port) as relay:
        texts = [relay.text(**each) for each in sections]
        await relay.start()
        clients = [await Client.connect(relay.port) for _ in range(SESSIONS)]
        for client in clients:
            client.deadline_s = 60.0
            await client.ehlo()

        async def work(client: Client, begin: int) -> list[int]:
            return [await send(client, number) for number in range(begin, MESSAGES, SESSIONS)]

        working = [asyncio.ensure_future(work(client, begin)) for begin, client in enumerate(clients)]
        hangups = 0
        while not all(each.done() for each in working):
            relay.write(texts[hangups % len(texts)])
            os.kill(relay.pid, signal.SIGHUP)
            hangups += 1
            await asyncio.sleep(0.02)
        told = [number for each in working for number in await each]
        for client in clients:
            await client.quit()
        relay.write(texts[0])
        assert (await relay.reload())[-1]["event"] == "reloaded"
        assert await relay.terminate() == 0
        log = relay.log()
        events = [line["event"] for line in log]
        print(f"{hangups} SIGHUPs: {events.count('reloaded')} reloaded")
        assert events.count("reloaded") > 10
        assert events.count("reload refused") > 10
        assert "unforeseen" not in events
        assert "session refused" not in events
        assert sorted(told) == list(range(MESSAGES))
        assert sorted(int(row["client_task_id"]) for row in relay.rows()) == sorted(told)
        assert len(upstream.accepted) == MESSAGES
    assert relay.errors() == ""


async def test_mistakes_are_told_as_at_a_start(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        relay.write(relay.text(server={"hostnam": "x", "idle_timeout": "soon"}, log={"level": "loud"}))
        await relay.reload()
        await relay.until("config_last_reload_successful", 0)
        assert await relay.terminate() == 0
        reasons = [line["reason"] for line in relay.log() if line["event"] == "reload refused"]
        await relay.spawn()
        assert await relay.ended() == 2
        assert relay.errors().splitlines() == [f"relay: {reason}" for reason in reasons]
        assert len(reasons) == 3


async def test_the_environment_lies_over_the_file_that_is_read_again(
    tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        relay.environment["RELAY__SERVER__HOSTNAME"] = "environment.test"
        await relay.start()
        relay.write(relay.text(server={"hostname": "file.test", "max_recipients": 7}))
        assert (await relay.reload())[-1]["changed"] == ["server.max_recipients"]
        async with Client(relay.port) as client:
            assert (await client.greeting()).text.startswith("environment.test ")
        assert await relay.terminate() == 0


async def test_a_password_file_is_read_again(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    password = tmp_path / "password"
    password.write_text("one\n")
    password.chmod(0o600)
    login = {"username": "relay", "password_file": str(password)}
    async with RelayProcess(tmp_path, upstream.port, upstream=login) as relay:
        await relay.start()
        password.write_text("two\n")
        *_, line = await relay.reload()
        assert (line["event"], line["changed"]) == ("reloaded", ["upstreams.0.password"])
        password.write_text("")
        *_, line = await relay.reload()
        assert line["event"] == "reload refused"
        assert line["reason"] == f"{relay.config}: upstreams.0.password_file: {password} is empty"
        password.unlink()
        *_, line = await relay.reload()
        assert "cannot be read: No such file" in line["reason"]
        assert "two" not in relay.log_file.read_text()
        assert await relay.terminate() == 0


async def test_a_file_that_is_gone_changes_nothing(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port) as relay:
        await relay.start()
        relay.config.unlink()
        *_, line = await relay.reload()
        assert "no such file" in line["reason"]
        async with Client(relay.port) as client:
            await client.ehlo()
            await send(client, 1)
        assert await relay.terminate() == 0


async def test_warnings_are_told_again(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    async with RelayProcess(tmp_path, upstream.port, upstream={"tls": "opportunistic"}) as relay:
        await relay.start()
        relay.write(relay.text(upstream={"tls": "opportunistic", "tls_verify": False}))
        lines = await relay.reload()
        (warning,) = (line for line in lines if line["event"] == "warning")
        assert warning["text"].startswith("upstreams.0.tls_verify: off: ")
        assert await relay.terminate() == 0
