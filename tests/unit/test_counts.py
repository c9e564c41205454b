"""What the store counts for a limit, against the rule itself, row by row."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy.dialects import sqlite

from relay.limits.rule import Message, Patterns, Rule
from relay.records import counts as module
from relay.records.counts import StoredCounts, counts_of
from relay.records.errors import StoreError
from relay.records.model import Doubt, Record
from relay.records.retention import Retention
from relay.records.sqlite.hints import heed_hints
from relay.records.store import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from relay.records.store import Store
    from tests.support.databases import PostgresDatabase, SqliteDatabase

NOW = datetime.now(UTC).replace(microsecond=123456)
SENDERS = ("a@example.com", "A@Example.COM", "b_c@example.com", "b%c@Example.net", "")
RECIPIENTS = (
    ("x@example.org",),
    ("X@Example.org", "x@example.org", "y@example.org"),
    ("z@example.net", "y@a.b"),
)
SCOPES = ("sender", "recipient", "client", "sender_domain", "recipient_domain", "all")
UNITS = ("messages", "recipients", "octets")
FILTERS = (
    {},
    {"task_type": Patterns(["MENTION"])},
    {"task_type": Patterns(["m*", "x"]), "sender": Patterns(["*@example.*"])},
    {"sender": Patterns(["b_c@*", "<>"])},
    {"recipient_domain": Patterns(["*.org", "A.?"])},
    {"not_sender": Patterns(["b%c@*"]), "not_recipient": Patterns(["y@*"])},
    {"not_client": Patterns(["192.0.2.?"]), "not_task_type": Patterns(["digest"])},
)


def entries() -> list[Record | Doubt]:
    """Return mail of every kind, spread over two hours, and some that is in doubt."""
    kinds = product(SENDERS, RECIPIENTS, ("mention", "digest"), ("192.0.2.1", "user"))
    found: list[Record | Doubt] = []
    for number, (sender, recipients, task_type, client) in enumerate(kinds):
        given = {
            "task_id": uuid4(),
            "task_type": task_type,
            "sender": sender,
            "client": client,
            "upstream": "primary",
            "size": 100 + number,
            "duration_ms": 1,
            "recipients": recipients,
        }
        moment = NOW - timedelta(minutes=2 * number)
        if number % 7 == 0:
            found.append(Doubt(since=moment, reason="", **given))
        else:
            found.append(Record(sent_at=moment, upstream_reply="250 ok", **given))
    return found


def moment_of(entry: Record | Doubt) -> datetime:
    return entry.sent_at if isinstance(entry, Record) else entry.since


@pytest.fixture
async def kept(
    database: SqliteDatabase | PostgresDatabase,
) -> AsyncIterator[tuple[Store, StoredCounts, list[Record | Doubt]]]:
    url = database.url
    store = await open_store(url, Retention.of_seconds(None, {}))
    found, counts = entries(), counts_of(url, lambda _: ())
    await store.write(found)
    yield store, counts, found
    await counts.close()
    await store.close()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("unit", UNITS)
async def test_rows_count_as_messages_do(
    kept: tuple[Store, StoredCounts, list[Record | Doubt]], scope: str, unit: str
) -> None:
    _, counts, found = kept
    window = 3600.0
    since = NOW.timestamp() - window
    for filters in FILTERS:
        rule = Rule("a", scope, unit, 10**9, window, **filters)  # type: ignore[arg-type]
        wanted: Counter[str] = Counter()
        events: dict[str, dict[UUID, int]] = {}
        for entry in found:
            message = Message(entry.sender, entry.client, entry.task_type, entry.recipients, entry.size)
            if moment_of(entry).timestamp() > since:
                for key, amount in rule.demand(message).items():
                    wanted[key] += amount
                    events.setdefault(key, {})[entry.task_id] = amount
        assert dict(await counts.highest(rule, since, 1, 100)) == dict(wanted)
        for key, expected in events.items():
            rows = await counts.look_up(rule, key, since, ())
            assert {row.task_id: row.amount for row in rows} == expected
            assert {row.task_id: row.at for row in rows} == {
                entry.task_id: moment_of(entry).timestamp() for entry in found if entry.task_id in expected
            }
        assert not await counts.look_up(rule, "nobody", since, ()) or scope == "all"


async def test_no_more_rows_are_read_than_make_up_the_maximum(
    kept: tuple[Store, StoredCounts, list[Record | Doubt]],
) -> None:
    _, counts, found = kept
    rule = Rule("a", "all", "messages", 5, 86_400.0)
    newest = sorted((each for each in found if isinstance(each, Record)), key=moment_of, reverse=True)
    own = [newest[0].task_id, uuid4()]
    rows = await counts.look_up(rule, "", NOW.timestamp() - 86_400, own)
    doubts = {each.task_id for each in found if isinstance(each, Doubt)}
    assert [row.task_id for row in rows if row.task_id not in doubts] == [each.task_id for each in newest[:7]]


@pytest.mark.parametrize("window", [3600.0, 86_400.0, 30 * 86_400.0])
async def test_of_very_many_rows_those_of_one_moment_are_taken_together_and_never_too_early(
    kept: tuple[Store, StoredCounts, list[Record | Doubt]], monkeypatch: pytest.MonkeyPatch, window: float
) -> None:
    _, counts, found = kept
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    rule = Rule("a", "all", "octets", 10**9, window)
    own = next(each for each in found if isinstance(each, Record))
    since = NOW.timestamp() - window
    rows = await counts.look_up(rule, "", since, [own.task_id])
    inside = [each for each in found if moment_of(each).timestamp() > since and each is not own]
    assert sum(row.amount for row in rows) >= sum(each.size for each in inside if isinstance(each, Record))
    moments = sorted(moment_of(each).timestamp() for each in inside)
    assert max(row.at for row in rows) == moments[-1]
    assert all(row.at in moments for row in rows)
    monkeypatch.setattr(module, "MAX_OWN", 0)
    with pytest.raises(StoreError, match="more than 0 rows wait"):
        await counts.look_up(rule, "", since, [own.task_id])


async def test_relays_on_one_store_see_each_other(
    kept: tuple[Store, StoredCounts, list[Record | Doubt]],
) -> None:
    store, counts, _ = kept
    now = datetime.now(UTC)
    assert await counts.others("relay:a", now) == 0
    await store.say_alive("relay:a", now + timedelta(seconds=30))
    await store.say_alive("relay:b", now + timedelta(seconds=30))
    assert await counts.others("relay:a", now) == 1
    assert await counts.others("relay:c", now) == 2
    assert await counts.others("relay:a", now + timedelta(seconds=31)) == 0
    await store.say_alive("relay:b", now + timedelta(seconds=60))
    assert await counts.others("relay:a", now + timedelta(seconds=31)) == 1
    await store.say_gone("relay:b")
    assert await counts.others("relay:a", now) == 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("unit", UNITS)
async def test_a_look_up_is_led_by_the_index_of_its_key(tmp_path: Path, scope: str, unit: str) -> None:
    store = await open_store(f"sqlite:///{tmp_path / 'rows.db'}", Retention.of_seconds(None, {}))
    await store.close()
    rule = Rule("a", scope, unit, 10, 60.0)  # type: ignore[arg-type]
    statement = module._newest(rule).compile(dialect=heed_hints(sqlite.dialect()))
    values = {"begin": "2026-01-01", "key": "a", "rows": 9}
    with contextlib.closing(sqlite3.connect(tmp_path / "rows.db")) as raw:
        given = [values.get(name) for name in statement.positiontup or ()]
        plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {statement}", given)]
    assert any(f"INDEX {module._INDEXES[scope]} " in f"{step} " for step in plan), plan
