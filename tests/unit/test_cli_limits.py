"""`relay limits`: what it prints, for people and for programs."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from rich.cells import cell_len

from relay.cli import main
from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.store import open_store

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = """
[[limits]]
name = "mentions"
scope = "sender"
task_type = "mention"
max = 10
per = "1d"

[[limits]]
scope = "recipient_domain"
max_recipients = 24
per = "1d"
action = "observe"

[[limits]]
scope = "all"
max = 1000
per = "1d"
"""


@pytest.fixture
async def config(tmp_path: Path) -> Path:
    """Return a configuration whose store has 10 mentions of a day, each to two in a domain, and 2 older."""
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    store = await open_store(url, Retention.of_seconds(None, {}))
    now = datetime.now(UTC)
    ages = [timedelta(hours=n) for n in range(10)] + [timedelta(hours=25)] * 2
    await store.write(
        [
            Record(
                task_id=uuid4(),
                task_type="mention",
                sender="A@Example.com\x1b",
                client="192.0.2.1",
                sent_at=now - age,
                upstream="primary",
                upstream_reply="250 ok",
                size=100,
                duration_ms=1,
                recipients=("b@example.org", "c@Example.org"),
            )
            for age in ages
        ]
    )
    await store.close()
    file = tmp_path / "relay.toml"
    file.write_text(f'[[upstreams]]\naddress = "smtp.example.com:587"\n[records]\nurl = "{url}"\n{LIMITS}')
    return file


def said(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["limits", "--config", str(config), *arguments]) == 0
    return capsys.readouterr().out


def test_people_see_who_is_near_and_who_is_over(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(config, capsys).splitlines()
    assert lines[0].split() == ["LIMIT", "LETS", "PASS", "ACTION", "WHO", "USED", "ROOM", "AGAIN"]
    assert "10 messages in 1d for each sender" in lines[1]
    assert r"a@example.com\x1b  10 (over)" in lines[1]
    assert "in 15h" in lines[1] or "in 14h59m" in lines[1]
    assert "24 recipients in 1d for each recipient_domain" in lines[2]
    assert "example.org" in lines[2]
    assert "20 (near)  there is" in lines[2]
    assert "nobody is near" in lines[3]
    assert len(lines) == 4


def in_terminal(config: Path, columns: int, *arguments: str) -> str:
    """Return what a terminal of so many columns is sent."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "relay", "limits", "--config", str(config), *arguments]
    with subprocess.Popen(command, stdout=its, env={**os.environ, "PYTHONIOENCODING": "utf-8"}) as process:
        os.close(its)
        said = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while part := os.read(ours, 65536):
                said += part
    os.close(ours)
    assert process.returncode == 0
    return said.decode().replace("\r\n", "\n")


async def test_letters_that_take_two_cells_do_not_move_the_columns(config: Path) -> None:
    store = await open_store(f"sqlite:///{config.parent / 'rows.db'}", Retention.of_seconds(None, {}))
    row = Record(uuid4(), "mention", "日本語" * 9, "c", datetime.now(UTC), "u", "250", 1, 1, ("b@x.org",))
    await store.write([replace(row, task_id=uuid4()) for _ in range(11)])
    await store.close()
    header, *lines = (await asyncio.to_thread(in_terminal, config, 80)).splitlines()
    assert max(map(cell_len, [header, *lines])) <= 80
    (wide,) = [line for line in lines if "日" in line]
    assert cell_len(wide[: wide.index("11")]) == header.index("USED")


def test_a_terminal_is_not_driven_by_what_came_over_the_wire(config: Path) -> None:
    for output in ("table", "json", "csv"):
        assert "\x1b" not in in_terminal(config, 80, "--format", output)


def test_programs_read_json_and_csv(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [json.loads(line) for line in said(config, capsys, "--format", "json").splitlines()]
    assert [limit["name"] for limit in found] == ["mentions", "recipient_domain-1d", "all-1d"]
    (key,) = found[0]["keys"]
    assert (key["key"], key["used"], key["state"]) == ("a@example.com\x1b", 10, "over")
    assert 14.9 * 3600 < key["room_in_s"] < 15 * 3600
    assert found[1]["keys"][0]["room_in_s"] is None
    rows = list(csv.DictReader(io.StringIO(said(config, capsys, "--format", "csv"))))
    assert [(row["name"], row["used"], row["state"]) for row in rows] == [
        ("mentions", "10", "over"),
        ("recipient_domain-1d", "20", "near"),
        ("all-1d", "", ""),
    ]


def test_without_limits_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')
    assert main(["limits", "--config", str(file)]) == 0
    assert capsys.readouterr().err == "relay: no limits are configured\n"


def test_a_store_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "relay.toml"
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    file.write_text(f'[[upstreams]]\naddress = "smtp.example.com:587"\n[records]\nurl = "{url}"\n{LIMITS}')
    assert main(["limits", "--config", str(file)]) == 1
    assert "no such file" in capsys.readouterr().err


def test_check_names_the_limits(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--config", str(config)]) == 0
    assert "mentions: sender, 10 messages in 1d, defer" in capsys.readouterr().out
