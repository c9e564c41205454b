"""What a rate limit counts, as the store has it: one look-up for a key, and the keys that are near or over.

Rules. Rows count by the same rule as messages under way (`relay.limits.rule`), said in SQL that both
databases share. A look-up reads along the index of its key, newest first, and no further back than makes up
the maximum. Messages in doubt may have been sent, so they count. Of very many rows those of one second,
minute or hour are taken together, at the time of the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa

from relay.limits.rule import Aliases, Event, Message, Patterns, Rule, fold
from relay.records.errors import StoreError
from relay.records.patterns import literal
from relay.records.queries import Queries, Reader, open_queries
from relay.records.schema import (
    UtcDateTime,
    task_done,
    task_done_recipient,
    task_done_state,
    task_in_doubt,
)

__all__ = ["MAX_ROWS", "StoredCounts", "counts_of"]

T = TypeVar("T")

MAX_ROWS = 10_000
"""Rows that a look-up reads one by one; more are taken together."""
MAX_OWN = 10_000
"""Rows of the relay's own that may be kept apart where rows are taken together."""

_INDEXES = {
    "sender": "ix_task_done_sender",
    "sender_domain": "ix_task_done_sender_domain",
    "client": "ix_task_done_client",
    "recipient": "ix_task_done_recipient_recipient",
    "recipient_domain": "ix_task_done_recipient_recipient_domain",
    "all": "ix_task_done_sent_at",
}


class StoredCounts:
    """The counts of one store."""

    def __init__(self, reader: Reader, aliases: Aliases) -> None:
        self._reader = reader
        self._aliases = aliases

    async def look_up(self, rule: Rule, key: str, since: float, own: Collection[UUID]) -> list[Event]:
        """Return what was sent after `since` (Unix time) and counts for the key, at least up to the maximum.

        Those of `own` may be among it, with their task ids. Raises StoreError.
        """
        names = dict.fromkeys((key, *map(fold, self._aliases(key)))) if rule.of_address else (key,)
        return await self._reader.read(lambda connection: _look_up(connection, rule, names, since, own))

    async def close(self) -> None:
        """End what is open."""
        await self._reader.close()

    async def others(self, name: str, now: datetime) -> int:
        """Return how many relays but the one of this name say that they live."""
        given = {"name": name, "now": now}
        return await self._reader.read(
            lambda connection: int(connection.execute(_OTHERS, given).scalar_one())
        )

    async def highest(self, rule: Rule, since: float, least: int, keys: int) -> list[tuple[str, int]]:
        """Return the keys that have used `least` or more since then, the highest first, at most so many."""
        return await self._reader.read(lambda connection: _highest(connection, rule, since, least, keys))


def counts_of(url: str, aliases: Aliases) -> StoredCounts:
    """Return the counts of the store at `url`, which is opened when it is first asked."""
    return StoredCounts(_Later(url), aliases)


class _Later:
    """A store that is opened by its first reader, so that it may be away until then."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._queries: Queries | None = None
        self._opening = asyncio.Lock()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work`; see `relay.records.queries.Reader`."""
        async with self._opening:
            if self._queries is None:
                self._queries = await open_queries(self._url)
        return await self._queries.reader.read(work)

    async def close(self) -> None:
        """End what is open."""
        if self._queries is not None:
            await self._queries.close()


def _look_up(
    connection: sa.Connection, rule: Rule, names: Collection[str], since: float, own: Collection[UUID]
) -> list[Event]:
    begin = datetime.fromtimestamp(since, UTC)
    found = [event for each, event in _doubts(connection, rule, begin) if each in names]
    for name in names:  # one by one: each is read along the index, newest first
        found += _rows(connection, rule, name, begin, own)
    return found


