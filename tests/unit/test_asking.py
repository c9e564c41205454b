"""What people ask for, as they write it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from relay.asking import AskedError, filter_of, moment, zone_of

NOW = datetime(2026, 11, 23, 23, 30, tzinfo=UTC)
KOLKATA = ZoneInfo("Asia/Kolkata")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("90m", datetime(2026, 11, 23, 22, 0, tzinfo=UTC)),
        (" 7d ", datetime(2026, 11, 16, 23, 30, tzinfo=UTC)),
        ("today", datetime(2026, 11, 23, 18, 30, tzinfo=UTC)),
        ("yesterday", datetime(2026, 11, 22, 18, 30, tzinfo=UTC)),
        ("2026-11-23", datetime(2026, 11, 22, 18, 30, tzinfo=UTC)),
        ("2026-11-23T07:46", datetime(2026, 11, 23, 2, 16, tzinfo=UTC)),
        ("2026-11-23 07:46:01", datetime(2026, 11, 23, 2, 16, 1, tzinfo=UTC)),
        ("2026-11-23T07:46Z", datetime(2026, 11, 23, 7, 46, tzinfo=UTC)),
        ("2026-11-23T07:46+01:00", datetime(2026, 11, 23, 6, 46, tzinfo=UTC)),
        ("2026-11-23T07:46 01:00", datetime(2026, 11, 23, 6, 46, tzinfo=UTC)),
        ("36500d", NOW - timedelta(days=36500)),
        ("0001-01-01", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59-10:00", datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_a_time(value: str, found: datetime) -> None:
    assert moment(value, NOW, KOLKATA) == found


@pytest.mark.parametrize("value", ["", "soon", "7", "7w", "36501d", "2026-02-30", "2026-11-23T25:00", "\0"])
def test_what_is_no_time(value: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        moment(value, NOW, UTC)


def test_zones() -> None:
    assert zone_of(None) is None
    assert zone_of("UTC") is UTC
    assert zone_of("Asia/Kolkata") == KOLKATA
    for name in ("", "Europe", "Mars/Olympus", "../etc/passwd", "/etc/localtime", "a\0b"):
        with pytest.raises(AskedError, match="tz takes"):
            zone_of(name)


def test_a_filter() -> None:
    wanted = filter_of(
        {
            "sender": "<>",
            "recipient": " <Ann@example.com> ",
            "type": "mention*",
            "client": "app",
            "upstream": "primary",
            "message_id": "<1@example.com>",
            "task_id": "00000000-0000-0000-0000-000000000007",
            "since": "1h",
            "until": None,
        },
        NOW,
        UTC,
        lambda address: (f"hashed-{address}",),
    )
    assert (wanted.sender, wanted.recipient, wanted.aliases) == (
        "",
        "Ann@example.com",
        ("hashed-Ann@example.com",),
    )
    assert (wanted.task_type, wanted.client, wanted.upstream) == ("mention*", "app", "primary")
    assert (wanted.message_id, wanted.task_id) == ("<1@example.com>", UUID(int=7))
    assert (wanted.since, wanted.until) == (NOW - timedelta(hours=1), None)


def test_text_is_looked_for_as_it_is_stored() -> None:
    assert filter_of({"sender": "\udcff@x\0"}, NOW).sender == "\\xff@x\\x00"


@pytest.mark.parametrize(
    ("field", "value"),
    [("task_id", "7"), ("since", "soon"), ("until", ""), ("sender", "a" * 1001), ("type", "\ud800")],
)
def test_a_mistake_names_its_field(field: str, value: str) -> None:
    with pytest.raises(AskedError) as caught:
        filter_of({field: value}, NOW)
    assert caught.value.field == field
    assert str(caught.value) == f"{field} takes {caught.value.takes}"
