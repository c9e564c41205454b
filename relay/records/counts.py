"""What a rate limit counts, as the store has it: one look-up for a key, and the keys that are near or over.

Rules. Rows count by the same rule as messages under way (`relay.limits.rule`), said in SQL that both
databases share. A look-up reads along the index of its key, newest first, and no further back than makes up
the maximum. Messages in doubt may have been sent, so they count. Of very many rows those of one second,
minute or hour are taken together, at the time of the latest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from relay.limits.rule import Event, Message, Patterns, Rule
from relay.records.errors import StoreError
from relay.records.queries import Reader, open_queries
from relay.records.schema import task_done, task_done_recipient, task_in_doubt

__all__ = ["MAX_ROWS", "StoredCounts", "open_counts"]

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

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    async def look_up(self, rule: Rule, key: str, since: float, own: Collection[UUID]) -> list[Event]:
        """Return what was sent after `since` (Unix time) and counts for the key, at least up to the maximum.

        Those of `own` may be among it, with their task ids. Raises StoreError.
        """
        return await self._reader.read(lambda connection: _look_up(connection, rule, key, since, own))

    async def close(self) -> None:
        """End what is open."""
        await self._reader.close()

    async def highest(self, rule: Rule, since: float, least: int, keys: int) -> list[tuple[str, int]]:
        """Return the keys that have used `least` or more since then, the highest first, at most so many."""
        return await self._reader.read(lambda connection: _highest(connection, rule, since, least, keys))


async def open_counts(url: str) -> StoredCounts:
    """Return the counts of the store at `url`; raises StoreError as `open_queries` does."""
    return StoredCounts((await open_queries(url)).reader)


def _look_up(
    connection: sa.Connection, rule: Rule, key: str, since: float, own: Collection[UUID]
) -> list[Event]:
    begin = datetime.fromtimestamp(since, UTC)
    doubts = [each for each in _doubts(connection, rule, begin) if each[0] == key]
    found = [counted for _, counted in doubts]
    wanted = min(rule.maximum, MAX_ROWS) + len(own)
    sends = _sends(rule, begin, key)
    rows = connection.execute(sends.order_by(sends.selected_columns.at.desc()).limit(wanted)).all()
    counted = [Event(row.at.timestamp(), row.amount, UUID(row.task_id)) for row in rows]
    apart = set(own)
    amount = sum(each.amount for each in counted if each.task_id not in apart)
    if len(rows) < wanted or amount >= rule.maximum:
        return found + counted
    if len(own) > MAX_OWN:
        raise StoreError(f"limit {rule.name}: more than {MAX_OWN} rows wait to get into the store")
    return found + _together(connection, rule, sends, own)


def _together(
    connection: sa.Connection, rule: Rule, sends: sa.Select[Any], own: Collection[UUID]
) -> list[Event]:
    """Read all rows, those of one moment as one."""
    each = sends.subquery("each")
    moment = sa.func.substr(sa.cast(each.c.at, sa.Text()), 1, _precision(rule.window))
    rows = connection.execute(
        sa.select(sa.func.max(each.c.at).label("at"), sa.func.sum(each.c.amount).label("amount"))
        .where(each.c.task_id.not_in([str(one) for one in own]))
        .group_by(moment)
    )
    return [Event(row.at.timestamp(), int(row.amount), None) for row in rows]


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
    for key, counted in _doubts(connection, rule, begin):
        doubts[key] = doubts.get(key, 0) + counted.amount
    each = _sends(rule, begin).subquery("each")
    used = sa.func.sum(each.c.amount)
    rows = connection.execute(
        sa.select(each.c.key, used.label("used"))
        .group_by(each.c.key)
        .having(used >= max(1, least - max(doubts.values(), default=0)))
        .order_by(used.desc())
        .limit(keys + len(doubts))
    )
    uses = {row.key: int(row.used) for row in rows}
    for key, amount in doubts.items():
        uses[key] = uses.get(key, 0) + amount
    found = [(key, amount) for key, amount in uses.items() if amount >= least]
    return sorted(found, key=lambda use: (-use[1], use[0]))[:keys]


def _doubts(connection: sa.Connection, rule: Rule, begin: datetime) -> Iterable[tuple[str, Event]]:
    """Return what messages in doubt count for, by key. They are few."""
    table = task_in_doubt.c
    doubts = sa.select(
        table.since, table.task_id, table.task_type, table.sender, table.client, table.size, table.recipients
    ).where(table.since > begin)
    for row in connection.execute(doubts.order_by(table.since.desc()).limit(MAX_ROWS)):
        message = Message(row.sender, row.client, row.task_type, row.recipients, row.size)
        for key, amount in rule.demand(message).items():
            yield key, Event(row.since.timestamp(), amount, UUID(row.task_id))


def _sends(rule: Rule, begin: datetime, key: str | None = None) -> sa.Select[Any]:
    """Return the statement for the sends since `begin` that count: key, at, task_id, amount.

    Without `key` those of all keys.
    """
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
    if key is not None and rule.scope != "all":
        # Through the database's own lower(), which need not be ours; the index is on it.
        same = sa.func.lower(key) if rule.scope in ("sender", "recipient") else sa.literal(key)
        found = found.where(column == same)
    index = _INDEXES[rule.scope if key is not None else "all"]
    if table is task_done or key is not None:
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
    for character in ("\\", "%", "_"):
        text = text.replace(character, f"\\{character}")
    return text.replace("*", "%").replace("?", "_")
