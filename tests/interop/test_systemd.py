"""The units, run by a real systemd: what they promise about rights, secrets, reload, restart and watchdog."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.interop.peers import free_port
from tests.support.booted import CGROUP, Manager
from tests.support.client import Client
from tests.support.image import NEEDED, Image
from tests.support.upstream import Command, ScriptedUpstream

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    *NEEDED,
    pytest.mark.skipif(
        not (CGROUP / "cgroup.procs").exists(), reason="no cgroup hierarchy of version 1 for systemd here"
    ),
]


@pytest.fixture(scope="module")
def root(image: Image) -> Path:
    return image.another_root()


@pytest.fixture
def manager(root: Path) -> Iterator[Manager]:
    found = Manager(root)
    found.forget()
    with found:
        yield found


def configure(manager: Manager, upstream: ScriptedUpstream, port: int, more: str = "") -> None:
    text = f'[[upstreams]]\naddress = "{upstream.address}"\ntls = "none"\n{more}'
    text += f'[[listeners]]\naddress = "127.0.0.1:{port}"\n[http]\naddress = "127.0.0.1:{free_port()}"\n'
    (manager.root / "etc/relay/relay.toml").write_text(text)


async def send(port: int) -> int:
    async with Client(port, deadline_s=30.0) as client:
        await client.ehlo()
        return (await client.message("a@example.com", ["b@example.org"], b"\r\ntext\r\n"))[-1].code


def rows(manager: Manager, name: str = "relay") -> int:
    file = manager.root / f"var/lib/private/{name}/data/task_done.db"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM task_done").fetchone()[0])


async def test_a_password_that_only_root_can_read(manager: Manager, upstream: ScriptedUpstream) -> None:
    """The relay has it, logs in with it, and has no other rights than it needs."""
    port = free_port()
    upstream.users = {"relay": "sesame"}
    configure(manager, upstream, port, 'username = "relay"\n')
    password = manager.root / "etc/relay/upstream_password"
    password.write_text("sesame\n")
    password.chmod(0o600)
    for unit in ("relay.service", "relay.socket", "relay.service.d/password.conf"):
        manager.install(unit, _2525=str(port))
    await asyncio.to_thread(manager.systemctl, "daemon-reload")
    await asyncio.to_thread(manager.systemctl, "start", "relay.socket", "relay.service")
    assert await send(port) == 250
    assert any(command.verb == "AUTH" for command in upstream.log if isinstance(command, Command))
    assert rows(manager) == 1

    main = manager.show("relay.service", "MainPID")
    status = manager.run("cat", f"/proc/{main}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert "Uid:\t0\t" not in status


async def test_reload_and_restart_lose_nobody(manager: Manager, upstream: ScriptedUpstream) -> None:
    """A reload keeps the process; over a restart every connection is taken, by the old relay or the new."""
    port = free_port()
    configure(manager, upstream, port)
    for unit in ("relay.service", "relay.socket"):
        manager.install(unit, _2525=str(port))
    await asyncio.to_thread(manager.systemctl, "daemon-reload")
    await asyncio.to_thread(manager.systemctl, "start", "relay.socket", "relay.service")
    assert manager.show("relay.service", "StatusText") == f"listening on 127.0.0.1:{port}"
    main = manager.show("relay.service", "MainPID")

    configure(manager, upstream, port, "max_connections = 7\n")
    await asyncio.to_thread(manager.systemctl, "reload", "relay.service")
    await asyncio.to_thread(manager.until, lambda: '"event":"reloaded"' in manager.journal())
    assert manager.show("relay.service", "ActiveState") == "active"
    assert manager.show("relay.service", "MainPID") == main

    restarted = asyncio.create_task(asyncio.to_thread(manager.systemctl, "restart", "relay.service"))
    heard: list[int] = []
    while not restarted.done() or len(heard) < 3:
        async with Client(port, deadline_s=60.0) as client:  # a refused connection is an error here
            heard.append((await client.reply()).code)
    await restarted
    # One after the other: at most one can come to the old relay in the moment in which it begins to drain.
    assert sorted(heard)[:-1] == [220] * (len(heard) - 1), heard
    assert heard[-1] == 220
    assert manager.show("relay.service", "MainPID") != main
    assert await send(port) == 250

    await asyncio.to_thread(manager.systemctl, "stop", "relay.socket", "relay.service")
    assert manager.show("relay.service", "ExecMainStatus") == "0"
    assert manager.show("relay.service", "Result") == "success"
    assert rows(manager) == 1


async def test_the_watchdog_starts_it_again(manager: Manager, upstream: ScriptedUpstream) -> None:
    port = free_port()
    configure(manager, upstream, port)
    manager.install("relay.service", WatchdogSec=" WatchdogSec")
    manager.install("relay.socket", _2525=str(port))
    soon = manager.units / "relay.service.d/soon.conf"
    soon.parent.mkdir()
    soon.write_text("[Service]\nWatchdogSec=3\n")
    await asyncio.to_thread(manager.systemctl, "daemon-reload")
    await asyncio.to_thread(manager.systemctl, "start", "relay.socket", "relay.service")
    main = manager.show("relay.service", "MainPID")
    await asyncio.to_thread(manager.run, "sh", "-c", f"kill -STOP {main}")
    await asyncio.to_thread(manager.until, lambda: manager.show("relay.service", "NRestarts") == "1", 90.0)
    await asyncio.to_thread(manager.until, lambda: manager.show("relay.service", "ActiveState") == "active")
    assert "Watchdog timeout" in manager.journal()
    assert await send(port) == 250


async def test_a_configuration_that_cannot_be_used_is_not_tried_again(
    manager: Manager, upstream: ScriptedUpstream
) -> None:
    port = free_port()
    configure(manager, upstream, port, "nonsense = 1\n")
    manager.install("relay.service")
    manager.install("relay.socket", _2525=str(port))
    await asyncio.to_thread(manager.systemctl, "daemon-reload")
    await asyncio.to_thread(manager.systemctl, "start", "relay.service", check=False)
    assert manager.show("relay.service", "ExecMainStatus") == "2"
    assert manager.show("relay.service", "ActiveState") == "failed"
    assert manager.show("relay.service", "NRestarts") == "0"
    assert "upstreams.0.nonsense: unknown key" in manager.journal()


async def test_several_share_a_port(manager: Manager, upstream: ScriptedUpstream) -> None:
    port = free_port()
    configure(manager, upstream, port)
    manager.install("relay@.service")
    for name in ("1", "2"):
        file = manager.root / f"etc/relay/{name}.env"
        file.write_text(f"RELAY__HTTP__ADDRESS=127.0.0.1:{free_port()}\n")
    await asyncio.to_thread(manager.systemctl, "daemon-reload")
    await asyncio.to_thread(manager.systemctl, "start", "relay@1", "relay@2")
    for _ in range(12):
        assert await send(port) == 250
    await asyncio.to_thread(manager.systemctl, "stop", "relay@1", "relay@2")
    assert rows(manager, "relay-1") + rows(manager, "relay-2") == 12
