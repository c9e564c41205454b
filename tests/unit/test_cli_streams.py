"""Standard streams that are closed, full or read by nobody: real processes."""

from __future__ import annotations

import asyncio
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import ROOT, RelayProcess
from tests.support.upstream import ScriptedUpstream

CONFIG = """
[[upstreams]]
address = "smtp.example.com:587"
[[limits]]
scope = "sender"
max = 10
per = "1h"
"""
# Standard output keeps what it could not write, but for an interpreter that is told to keep nothing.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
for name in ("PYTHONUNBUFFERED", "NO_COLOR"):
    ENVIRONMENT.pop(name, None)
COMMANDS = [["--version"], ["--help"], ["schema"], ["check", "--config=relay.toml"]]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("relay.toml").write_text(CONFIG)


def run(redirection: str, *arguments: str, **environment: str) -> tuple[int, bytes, bytes]:
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "relay", *arguments]
    done = subprocess.run(
        command, capture_output=True, check=False, timeout=30, env=ENVIRONMENT | environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", b"No space left on device"), (">&-", b"Bad file descriptor")]
)
def test_what_cannot_be_written_is_told_in_a_line(
    command: list[str], redirection: str, reason: bytes
) -> None:
    assert run(redirection, *command) == (1, b"", b"relay: cannot write to standard output: %b\n" % reason)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_reader_that_has_gone_is_no_complaint(command: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "relay", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        timeout=30,
        env=ENVIRONMENT,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_status_is_that_of_the_mistake_where_nobody_can_be_told() -> None:
    for redirection in ("2>&-", "2>/dev/full", ">&- 2>&- <&-"):
        assert run(redirection, "check", "--config=none.toml")[0] == 2


def test_every_encoding_will_do() -> None:
    Path("名.toml").write_text(CONFIG)
    status, out, error = run("", "check", "--config=名.toml", PYTHONIOENCODING="latin-1")
    assert (status, error) == (0, b"")
    assert out.startswith(b"\\u540d.toml is valid.\n")


@pytest.mark.parametrize("closed", [{0}, {1}, {2}, {0, 1, 2}])
async def test_a_relay_without_standard_streams_serves_and_stops_in_order(
    closed: set[int], tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    # Its own files get other numbers.
    redirections = " ".join(f"{number}<&-" for number in sorted(closed))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with RelayProcess(tmp_path, upstream.port, listener={"address": f"127.0.0.1:{port}"}) as relay:
        relay.launcher = ("sh", "-c", f'exec "$@" {redirections}', "sh")
        await relay.spawn()
        async with asyncio.timeout(30):
            while not await _listens(port):
                assert relay.running, relay.errors()
                await asyncio.sleep(0.02)
        async with Client(port) as client:
            await client.ehlo()
            replies = await client.message("a@example.com", ["b@example.org"], b"\r\ntext\r\n")
            assert replies[-1].code == 250
        for number in closed:
            assert Path(f"/proc/{relay.pid}/fd/{number}").resolve() == Path(os.devnull)
        assert await relay.terminate() == 0
    assert relay.errors() == ""
    assert len(relay.rows()) == 1


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


def test_a_log_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(
        f'[[upstreams]]\naddress = "127.0.0.1:1"\ntls = "none"\n[[listeners]]\naddress = "127.0.0.1:0"\n'
        f'[http]\naddress = "127.0.0.1:0"\n[records]\nurl = "sqlite:///{tmp_path}/rows.db"\nspool = "spool"\n'
    )
    command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "-m", "relay", "serve"]
    with subprocess.Popen(
        [*command, "--config", str(config)], stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as relay:
        while not (tmp_path / "spool" / "lock").exists():
            assert relay.poll() is None
            time.sleep(0.01)
        relay.terminate()
        _, error = relay.communicate(timeout=60)
        assert (relay.returncode, error) == (0, b"")


@pytest.mark.parametrize(
    ("environment", "colours"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=str,
)
@pytest.mark.parametrize("log", [False, True])
def test_colours_are_for_terminals_that_have_them_and_people_who_want_them(
    log: bool, environment: dict[str, str], colours: bool
) -> None:
    # Nobody listens there; and a spool that is no directory ends the start behind the first lines of the log.
    Path("relay.toml").write_text(
        '[[upstreams]]\naddress = "127.0.0.1:1"\ntls = "none"\n[log]\nformat = "console"\n'
        '[records]\nspool = "relay.toml"\n'
    )
    command = ["serve"] if log else ["check", "--connect"]
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "relay", *command, "--config=relay.toml"],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=30,
        env=ENVIRONMENT | {"TERM": "xterm"} | environment,
    )
    os.close(theirs)
    assert done.returncode == 1
    assert (b"\x1b[" in os.read(ours, 65536)) == colours
    os.close(ours)