def _rows(
    connection: sa.Connection, rule: Rule, key: str, begin: datetime, own: Collection[UUID]
) -> list[Event]:
    wanted = min(rule.maximum, MAX_ROWS) + len(own)
    given = {"begin": begin, "key": key, "rows": wanted}
    rows = connection.execute(_newest(rule), given).all()
    events = [Event(row.at.timestamp(), row.amount, UUID(row.task_id)) for row in rows]
    apart = set(own)
    amount = sum(each.amount for each in events if each.task_id not in apart)
    if len(rows) < wanted or amount >= rule.maximum:
        return events
    if len(own) > MAX_OWN:
        raise StoreError(f"limit {rule.name}: more than {MAX_OWN} rows wait to get into the store")
    rows = connection.execute(_together(rule), {**given, "own": [str(one) for one in own]}).all()
    return [Event(row.at.timestamp(), int(row.amount), None) for row in rows]


@lru_cache(64)
def _newest(rule: Rule) -> sa.Select[Any]:
    """Return the statement for the newest rows of a key that count."""
    sends = _sends(rule)
    return sends.order_by(sends.selected_columns.at.desc()).limit(sa.bindparam("rows", type_=sa.Integer()))


@lru_cache(64)
def _together(rule: Rule) -> sa.Select[Any]:
    """Return the statement for all rows of a key that count but our own, those of one moment as one."""
    each = _sends(rule).subquery("each")
    moment = sa.func.substr(sa.cast(each.c.at, sa.Text()), 1, _precision(rule.window))
    return (
        sa.select(sa.func.max(each.c.at).label("at"), sa.func.sum(each.c.amount).label("amount"))
        .where(each.c.task_id.not_in(sa.bindparam("own", expanding=True)))
        .group_by(moment)
    )


def _precision(window: float) -> int:
    """Return how much of `2026-11-23 07:46:00` names moments of which a window has a few thousand at most."""
    if window <= 3600:
        return len("2026-11-23 07:46:00")
    return len("2026-11-23 07:46") if window <= 3 * 86_400 else len("2026-11-23 07")


def _highest(
    connection: sa.Connection, rule: Rule, since: float, least: int, keys: int
) -> list[tuple[str, int]]:
    begin = datetime.fromtimestamp(since, UTC)
    doubts: dict[str, int] = {}
    for key, event in _doubts(connection, rule, begin):
        doubts[key] = doubts.get(key, 0) + event.amount
    each = _sends(rule, all_keys=True).subquery("each")
    used = sa.func.sum(each.c.amount)
    rows = connection.execute(
        sa.select(each.c.key, used.label("used"))
        .group_by(each.c.key)
        .having(used >= max(1, least - max(doubts.values(), default=0)))
        .order_by(used.desc())
        .limit(keys + len(doubts)),
        {"begin": begin},
    )
    uses = {row.key: int(row.used) for row in rows}
    for key, amount in doubts.items():
        uses[key] = uses.get(key, 0) + amount
    found = [(key, amount) for key, amount in uses.items() if amount >= least]
    return sorted(found, key=lambda use: (-use[1], use[0]))[:keys]


def _doubts(connection: sa.Connection, rule: Rule, begin: datetime) -> Iterable[tuple[str, Event]]:
    """Return what messages in doubt count for, by key. They are few."""
    for row in connection.execute(_DOUBTS, {"begin": begin}):
        message = Message(row.sender, row.client, row.task_type, row.recipients, row.size)
        for key, amount in rule.demand(message).items():
            yield key, Event(row.since.timestamp(), amount, UUID(row.task_id))


_OTHERS = (
    sa.select(sa.func.count())
    .select_from(task_done_state)
    .where(
        task_done_state.c.name.like("relay:%"),
        task_done_state.c.name != sa.bindparam("name"),
        task_done_state.c.expires_at > sa.bindparam("now", type_=UtcDateTime()),
    )
)
_DOUBTS = (
    sa.select(
        *(task_in_doubt.c[name] for name in ("since", "task_id", "task_type", "sender", "client")),
        *(task_in_doubt.c[name] for name in ("size", "recipients")),
    )
    .where(task_in_doubt.c.since > sa.bindparam("begin", type_=UtcDateTime()))
    .order_by(task_in_doubt.c.since.desc())
    .limit(MAX_ROWS)
)


