"""The image: built from the Dockerfile, run as a container runs it, and a message goes through it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.interop.peers import free_port
from tests.support.client import Client
from tests.support.image import NEEDED, Image
from tests.support.upstream import ScriptedUpstream

pytestmark = NEEDED

MOST = 120_000_000
"""Octets that the image may have over its base."""


@pytest.fixture
def data(image: Image, tmp_path: Path) -> Path:
    """A volume as Docker makes it: with the owner that the image gave the directory."""
    volume = tmp_path / "data"
    volume.mkdir(mode=0o750)
    inside = (image.root / "data").stat()
    os.chown(volume, inside.st_uid, inside.st_gid)
    return volume


def rows(data: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{data / 'task_done.db'}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT sender, task_type FROM task_done").fetchall()


def alone(upstream: ScriptedUpstream) -> dict[str, str]:
    """Configuration by the environment: one upstream, and addresses that are free on this machine."""
    return {
        "RELAY__UPSTREAMS__0__ADDRESS": upstream.address,
        "RELAY__UPSTREAMS__0__TLS": "none",
        "RELAY__LISTENERS__0__ADDRESS": "127.0.0.1:0",
        "RELAY__HTTP__ADDRESS": f"127.0.0.1:{free_port()}",
    }


def port_of(started: dict[str, Any]) -> int:
    return int(started["listeners"][0].rpartition(":")[2])


def test_what_is_in_it(image: Image) -> None:
    assert image.added() < MOST
    for tool in ("cc", "gcc", "c++", "clang", "ld", "as", "make", "rustc"):
        for place in ("usr/bin", "usr/local/bin", "opt/relay/bin"):
            assert not (image.root / place / tool).exists()
    assert not list(image.root.glob("opt/relay/lib/python*/site-packages/pip"))
    assert not (image.root / "src").exists()
    for path in (image.root / "opt").rglob("*"):
        found = path.lstat()
        assert found.st_uid == 0
        assert path.is_symlink() or not found.st_mode & 0o022, path
    directory = (image.root / "data").stat()
    assert (directory.st_uid, directory.st_gid, directory.st_mode & 0o777) == (10001, 10001, 0o750)


def test_what_it_says_of_itself(image: Image) -> None:
    assert image.config["User"] == "10001:10001"
    assert image.config["StopSignal"] == "SIGTERM"
    assert image.config["Entrypoint"] == ["relay"]
    assert set(image.config["Volumes"]) == {"/data"}
    assert set(image.config["ExposedPorts"]) == {"2525/tcp", "9025/tcp"}
    assert image.config["Healthcheck"]["Test"] == ["CMD", "relay", "health"]


async def test_a_message_goes_through_it_and_a_stop_drains(
    image: Image, data: Path, upstream: ScriptedUpstream
) -> None:
    """The root is read-only, nothing but the environment configures it, and it is process 1."""
    environment = alone(upstream)
    check = image.config["Healthcheck"]["Test"][1:]
    content = b"X-Task-Type: order\r\n\r\ntext\r\n"
    with image.container(data, environment) as container:
        started = await asyncio.to_thread(container.event, "started")
        assert started["compiled"] is True
        port = port_of(started)
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert "Uid:\t10001\t10001\t10001\t10001" in status
        assert "NSpid:\t" + f"{container.pid}\t1" in status
        for command in (["relay", "--help"], ["relay", "check"], ["relay", "sends"], ["relay", "schema"]):
            done = await asyncio.to_thread(image.run, data, environment, command)
            assert done.returncode == 0, done.stderr
        healthy = await asyncio.to_thread(image.run, data, environment, check)
        assert (healthy.returncode, healthy.stdout) == (0, "ok\n"), healthy.stderr
        async with Client(port) as client:
            await client.ehlo()
            assert (await client.message("a@example.com", ["b@example.org"], content))[-1].code == 250
            assert rows(data) == [("a@example.com", "order")]
            for command in ("MAIL FROM:<c@example.com>", "RCPT TO:<d@example.org>", "DATA"):
                await client.command(command)
            container.signal(image.config["StopSignal"])
            await asyncio.to_thread(container.event, "draining")
            await client.send(content + b".\r\n")
            await client.expect(250)
            await client.expect(421)
        assert await asyncio.to_thread(container.ended) == 0
        container.event("stopped")
    assert [sender for sender, _ in rows(data)] == ["a@example.com", "c@example.com"]
    ill = await asyncio.to_thread(image.run, data, environment, check)
    assert ill.returncode == 1
    assert "no answer from http://" in ill.stderr


async def test_a_file_in_place_of_the_images_own(
    image: Image, data: Path, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(
        f'[[upstreams]]\naddress = "{upstream.address}"\ntls = "none"\n'
        '[[listeners]]\naddress = "127.0.0.1:0"\n[http]\naddress = "127.0.0.1:0"\n'
    )
    config.chmod(0o644)
    with image.container(data, {}, config=config) as container:
        port = port_of(await asyncio.to_thread(container.event, "started"))
        async with Client(port) as client:
            await client.ehlo()
            assert (await client.message("a@example.com", ["b@example.org"], b"\r\ntext\r\n"))[-1].code == 250
    # Relative to /, the default paths lie in the volume too.
    assert rows(data) == [("a@example.com", "unclassified")]


def test_without_an_upstream_it_says_what_is_missing(image: Image, data: Path) -> None:
    done = image.run(data, {}, ["relay", "serve"])
    assert done.returncode == 2
    assert "/etc/relay/relay.toml: upstreams" in done.stderr


def test_the_root_is_read_only_in_these_tests(image: Image, data: Path) -> None:
    done = image.run(data, {}, ["touch", "/opt/relay/probe"], user="0:0")
    assert "Read-only file system" in done.stderr
    assert image.run(data, {}, ["touch", "/data/probe"]).returncode == 0
