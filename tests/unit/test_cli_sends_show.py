"""`relay sends show`: all that is known of one message."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from relay.cli import main
from relay.records.model import Doubt, Record
from tests.support.recorded import configured, record

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
    configured(tmp_path, monkeypatch)


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
