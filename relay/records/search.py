"""The statements of a search, and what they find: SQLAlchemy's, the same for both databases.

Rules. Which index leads is said and not guessed where the database is SQLite, since it keeps no statistics
here and would, for one, read every row of a task type to find one message in it. PostgreSQL keeps them, and
plans by them; what it needs is that each condition has the form of an index.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from relay.records.filters import (
    RECIPIENT_INDEXES,
    conditions_of,
    leading_index,
    received_by,
    window_of,
)
from relay.records.patterns import Wanted
from relay.records.schema import task_done, task_done_recipient, task_in_doubt
from relay.records.sends import InDoubt, Key, Send, SendFilter

__all__ = [
    "elements_of",
    "fetch_doubts",
    "fetch_sends",
    "page_of_doubts",
    "page_of_sends",
    "recipients_of",
    "sends_by_id",
]


class elements_of(GenericFunction[Any]):  # noqa: N801 - named as the function that it is in a statement
    """The elements of a JSON array as rows, each with its text in `value`."""

    inherit_cache = True


@compiles(elements_of, "sqlite")
def _in_sqlite(element: elements_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(elements_of, "postgresql")
def _in_postgresql(element: elements_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"jsonb_array_elements_text({compiler.process(element.clauses, **options)})"


def recipients_of(keys: Iterable[int]) -> sa.Select[Any]:
    """Return the statement for the recipients of the rows with these ids, each row's in their order."""
    table = task_done_recipient.c
    return (
        sa.select(table.task_done_id, table.recipient)
        .where(table.task_done_id.in_(list(keys)))
        .order_by(table.task_done_id, table.ordinal)
    )


def page_of_sends(wanted: SendFilter, rows: int, after: Key | None = None) -> sa.Select[Any]:
    """Return the statement for the next `rows` rows that `wanted` describes, those before `after`."""
    table = task_done.c
    leading = leading_index(wanted)
    conditions = [*conditions_of(wanted, table), *window_of(wanted, after, table.sent_at, table.id)]
    if wanted.recipient is not None:
        received = received_by(wanted.recipient, wanted.aliases)
        if leading in RECIPIENT_INDEXES:
            return _page_by_recipient(received, leading, wanted, rows, after)
        conditions.append(sa.exists().where(task_done_recipient.c.task_done_id == table.id, received))
    return (
        sa.select(task_done)
        .with_hint(task_done, f"INDEXED BY {leading}", "sqlite")
        .where(*conditions)
        .order_by(table.sent_at.desc(), table.id.desc())
        .limit(rows)
    )


def sends_by_id(wanted: SendFilter, rows: int, after: int) -> sa.Select[Any]:
    """Return the statement for the next `rows` rows behind the row `after`, in the order of their ids."""
    table = task_done.c
    conditions = [*conditions_of(wanted, table), *window_of(wanted, None, table.sent_at, table.id)]
    if wanted.recipient is not None:
        received = received_by(wanted.recipient, wanted.aliases)
        conditions.append(sa.exists().where(task_done_recipient.c.task_done_id == table.id, received))
    return (
        sa.select(task_done)
        .with_hint(task_done, "NOT INDEXED", "sqlite")
        .where(table.id > after, *conditions)
        .order_by(table.id)
        .limit(rows)
    )


def page_of_doubts(wanted: SendFilter, rows: int, after: Key | None = None) -> sa.Select[Any]:
    """Return the statement for the next `rows` messages in doubt that `wanted` describes, before `after`.

    By time, whatever the filter: they are few, unless something is very wrong.
    """
    table = task_in_doubt.c
    conditions = [*conditions_of(wanted, table), *window_of(wanted, after, table.since, table.id)]
    if wanted.recipient is not None:
        each = elements_of(table.recipients).table_valued("value")
        found = sa.cast(each.c.value, sa.Text())
        conditions.append(sa.exists().where(Wanted.of(wanted.recipient).matches(found, None, wanted.aliases)))
    return (
        sa.select(task_in_doubt)
        .with_hint(task_in_doubt, "INDEXED BY ix_task_in_doubt_since", "sqlite")
        .where(*conditions)
        .order_by(table.since.desc(), table.id.desc())
        .limit(rows)
    )


def _page_by_recipient(
    received: sa.ColumnElement[bool], leading: str, wanted: SendFilter, rows: int, after: Key | None
) -> sa.Select[Any]:
    """The same, led by an index of the recipients, which have the time of their row.

    DISTINCT, since a message may have gone to several in a domain, or to one of them twice.
    """
    moment, key = task_done_recipient.c.sent_at, task_done_recipient.c.task_done_id
    found = (
        sa.select(moment, key)
        .with_hint(task_done_recipient, f"INDEXED BY {leading}", "sqlite")
        .where(received, *window_of(wanted, after, moment, key))
        .distinct()
        .order_by(moment.desc(), key.desc())
        .limit(rows)
    )
    others = conditions_of(wanted, task_done.c)
    if others:
        found = found.join_from(task_done_recipient, task_done, task_done.c.id == key).where(*others)
    page = found.subquery("page")
    return (
        sa.select(task_done)
        .join_from(page, task_done, task_done.c.id == page.c.task_done_id)
        .order_by(page.c.sent_at.desc(), page.c.task_done_id.desc())
    )


# What they find


def fetch_sends(connection: sa.Connection, page: sa.Select[Any]) -> list[Send]:
    """Read rows of `task_done` and all their recipients: two statements, one moment."""
    rows = connection.execute(page).mappings().all()
    recipients: dict[int, list[str]] = {row["id"]: [] for row in rows}
    for key, recipient in connection.execute(recipients_of(recipients)):
        recipients[key].append(recipient)
    return [Send(**row, recipients=tuple(recipients[row["id"]])) for row in rows]


def fetch_doubts(connection: sa.Connection, page: sa.Select[Any]) -> list[InDoubt]:
    """Read rows of `task_in_doubt`."""
    rows = connection.execute(page).mappings().all()
    return [InDoubt(**{**row, "recipients": tuple(row["recipients"])}) for row in rows]
