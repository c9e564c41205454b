"""`relay stats`, `relay sends show` and `--follow`."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from rich.cells import cell_len

from relay.cli import main
from relay.cli.stats import bar, lines
from relay.records.by import By
from relay.records.model import Doubt, Record
from relay.records.retention import Retention
from relay.records.statistics import Count, Statistics
from relay.records.store import open_store

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="alice@example.com",
    client="app",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250-2.0.0 Ok:\n250 2.0.0 queued as 4F3A \x1b[31m",
    size=4096,
    duration_ms=12,
    recipients=("bob@example.net", "carol@example.net"),
    client_task_id="order 7",
    message_id="<1@example.com>",
    data={
        "headers": {"Message-ID": "<1@example.com>", "X-A": ["1", "2"]},
        "tags": ["a", "b"],
        "refused": [{"recipient": "x@example.net", "reply": "550 no"}],
        "client_reply": None,
        "client_address": "192.0.2.1",
    },
)
DOUBT = Doubt(
    since=NOW,
    reason="closed",
    **{name: getattr(ROW, name) for name in ("task_type", "sender", "client", "upstream", "size")},
    **{name: getattr(ROW, name) for name in ("duration_ms", "recipients", "message_id", "data")},
    task_id=UUID(int=9),
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("relay.toml").write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')
    monkeypatch.setenv("RELAY_CONFIG", "relay.toml")


def record(*rows: Record | Doubt) -> None:
    async def write() -> None:
        store = await open_store("sqlite:///data/task_done.db", Retention(timedelta(days=30)))
        await store.write(rows)
        await store.close()

    asyncio.run(write())


def some() -> None:
    record(
        ROW,
        replace(ROW, task_id=UUID(int=2), task_type="digest", sent_at=NOW + timedelta(hours=2)),
        replace(ROW, task_id=UUID(int=3), sender="", sent_at=NOW + timedelta(hours=2)),
    )


# Counts


def test_counts_for_people_who_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    some()
    assert main(["stats", "--by", "type"]) == 0
    assert capsys.readouterr().out == "TYPE     MESSAGES\nmention         2\ndigest          1\n"


def test_counts_by_time(capsys: pytest.CaptureFixture[str]) -> None:
    some()
    assert main(["stats", "--by", "hour", "--tz", "Asia/Kolkata", "--since", "2026-11-23"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "HOUR              MESSAGES",
        "2026-11-23 13:00         1",
        "2026-11-23 14:00         0",
        "2026-11-23 15:00         2",
    ]


def test_by_domain_recipients_are_counted_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    record(ROW, replace(ROW, task_id=UUID(int=2), recipients=("ann@example.org",)))
    assert main(["stats", "--by", "recipient-domain", "--limit", "1"]) == 0
    assert capsys.readouterr().out == (
        "RECIPIENT DOMAIN  RECIPIENTS\nexample.net                2\n... 1 more; 3 recipients in all\n"
    )
    assert main(["stats", "--by", "recipient-domain", "--limit", "1", "--detail"]) == 0
    assert capsys.readouterr().out.startswith(
        "RECIPIENT DOMAIN  RECIPIENTS  OCTETS  AVERAGE MS  SLOWEST MS\n"
    )


def test_counts_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    some()
    assert main(["stats", "--by", "sender", "--format", "json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"sender": "alice@example.com", "messages": 2},
        {"sender": "", "messages": 1},
    ]
    assert main(["stats", "--by", "day", "--by", "type", "--format", "csv", "--detail", "--tz", "UTC"]) == 0
    assert next(iter(csv.DictReader(capsys.readouterr().out.splitlines()))) == {
        "day": "2026-11-23",
        "type": "mention",
        "messages": "2",
        "recipients": "4",
        "octets": "8192",
        "average_ms": "12.0",
        "slowest_ms": "12",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "weather"], "'weather' is not one of"),
        ([], "missing option '--by'"),
        (["--by", "type", "--by", "type"], "takes one thing, or two different ones"),
        (["--by", "type", "--since", "soon"], "'--since': takes a time ago"),
        (["--by", "type", "--tz", "Mars/Olympus"], "'--tz': takes the name of a time zone"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("data").exists()


def test_nothing_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    some()
    assert main(["stats", "--by", "type", "--type", "none"]) == 0
    assert capsys.readouterr() == ("", "relay: no sends found\n")
    assert main(["stats", "--by", "type", "--type", "none", "--format", "csv"]) == 0
    assert capsys.readouterr() == ("type,messages\n", "")


FOUND = Statistics(
    [Count(("newsletter\x1b[31m" + "x" * 60,), 200_000), Count(("漢字",), 100_000), Count(("",), 1)],
    300_101,
    5,
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_bars_fit_the_terminal(width: int) -> None:
    found = list(lines(FOUND, [By.TYPE], width))
    assert all(cell_len(line) <= width for line in found)
    assert ("█" in found[1]) == (width > 40)
    assert found[-1] == "... 2 more; 300,101 messages in all"
    assert "\x1b" not in "".join(found)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_two_keys_fit_the_terminal_too(width: int) -> None:
    long = Statistics([Count(("someone@" + "x" * 40, "y" * 60), 1), Count(("漢字" * 20, ""), 1)], 2, 2)
    found = list(lines(long, [By.SENDER, By.RECIPIENT_DOMAIN], width))
    assert all(cell_len(line) <= width for line in found)
    assert ("someone@" + "x" * 40 in found[1]) == (width == 200)


def test_a_bar_is_as_long_as_its_value() -> None:
    assert bar(8, 8, 10) == "█" * 10
    assert bar(4, 8, 10) == "█" * 5
    assert bar(1, 1000, 10) == "▏"
    assert bar(0, 8, 10) == ""
    assert bar(0, 0, 10) == ""
    lengths = [len(bar(value, 800, 100)) for value in range(801)]
    assert lengths == sorted(lengths)


def test_every_encoding_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    record(ROW, replace(ROW, task_id=UUID(int=2), task_type="Rückfrage"))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, "-m", "relay", "stats", "--by", "type"]
    said = subprocess.run(command, capture_output=True, check=False)
    assert (said.returncode, said.stderr) == (0, b"")
    assert b"R\\xfcckfrage" in said.stdout
    for output in ("csv", "json"):
        said = subprocess.run([*command, "--format", output], capture_output=True, check=True)
        assert "Rückfrage" in said.stdout.decode() or r"R\u00fcckfrage" in said.stdout.decode()


# One send


def test_everything_about_one_send(capsys: pytest.CaptureFixture[str]) -> None:
    record(ROW, DOUBT)
    assert main(["sends", "show", str(UUID(int=1)), "--tz", "Asia/Kolkata"]) == 0
    said = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert {name: value.strip() for name, value in said if name.strip()} == {
        "task id": str(UUID(int=1)),
        "client's task id": "order 7",
        "state": "accepted",
        "sent at": "2026-11-23 13:16:00.123456 +0530",
        "expires at": "2026-12-23 13:16:00.123456 +0530",
        "type": "mention",
        "sender": "alice@example.com",
        "recipients": "bob@example.net",
        "client": "app",
        "upstream": "primary",
        "accepted as": "4F3A",
        "reply": "250-2.0.0 Ok:",
        "Message-ID": "<1@example.com>",
        "size": "4,096 octets",
        "took": "12 ms",
        "header Message-ID": "<1@example.com>",
        "header X-A": "1",
        "tags": "a, b",
        "refused": "x@example.net: 550 no",
        "client reply": "(its connection had broken)",
        "client address": "192.0.2.1",
    }
    assert r"250 2.0.0 queued as 4F3A \x1b[31m" in [value.strip() for _, value in said]
    assert main(["sends", "show", str(UUID(int=9))]) == 0
    said_of_doubt = capsys.readouterr().out
    assert "in doubt\n" in said_of_doubt
    assert "closed\n" in said_of_doubt
    assert main(["sends", "show", str(UUID(int=9)), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "closed"


def test_no_such_send(capsys: pytest.CaptureFixture[str]) -> None:
    record(ROW)
    assert main(["sends", "show", str(UUID(int=5))]) == 1
    assert "no send has this task id" in capsys.readouterr().err
    assert main(["sends", "show", "5"]) == 2
    assert "'--task-id': takes a UUID" in capsys.readouterr().err


def test_wildcards_and_the_upstream(capsys: pytest.CaptureFixture[str]) -> None:
    some()
    assert main(["sends", "--recipient", "*@example.net", "--upstream", "prim*", "--type", "m*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["sends", "--recipient", "*@example.org"]) == 0
    assert "no sends found" in capsys.readouterr().err


# On and on


@pytest.fixture
def following() -> Iterator[subprocess.Popen[str]]:
    record(ROW, replace(ROW, task_id=UUID(int=2), sent_at=NOW + timedelta(seconds=1)))
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "sends", "--follow", "--format", "json", "--type", "mention"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_new_rows_are_printed_as_they_come(following: subprocess.Popen[str]) -> None:
    assert following.stdout is not None
    numbers = [UUID(json.loads(following.stdout.readline())["task_id"]).int for _ in range(2)]
    assert numbers == [1, 2]
    record(
        replace(ROW, task_id=UUID(int=3), task_type="digest"),
        replace(ROW, task_id=UUID(int=4), sent_at=NOW - timedelta(days=1)),  # late, from the spool
    )
    record(replace(ROW, task_id=UUID(int=5)))
    numbers = [UUID(json.loads(following.stdout.readline())["task_id"]).int for _ in range(2)]
    assert numbers == [4, 5]


def test_a_row_that_comes_while_it_begins_is_printed() -> None:
    record(ROW)
    script = (
        "import sys; from relay.records.queries import Queries; page = Queries.page\n"
        "async def held(*asked):\n"
        "    found = await page(*asked); print('read', file=sys.stderr, flush=True); sys.stdin.readline()\n"
        "    return found\n"
        "Queries.page = held; from relay.cli import main; main(['sends', '--follow', '--format', 'json'])"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "read\n"
        record(replace(ROW, task_id=UUID(int=2)))
        process.stdin.write("\n")
        process.stdin.flush()
        record(replace(ROW, task_id=UUID(int=3)))
        found = []
        while not found or found[-1] != 3:  # the one that came afterwards is printed in any case
            found.append(UUID(json.loads(process.stdout.readline())["task_id"]).int)
        process.kill()
    assert found == [1, 2, 3]


def test_an_end_from_the_keyboard_is_no_error(following: subprocess.Popen[str]) -> None:
    assert following.stdout is not None
    following.stdout.readline()
    following.send_signal(2)
    _, said = following.communicate(timeout=30)
    assert "Traceback" not in said
    assert following.returncode in (0, 130)


def test_following_takes_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sends", "--follow", "--until", "today"]) == 2
    assert "does not go with --until" in capsys.readouterr().err


def test_a_long_export_says_how_far_it_is_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    record(*(replace(ROW, task_id=UUID(int=n)) for n in range(1, 900)))
    script = (
        "import relay.cli.sends as s; s.PROGRESS_S = 0.0; from relay.cli import main; "
        "main(['sends', '--limit', '0', '--format', 'csv'])"
    )
    master, slave = pty.openpty()
    with Path("out.csv").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=slave, check=True, timeout=60
        )
    os.close(slave)
    said = os.read(master, 10_000).decode()
    os.close(master)
    assert done.returncode == 0
    assert "\r200 rows" in said
    assert said.endswith("\r\x1b[K")
    assert len(list(csv.reader(Path("out.csv").read_text().splitlines()))) == 900


# Where it is written


class Narrow(io.StringIO):
    """A terminal that has no bars."""

    encoding = "iso-8859-1"

    def isatty(self) -> bool:
        return True


def test_no_bars_where_the_encoding_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    record(replace(ROW, sender="j\u202erg@example.com"))
    for output, expected in (
        ("table", "MESSAGES\x1b[0m\nj\\u202erg@example.com         1\n"),
        ("csv", "j\\u202erg"),
    ):
        out = Narrow()
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["stats", "--by", "sender", f"--format={output}"]) == 0
        assert expected in out.getvalue()
