"""`relay demo` as people run it: a process of its own, real SMTP, records that can be asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from relay.cli import main
from relay.demo import configuration
from relay.demo.hour import BREAKS, MINUTES, the_hour
from relay.settings import load
from tests.interop.peers import free_port


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RELAY")}
    return clean | {
        "RELAY__LISTENERS__0__ADDRESS": "127.0.0.1:0",
        "RELAY__HTTP__ADDRESS": "127.0.0.1:0",
        "RELAY__UPSTREAMS__0__ADDRESS": f"127.0.0.1:{free_port()}",
    }


async def start(directory: Path, *options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "demo", "--directory", str(directory), *options),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


def test_the_hour_is_the_same_each_time_and_has_all_that_it_should() -> None:
    hour = the_hour()
    assert hour == the_hour()
    assert [mail.minute for mail in hour] == sorted(mail.minute for mail in hour)
    assert all(0 <= mail.minute < MINUTES for mail in hour)
    assert len({mail.task_type for mail in hour}) >= 7
    assert len({recipient.rpartition("@")[2] for mail in hour for recipient in mail.recipients}) >= 7
    assert sum(BREAKS in mail.recipients for mail in hour) == 1


@pytest.mark.parametrize("name", ['a "quoted" place', "50 % {of} \\ \x7f", "a\nb", "Straße"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    settings = load(configuration(tmp_path / name), {})
    assert settings.records.url == f"sqlite:///{tmp_path / name}/task_done.db"
    assert settings.records.spool == tmp_path / name / "spool"


async def test_an_hour_is_played_and_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "demo"
    demo = await start(directory, "--within", "4s", "--exit")
    try:
        said, _ = await asyncio.wait_for(demo.communicate(), 100)
    finally:
        if demo.returncode is None:
            demo.kill()
            await demo.wait()
    assert demo.returncode == 0, said.decode()
    text = said.decode()
    assert f"{len(the_hour())} messages" in text
    assert "  minute 60  " in text
    config = str(directory / "relay.toml")
    assert (
        await asyncio.to_thread(main, ["sends", "--config", config, "--limit", "0", "--format", "json"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) > 0.9 * len(the_hour())
    assert {row["task_type"] for row in rows} >= {"order-confirmation", "digest", "mention", "unclassified"}
    assert any("refused" in row["data"] for row in rows), "some recipients are refused"
    assert any(row["recipients"][0].endswith("@grey.example") for row in rows), "what was deferred came again"
    resets = [row for row in rows if row["task_type"] == "password-reset"]
    assert sum(row["recipients"] == ["gita.haas@example.com"] for row in resets) == 3, "the limit holds"
    if sys.platform == "linux":
        assert len({row["client"] for row in rows}) >= 4
    arguments = ["sends", "--config", config, "--in-doubt", "--format", "json"]
    assert await asyncio.to_thread(main, arguments) == 0
    (doubt,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert doubt["recipients"] == [BREAKS]


async def test_it_stays_until_it_is_told_to_end(tmp_path: Path) -> None:
    demo = await start(tmp_path / "demo", "--within", "1h")
    assert demo.stdout is not None
    try:
        async with asyncio.timeout(30):
            while b"An hour of mail" not in await demo.stdout.readline():
                pass
            demo.send_signal(signal.SIGINT)
            assert await demo.wait() == 0
    finally:
        if demo.returncode is None:
            demo.kill()
            await demo.wait()


def test_its_configuration_is_written_once(tmp_path: Path) -> None:
    file = configuration(tmp_path / "a" / "demo")
    file.write_text(file.read_text() + "# mine\n")
    assert configuration(tmp_path / "a" / "demo").read_text().endswith("# mine\n")


@pytest.mark.parametrize("within", ["soon", "0s"])
def test_a_wrong_duration_is_told(within: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--directory", str(tmp_path), "--within", within]) == 2
    said = capsys.readouterr().err
    assert said.startswith("relay: --within: ")
    assert said.count("\n") == 1


def test_beside_a_relay_that_runs_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name, value in (environment() | {"RELAY__UPSTREAMS__0__ADDRESS": address}).items():
            monkeypatch.setenv(name, value)
        assert main(["demo", "--directory", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("relay: the demonstration cannot start: ")
    assert second == (
        f"relay: end the relay that runs here, or change the addresses in {tmp_path}/relay.toml"
    )


def test_output_that_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relay", "demo", "--directory", str(tmp_path / "demo"), "--within", "1h"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60, env=environment()
        )
    said = b"relay: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
