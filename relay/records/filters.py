"""What a search means for the tables: conditions, and the index that leads.

Rules. Pure functions of values. Which index leads is said and not guessed: SQLite keeps no statistics here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from relay.records.patterns import Wanted, equals_or_like
from relay.records.schema import UtcDateTime, task_done_recipient
from relay.records.sends import Key, SendFilter

__all__ = [
    "RECIPIENT_INDEXES",
    "conditions_of",
    "leading_index",
    "received_by",
    "window_of",
]

RECIPIENT_INDEXES = ("ix_task_done_recipient_recipient", "ix_task_done_recipient_recipient_domain")


def leading_index(wanted: SendFilter) -> str:
    """Return the index of what is likely to leave the fewest rows."""
    if wanted.task_id is not None:
        return "sqlite_autoindex_task_done_1"  # SQLite's own name for that of the UNIQUE constraint
    if wanted.message_id is not None:
        return "ix_task_done_message_id"
    address, domain = RECIPIENT_INDEXES
    recipient = Wanted() if wanted.recipient is None else Wanted.of(wanted.recipient)
    sender = Wanted() if wanted.sender is None else Wanted.of(wanted.sender)
    for value, index in (
        (recipient.address, address),
        (sender.address, "ix_task_done_sender"),
        (recipient.domain, domain),
        (sender.domain, "ix_task_done_sender_domain"),
        (_name(wanted.client), "ix_task_done_client"),
        (_name(wanted.task_type), "ix_task_done_task_type"),
    ):
        if value is not None:
            return index
    return "ix_task_done_sent_at"


def _name(value: str | None) -> str | None:
    """Return a name that an index finds, None for none or a pattern."""
    return None if value is None or "*" in value else value


def received_by(value: str, aliases: Sequence[str] = ()) -> sa.ColumnElement[bool]:
    """Return the condition on a row of `task_done_recipient`."""
    table = task_done_recipient.c
    return Wanted.of(value).matches(table.recipient, table.recipient_domain, aliases)


def conditions_of(
    wanted: SendFilter, table: ReadOnlyColumnCollection[str, sa.Column[Any]]
) -> list[sa.ColumnElement[bool]]:
    """What the row itself has to say, in `task_done` or `task_in_doubt`, but for the time."""
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.task_id is not None:
        conditions.append(table.task_id == str(wanted.task_id))
    if wanted.message_id is not None:
        given = wanted.message_id
        conditions.append(table.message_id.in_([given, f"<{given}>"]))
    if wanted.sender is not None:
        conditions.append(Wanted.of(wanted.sender).matches(table.sender, table.sender_domain))
    if wanted.client is not None:
        conditions.append(equals_or_like(wanted.client, table.client))
    if wanted.task_type is not None:
        conditions.append(equals_or_like(wanted.task_type, table.task_type))
    if wanted.upstream is not None:
        conditions.append(equals_or_like(wanted.upstream, table.upstream))
    return conditions


def window_of(
    wanted: SendFilter,
    after: Key | None,
    moment: sa.ColumnElement[datetime],
    key: sa.ColumnElement[int],
) -> list[sa.ColumnElement[bool]]:
    """What the time has to be, and that the row stands behind the page that ended at `after`."""
    conditions: list[sa.ColumnElement[bool]] = []
    if wanted.since is not None:
        conditions.append(moment >= wanted.since)
    if wanted.until is not None:
        conditions.append(moment < wanted.until)
    if after is not None:
        conditions.append(
            sa.tuple_(moment, key)
            < sa.tuple_(sa.literal(after[0], UtcDateTime()), sa.literal(after[1], sa.BigInteger()))
        )
    return conditions
