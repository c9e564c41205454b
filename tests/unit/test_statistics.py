"""Counts by what rows have in common, and by time."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy.dialects import sqlite

from relay.records.by import By
from relay.records.migrations import upgrade
from relay.records.model import Record
from relay.records.queries import open_queries
from relay.records.retention import Retention
from relay.records.sends import SendFilter
from relay.records.sqlite.hints import heed_hints
from relay.records.statistics import Count, Statistics, slot_of, statement_of
from relay.records.store import open_store

NOW = datetime(2026, 11, 23, 7, 46, 0, 123456, tzinfo=UTC)
ROW = Record(
    task_id=UUID(int=1),
    task_type="mention",
    sender="Alice@Example.COM",
    client="127.0.0.1",
    sent_at=NOW,
    upstream="primary",
    upstream_reply="250 ok",
    size=1000,
    duration_ms=10,
    recipients=("bob@example.net",),
)
ROWS = [
    ROW,
    replace(ROW, sender="alice@example.com", sent_at=NOW + timedelta(minutes=20), size=3000, duration_ms=31),
    replace(ROW, task_type="digest", recipients=("a@x.org", "b@x.org", "c@Example.NET"), client="app"),
    replace(ROW, task_type="digest", sent_at=NOW + timedelta(hours=3), upstream="spare", sender=""),
]


@pytest.fixture
async def ask(database: Any) -> Any:
    """Return a function that counts ROWS, or others."""

    async def counts(
        by: Sequence[str],
        wanted: SendFilter | None = None,
        *,
        zone: tzinfo | None = UTC,
        rows: Sequence[Record] = ROWS,
        **options: Any,
    ) -> Statistics:
        store = await open_store(database.url, Retention(None))
        await store.write([replace(row, task_id=UUID(int=at + 1)) for at, row in enumerate(rows)])
        await store.close()
        queries = await open_queries(database.url)
        try:
            return await queries.statistics(wanted or SendFilter(), list(map(By, by)), zone=zone, **options)
        finally:
            await queries.close()

    return counts


def plain(found: Statistics) -> dict[Any, int]:
    """Counts by key, in their order."""
    keys = [count.keys[0] if len(count.keys) == 1 else count.keys for count in found.counts]
    assert found.groups == len(keys)
    return dict(zip(keys, (count.messages for count in found.counts), strict=True))


@pytest.mark.parametrize(
    ("by", "counts"),
    [
        (["type"], {"digest": 2, "mention": 2}),
        (["sender"], {"alice@example.com": 3, "": 1}),
        (["recipient-domain"], {"example.net": 4, "x.org": 2}),
        (["client"], {"127.0.0.1": 3, "app": 1}),
        (["upstream"], {"primary": 3, "spare": 1}),
        (["upstream", "type"], {("primary", "mention"): 2, ("primary", "digest"): 1, ("spare", "digest"): 1}),
        (["day"], {"2026-11-23": 4}),
        (
            ["hour"],
            {
                "2026-11-23T07:00:00+00:00": 2,
                "2026-11-23T08:00:00+00:00": 1,
                "2026-11-23T09:00:00+00:00": 0,
                "2026-11-23T10:00:00+00:00": 1,
            },
        ),
        (
            ["hour", "type"],
            {
                ("2026-11-23T07:00:00+00:00", "digest"): 1,
                ("2026-11-23T07:00:00+00:00", "mention"): 1,
                ("2026-11-23T08:00:00+00:00", "mention"): 1,
                ("2026-11-23T10:00:00+00:00", "digest"): 1,
            },
        ),
        (["day", "recipient-domain"], {("2026-11-23", "example.net"): 4, ("2026-11-23", "x.org"): 2}),
    ],
    ids=str,
)
async def test_what_is_counted(ask: Any, by: list[str], counts: dict[Any, int]) -> None:
    found = await ask(by)
    assert plain(found) == counts
    assert list(plain(found)) == list(counts)
    assert found.messages == sum(counts.values())


@pytest.mark.parametrize(
    ("wanted", "counts"),
    [
        (SendFilter(recipient="bob@EXAMPLE.net"), {"mention": 2, "digest": 1}),
        (SendFilter(recipient="@x.org"), {"digest": 1}),
        (SendFilter(recipient="?@x", aliases=("a@x.org", "b@x.org")), {"digest": 1}),
        (SendFilter(recipient="b*"), {"digest": 2, "mention": 2}),
        (SendFilter(sender="alice@example.com", client="127.*"), {"mention": 2}),
        (SendFilter(since=NOW + timedelta(minutes=1)), {"digest": 1, "mention": 1}),
        (SendFilter(until=NOW + timedelta(minutes=1), recipient="@example.net"), {"digest": 1, "mention": 1}),
        (SendFilter(task_type="none"), {}),
    ],
    ids=str,
)
async def test_filters(ask: Any, wanted: SendFilter, counts: dict[str, int]) -> None:
    assert plain(await ask(["type"], wanted)) == counts


async def test_details(ask: Any) -> None:
    found = await ask(["type"], detail=True)
    assert found.counts == [
        Count(("digest",), 2, recipients=4, octets=2000, average_ms=10.0, slowest_ms=10),
        Count(("mention",), 2, recipients=2, octets=4000, average_ms=20.5, slowest_ms=31),
    ]
    found = await ask(["hour"], detail=True)
    assert [(each.messages, each.octets, each.average_ms, each.slowest_ms) for each in found.counts] == [
        (2, 2000, 10.0, 10),
        (1, 3000, 31.0, 31),
        (0, 0, 0.0, 0),
        (1, 1000, 10.0, 10),
    ]
    found = await ask(["recipient-domain"], SendFilter(task_type="digest"), detail=True)
    assert [(each.keys, each.recipients, each.octets) for each in found.counts] == [
        (("example.net",), 2, 2000),
        (("x.org",), 2, 2000),
    ]


async def test_a_limit_leaves_the_biggest_and_the_latest(ask: Any) -> None:
    found = await ask(["recipient-domain"], limit=1)
    assert ([each.keys for each in found.counts], found.messages, found.groups) == ([("example.net",)], 6, 2)
    found = await ask(["hour"], limit=2)
    assert [each.keys[0][11:13] for each in found.counts] == ["09", "10"]
    assert (found.messages, found.groups) == (4, 4)


async def test_of_what_has_the_same_time_a_limit_leaves_the_biggest(ask: Any) -> None:
    later = [replace(ROW, task_type=kind, sent_at=NOW + timedelta(days=1)) for kind in ("a", "b", "b")]
    found = await ask(["day", "type"], rows=[ROW, ROW, *later], limit=1)
    assert [(each.keys, each.messages) for each in found.counts] == [(("2026-11-24", "b"), 2)]
    assert (found.messages, found.groups) == (5, 3)


@pytest.mark.parametrize("zone", [UTC, ZoneInfo("Europe/London")])  # days as they are, or made of hours
async def test_a_day_is_whole_however_many_its_hours_have(tmp_path: Path, zone: tzinfo) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    await (await open_store(url, Retention(None))).close()
    days, clients, types = 4, 1000, 24_001
    with closing(sqlite3.connect(tmp_path / "records.db")) as raw:
        raw.execute(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO task_done (task_id, task_type, sender, sender_domain, client, sent_at, upstream, "
            "upstream_reply, size, duration_ms, data) SELECT i, i % ?, '', '', i % ?, "
            "strftime('%Y-%m-%d %H:00:00.000000', '2026-11-20', (i / ?) || ' hours'), 'u', '250', 1, 1, '{}' "
            "FROM n",
            (24 * days * clients - 1, types, clients, clients),
        )
        raw.commit()
    queries = await open_queries(url)
    found = await queries.statistics(SendFilter(), [By.DAY, By.CLIENT], zone=zone)
    assert found.groups == len(found.counts) == days * clients
    assert {each.messages for each in found.counts} == {24}
    few = await queries.statistics(SendFilter(), [By.CLIENT, By.DAY], zone=zone, limit=3)
    assert (few.groups, [each.keys[1] for each in few.counts]) == (days * clients, ["2026-11-23"] * 3)
    found = await queries.statistics(SendFilter(), [By.TYPE])
    assert len(found.counts) == types


async def test_an_hour_of_a_zone_that_is_half_an_hour_away(ask: Any) -> None:
    found = await ask(["hour"], zone=ZoneInfo("Asia/Kolkata"))
    assert plain(found) == {
        "2026-11-23T13:00:00+05:30": 3,
        "2026-11-23T14:00:00+05:30": 0,
        "2026-11-23T15:00:00+05:30": 0,
        "2026-11-23T16:00:00+05:30": 1,
    }
    kathmandu = await ask(["hour"], zone=ZoneInfo("Asia/Kathmandu"))
    assert next(iter(plain(kathmandu))) == "2026-11-23T13:00:00+05:45"


async def test_days_begin_and_end_where_the_zone_says_also_when_clocks_change(ask: Any) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    begin = datetime(2026, 10, 24, 22, 0, tzinfo=UTC)  # midnight there; the day has 25 hours
    rows = [replace(ROW, sent_at=begin + timedelta(hours=hour, minutes=30)) for hour in range(-1, 26)]
    found = await ask(["day"], zone=berlin, rows=rows)
    assert plain(found) == {"2026-10-24": 1, "2026-10-25": 25, "2026-10-26": 1}
    hours = plain(await ask(["hour"], zone=berlin, rows=rows))
    assert len(hours) == 27
    assert [key for key in hours if "T02:" in key] == [
        "2026-10-25T02:00:00+02:00",
        "2026-10-25T02:00:00+01:00",
    ]


@pytest.mark.parametrize(
    ("by", "zone", "since", "slot"),
    [
        ("day", "UTC", None, "day"),
        ("hour", "UTC", None, "hour"),
        ("day", "Europe/London", None, "hour"),
        ("day", "Europe/London", datetime(2026, 11, 1, tzinfo=UTC), "day"),
        ("day", "Europe/London", datetime(2026, 10, 20, tzinfo=UTC), "hour"),
        ("day", "Asia/Tokyo", None, "hour"),
        ("day", "Asia/Kolkata", NOW, "quarter"),
    ],
)
def test_no_more_is_asked_of_the_database_than_the_days_of_the_zone_need(
    by: str, zone: str, since: datetime | None, slot: str
) -> None:
    assert slot_of([By.CLIENT, By(by)], ZoneInfo(zone), since, NOW + timedelta(days=1)) == slot


async def test_an_island_that_is_half_an_hour_further_away_in_winter_alone(ask: Any) -> None:
    lord_howe = ZoneInfo("Australia/Lord_Howe")
    midnight = datetime(2026, 7, 13, 13, 30, tzinfo=UTC)  # there; UTC+10:30, and +11 in summer
    rows = [replace(ROW, sent_at=midnight + timedelta(minutes=minutes)) for minutes in (-10, 10, 70)]
    for wanted in (SendFilter(), SendFilter(since=datetime(2026, 2, 1, tzinfo=UTC))):
        assert plain(await ask(["day"], wanted, zone=lord_howe, rows=rows)) == {
            "2026-07-13": 1,
            "2026-07-14": 2,
        }
    hours = await ask(["hour"], zone=lord_howe, rows=[*rows, replace(ROW, sent_at=NOW)])
    odd = [each.keys[0] for each in hours.counts if each.keys[0][14:16] != "00"]
    assert odd == ["2026-10-04T02:30:00+11:00"]  # the clocks go from 02:00 to 02:30
    assert [each.keys[0] for each in hours.counts[:3]] == [
        "2026-07-13T23:00:00+10:30",
        "2026-07-14T00:00:00+10:30",
        "2026-07-14T01:00:00+10:30",
    ]


async def test_clocks_that_change_within_an_hour_keep_the_hours_in_their_order(ask: Any) -> None:
    change = datetime(2026, 4, 4, 14, 0, tzinfo=UTC)  # from 03:45 to 02:45
    rows = [replace(ROW, sent_at=change + timedelta(minutes=minutes)) for minutes in range(-75, 75, 15)]
    assert plain(await ask(["hour"], zone=ZoneInfo("Pacific/Chatham"), rows=rows)) == {
        "2026-04-05T02:00:00+13:45": 2,
        "2026-04-05T03:00:00+13:45": 4,
        "2026-04-05T03:00:00+12:45": 4,
    }


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
async def test_a_time_at_the_end_of_what_a_date_can_be(ask: Any, zone: str) -> None:
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    found = await ask(["day"], SendFilter(since=first, until=last), zone=ZoneInfo(zone))
    assert plain(found) == {"2026-11-23": 4}


async def test_hours_of_the_machine(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        found = await ask(["hour"], zone=None)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert next(iter(plain(found))) == "2026-11-23T13:00:00+05:30"


# Plans

WANTED = {
    "nothing": SendFilter(),
    "since": SendFilter(since=NOW),
    "type": SendFilter(task_type="t", since=NOW),
    "sender": SendFilter(sender="a@b"),
    "recipient": SendFilter(recipient="a@b", since=NOW),
    "domain": SendFilter(recipient="@b"),
}


def plan(raw: sqlite3.Connection, wanted: SendFilter, by: Sequence[By], *, detail: bool = False) -> list[str]:
    statement = statement_of(wanted, by, detail=detail, limit=20)
    text = str(
        statement.compile(dialect=heed_hints(sqlite.dialect()), compile_kwargs={"literal_binds": True})
    )
    return [step[3] for step in raw.execute(f"EXPLAIN QUERY PLAN {text}")]


def test_counts_of_messages_come_out_of_indexes() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        for by in (By.TYPE, By.CLIENT, By.HOUR, By.DAY, By.RECIPIENT_DOMAIN):
            scans = [step for step in plan(raw, SendFilter(), [by]) if step.startswith("SCAN task_done")]
            assert len(scans) == 1
            assert "USING COVERING INDEX" in scans[0], scans
        for (name, wanted), by in product(WANTED.items(), By):
            steps = plan(raw, wanted, [by])
            whole = [step for step in steps if step in ("SCAN task_done", "SCAN task_done_recipient")]
            # Without a filter the upstream is in no index; with one, rows are found by the filter's.
            assert not whole or (name, by) == ("nothing", By.UPSTREAM), (name, by, steps)


def test_a_time_that_is_asked_for_leads() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        upgrade(raw)
        for by, detail in product((By.TYPE, By.UPSTREAM, By.SENDER, By.DAY), (False, True)):
            steps = plan(raw, SendFilter(since=NOW), [by], detail=detail)
            assert any("ix_task_done_sent_at (sent_at>?)" in step for step in steps), (by, steps)
