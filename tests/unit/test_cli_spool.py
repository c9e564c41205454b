"""`relay spool`."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.cli import main
from relay.records.identity import uuid7
from relay.records.model import Record
from relay.records.retention import Retention
from relay.records.spool import Spool
from relay.records.spool_line import encode
from relay.records.store import open_store
from tests.support.rows import spool_line

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
SPOOL = Path("data/spool")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Path("relay.toml").write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')
    monkeypatch.setenv("RELAY_CONFIG", "relay.toml")
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def record(sender: str = "a@example.com", age: int = 0, **changed: object) -> Record:
    values: dict[str, object] = {
        "task_id": uuid7(),
        "task_type": "mention",
        "sender": sender,
        "client": "127.0.0.1",
        "sent_at": NOW - timedelta(hours=age),
        "upstream": "primary",
        "upstream_reply": "250 ok",
        "size": 1,
        "duration_ms": 1,
        "recipients": ("b@example.org", "c@example.org"),
    }
    return Record(**(values | changed))  # type: ignore[arg-type]


def fill(*rows: Record, rejected: Record | None = None, reason: str = "value too long") -> None:
    spool = Spool(SPOOL)
    spool.append([encode(row) for row in rows])
    if rejected is not None:
        spool.set_aside(encode(rejected, reason))
    spool.close()


def senders() -> list[str]:
    with closing(sqlite3.connect("data/task_done.db")) as database:
        return [row[0] for row in database.execute("SELECT sender FROM task_done ORDER BY id")]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    fill(record(age=2), record(), rejected=record())
    (SPOOL / "corrupt.jsonl").write_bytes(b"rubbish\n")

    assert main(["spool", "list"]) == 0

    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in out[:3]] == [
        ["FILE", "ROWS", "OLDEST", "NEWEST", "SIZE", "CORRUPT"],
        ["000000000001.jsonl", "2", "2026-11-23", "11:16:00", "2026-11-23", "13:16:00"],
        ["rejected.jsonl", "1", "2026-11-23", "13:16:00", "2026-11-23", "13:16:00"],
    ]
    assert out[3:] == [
        "2 rows wait for the store in data/spool",
        "1 row rejected by the store: relay spool list --rows says why",
        "1 line not readable in corrupt.jsonl",
        "0 KiB of disk space taken ahead",
    ]


def test_list_for_programs_beside_a_relay_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spool = Spool(SPOOL)
    row = record()
    spool.append([encode(row)])

    assert main(["spool", "list", "--format", "json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["directory"], found["rows"], found["corrupt_lines"]) == ("data/spool", 1, 0)
    assert found["segments"][0] == {
        "name": "000000000001.jsonl",
        "rows": 1,
        "corrupt": 0,
        "oldest": NOW.isoformat(),
        "newest": NOW.isoformat(),
        "size": len(encode(row)),
        "reserve": (1 << 20) - len(encode(row)),
    }
    assert found["reserve"] == (2 << 20) - len(encode(row))
    spool.close()


def test_list_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record("a@example.com"), record("", recipients=("b@\x1b.example",))]
    fill(*rows, rejected=record("c@example.com"), reason="no such column")

    assert main(["spool", "list", "--rows"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["FILE", "TIME", "TASK", "ID", "TYPE", "SENDER", "RECIPIENTS", "REASON"]
    assert [line.split()[4:] for line in lines] == [
        ["mention", "a@example.com", "b@example.org", "+1"],
        ["mention", "<>", "b@\\x1b.example"],
        ["mention", "c@example.com", "b@example.org", "+1", "no", "such", "column"],
    ]

    assert main(["spool", "list", "--rows", "--format", "json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sender"] for row in shown] == ["a@example.com", "", "c@example.com"]
    assert shown[0]["task_id"] == str(rows[0].task_id)
    assert (shown[2]["file"], shown[2]["reason"]) == ("rejected.jsonl", "no such column")


def test_rows_that_hold_what_no_row_of_this_version_holds(capsys: pytest.CaptureFixture[str]) -> None:
    fill(record(recipients=(), task_type="x"))
    segment = SPOOL / "000000000001.jsonl"
    octets = b'{"task_id":"1","since":"the day after","recipients":7}'
    segment.write_bytes(spool_line("record", octets) + b"rubbish\n")

    assert main(["spool", "list", "--rows"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["the", "day", "after"]
    assert main(["spool", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "1"


def test_no_spool_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "list"]) == 0
    assert capsys.readouterr().err == "relay: no spool data/spool yet\n"
    assert main(["spool", "list", "--rows", "--format", "json"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["spool", "list", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 0
    assert main(["spool", "replay"]) == 0
    assert capsys.readouterr().out == "nothing waits: there is no spool data/spool yet\n"
    assert not SPOOL.exists()


def test_an_empty_spool(capsys: pytest.CaptureFixture[str]) -> None:
    Spool(SPOOL).close()

    assert main(["spool", "list"]) == 0
    assert capsys.readouterr().out == (
        "0 rows wait for the store in data/spool\n0 KiB of disk space taken ahead\n"
    )
    assert main(["spool", "list", "--rows"]) == 0
    assert capsys.readouterr().err == "relay: no rows found\n"
    assert main(["spool", "replay", "--rejected"]) == 0
    assert capsys.readouterr().out == "0 rows carried into the store\n"


def test_a_spool_that_is_no_directory(capsys: pytest.CaptureFixture[str]) -> None:
    SPOOL.parent.mkdir()
    SPOOL.touch()

    for command in (["list"], ["list", "--rows"], ["replay"]):
        assert main(["spool", *command]) == 1
        assert capsys.readouterr().err.startswith("relay: spool data/spool: ")


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    fill(*(record(f"{number}@example.com") for number in range(3)))

    assert main(["spool", "replay"]) == 0

    assert capsys.readouterr().out == "3 rows carried into the store\n"
    assert senders() == ["0@example.com", "1@example.com", "2@example.com"]
    assert [path.name for path in SPOOL.iterdir()] == ["lock"]


def test_replay_sets_aside_what_the_store_will_never_take(capsys: pytest.CaptureFixture[str]) -> None:
    fill(record("a@example.com"), record("b@example.com", size=1 << 70), record("c@example.com"))
    with (SPOOL / "000000000001.jsonl").open("ab") as segment:
        segment.write(b"rubbish\n")

    assert main(["spool", "replay"]) == 1

    assert capsys.readouterr().out == (
        "2 rows carried into the store; 1 row rejected, see rejected.jsonl; "
        "1 line not readable, see corrupt.jsonl\n"
    )
    assert senders() == ["a@example.com", "c@example.com"]


def test_replay_beside_a_relay_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spool = Spool(SPOOL)
    assert main(["spool", "replay"]) == 1
    assert capsys.readouterr().err == "relay: data/spool belongs to a relay that runs; no rows wait\n"

    spool.append([encode(record())])
    assert main(["spool", "replay"]) == 1
    assert capsys.readouterr().err == (
        "relay: data/spool belongs to a relay that runs; "
        "1 row waits, replayed as soon as the store takes them\n"
    )
    assert not Path("data/task_done.db").exists()
    spool.close()


def test_replay_into_a_store_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    fill(record())
    Path("data/task_done.db").write_bytes(b"not a database, but long enough to be taken for one" * 100)

    assert main(["spool", "replay"]) == 1

    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("relay: data/task_done.db")
    assert said[1:] == ["relay: what is not in the store waits as before"]
    assert main(["spool", "list"]) == 0
    assert "1 row waits" in capsys.readouterr().out


def test_rejected_rows_are_replayed_beside_a_relay_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused again goes back, also what the relay rejects in between."""
    spool = Spool(SPOOL)
    good, poison = record("good@example.com"), record("poison@example.com", size=1 << 70)
    spool.set_aside(encode(good, "no such column"))
    spool.set_aside(encode(poison, "value too large"))

    assert main(["spool", "replay", "--rejected"]) == 1

    assert capsys.readouterr().out == ("1 row carried into the store; 1 row rejected, see rejected.jsonl\n")
    assert senders() == ["good@example.com"]
    spool.set_aside(encode(record("later@example.com"), "no such column"))
    assert main(["spool", "list", "--rows", "--format", "json"]) == 0
    waiting = [json.loads(line)["sender"] for line in capsys.readouterr().out.splitlines()]
    assert waiting == ["poison@example.com", "later@example.com"]
    spool.close()


def test_progress_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fill(*(record() for _ in range(501)))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    assert main(["spool", "replay"]) == 0

    said = capsys.readouterr()
    assert said.err == "\r500 rows\r501 rows"
    assert said.out == "\n501 rows carried into the store\n"


def test_rows_that_are_there_already_are_not_written_twice(capsys: pytest.CaptureFixture[str]) -> None:
    row = record()

    async def write() -> None:
        store = await open_store("sqlite:///data/task_done.db", Retention(timedelta(days=30), {}))
        await store.write([row])
        await store.close()

    Path("data").mkdir()
    asyncio.run(write())
    fill(row, rejected=row)

    assert main(["spool", "replay"]) == 0
    assert main(["spool", "replay", "--rejected"]) == 0
    assert senders() == ["a@example.com"]