def _sends(rule: Rule, *, all_keys: bool = False) -> sa.Select[Any]:
    """Return the statement for the sends after `begin` that count for `key`: key, at, task_id, amount."""
    begin = sa.bindparam("begin", type_=UtcDateTime())
    key = sa.bindparam("key", type_=sa.Text())
    sends, recipients = task_done.c, task_done_recipient.c
    conditions = _conditions(rule)
    counted = _counted_recipients(rule)
    if rule.scope in ("recipient", "recipient_domain"):
        table, column = task_done_recipient, _KEYS[rule.scope]
        amount = _amount(rule, sa.func.count())
        found = (
            sa.select(
                column.label("key"), recipients.sent_at.label("at"), sends.task_id, amount.label("amount")
            )
            .join_from(task_done_recipient, task_done, sends.id == recipients.task_done_id)
            .where(recipients.sent_at > begin, *counted)
            .group_by(column, recipients.sent_at, sends.task_id, sends.size)
        )
    else:
        table, column = task_done, _KEYS[rule.scope]
        of_message = sa.select(sa.func.count()).where(recipients.task_done_id == sends.id, *counted)
        amount = _amount(rule, of_message.scalar_subquery())
        found = sa.select(
            column.label("key"), sends.sent_at.label("at"), sends.task_id, amount.label("amount")
        ).where(sends.sent_at > begin)
        if rule.by_recipient or rule.unit == "recipients":
            one = sa.exists().where(recipients.task_done_id == sends.id, *counted)
            found = found.where(one)
    if not all_keys and rule.scope != "all":
        # Through the database's own lower(), which need not be ours; the index is on it.
        folded = rule.scope in ("sender", "recipient")
        found = found.where(column == (sa.func.lower(key) if folded else key))
    if table is task_done or not all_keys:
        index = _INDEXES["all" if all_keys else rule.scope]
        found = found.with_hint(table, f"INDEXED BY {index}", "sqlite")
    return found.where(*conditions)


_KEYS: dict[str, sa.ColumnElement[str]] = {
    "sender": sa.func.lower(task_done.c.sender),
    "sender_domain": task_done.c.sender_domain,
    "client": task_done.c.client,
    "recipient": sa.func.lower(task_done_recipient.c.recipient),
    "recipient_domain": task_done_recipient.c.recipient_domain,
    "all": sa.literal("", sa.Text()),
}


def _amount(rule: Rule, recipients: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    if rule.unit == "recipients":
        return recipients
    return sa.literal(1) if rule.unit == "messages" else task_done.c.size


def _conditions(rule: Rule) -> Sequence[sa.ColumnElement[bool]]:
    """What the message has to be."""
    table = task_done.c
    wanted = [(table.task_type, rule.task_type), (table.sender, rule.sender)]
    excepted = [
        (table.task_type, rule.not_task_type),
        (table.sender, rule.not_sender),
        (table.client, rule.not_client),
    ]
    return [_fits(column, each) for column, each in wanted if each is not None] + [
        sa.not_(_fits(column, each)) for column, each in excepted if each is not None
    ]


def _counted_recipients(rule: Rule) -> Sequence[sa.ColumnElement[bool]]:
    """Which recipients count."""
    table, conditions = task_done_recipient.c, []
    if rule.recipient_domain is not None:
        conditions.append(_fits(table.recipient_domain, rule.recipient_domain))
    if rule.not_recipient is not None:
        conditions.append(sa.not_(_fits(table.recipient, rule.not_recipient)))
    return conditions


def _fits(column: sa.ColumnElement[str], patterns: Patterns) -> sa.ColumnElement[bool]:
    folded = sa.func.lower(column)
    return sa.or_(
        *(
            folded.like(sa.func.lower(_like(text)), escape="\\")
            if "*" in text or "?" in text
            else folded == sa.func.lower(text)
            for text in patterns.texts
        )
    )


def _like(text: str) -> str:
    return literal(text).replace("*", "%").replace("?", "_")
