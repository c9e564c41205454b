"""`relay stats`: counts, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from rich.cells import cell_len

from relay.cli import main
from relay.cli.stats import bar, lines
from relay.records.by import By
from relay.records.statistics import Count, Statistics
from tests.support.recorded import configured, record
from tests.support.rows import make_record

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
ROW = make_record(
    "alice@example.com",
    task_id=UUID(int=1),
    sent_at=NOW,
    size=4096,
    duration_ms=12,
    recipients=("bob@example.net", "carol@example.net"),
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(tmp_path, monkeypatch)


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


@pytest.mark.parametrize("command", [["stats", "--by", "type"], ["sends"]])
def test_a_limit_beyond_what_can_be_counted_is_none(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record(ROW)
    assert main([*command, "--limit", str(2**64), "--format", "json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


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
