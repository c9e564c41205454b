"""The tables, as SQLAlchemy Core sees them: names and columns are public interface, for SQL and dashboards.

Rules. The tables are made and changed by `migrations` alone; a test compares them with what stands here.
Times are UTC. SQLite keeps them as text of fixed width, `2026-11-23 07:46:00.123456`, which sorts as time
does and which its date functions (and tools that read SQLite) understand; PostgreSQL as `timestamptz`.
Addresses are stored as given; the indexes for searches and limits are on `lower(address)`, and only a query
that compares `lower(address)` with `lower(value)` is served by them. Domains are stored in lower case.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, UUID

__all__ = [
    "UtcDateTime",
    "metadata",
    "task_done",
    "task_done_recipient",
    "task_done_send",
    "task_done_state",
    "task_in_doubt",
]


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware time, given in any zone, stored and returned as UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Turn an aware time into UTC; SQLite's type wants it without its zone."""
        if value is None:
            return None
        if value.utcoffset() is None:
            raise ValueError("a time without a zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Say again that the time is UTC, which SQLite's type has forgotten."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if dialect.name == "sqlite" else value.astimezone(UTC)


metadata = sa.MetaData()

task_done = sa.Table(
    "task_done",
    metadata,
    sa.Column(
        "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=True), primary_key=True
    ),
    sa.Column("task_id", sa.Text().with_variant(UUID(as_uuid=False), "postgresql"), nullable=False),
    sa.Column("client_task_id", sa.Text()),
    sa.Column("task_type", sa.Text(), nullable=False),
    sa.Column("sender", sa.Text(), nullable=False),
    sa.Column("sender_domain", sa.Text(), nullable=False),
    sa.Column("client", sa.Text(), nullable=False),
    sa.Column("sent_at", UtcDateTime(), nullable=False),
    sa.Column("expires_at", UtcDateTime()),
    sa.Column("upstream", sa.Text(), nullable=False),
    sa.Column("upstream_reply", sa.Text(), nullable=False),
    sa.Column("message_id", sa.Text()),
    sa.Column("size", sa.BigInteger(), nullable=False),
    sa.Column("duration_ms", sa.BigInteger(), nullable=False),
    sa.Column("data", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    sa.UniqueConstraint("task_id", name="uq_task_done_task_id"),
)

task_done_recipient = sa.Table(
    "task_done_recipient",
    metadata,
    sa.Column(
        "task_done_id",
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
        sa.ForeignKey("task_done.id", ondelete="CASCADE", name="fk_task_done_recipient_task_done_id"),
        nullable=False,
    ),
    sa.Column("ordinal", sa.Integer(), nullable=False),
    sa.Column("recipient", sa.Text(), nullable=False),
    sa.Column("recipient_domain", sa.Text(), nullable=False),
    sa.Column("sent_at", UtcDateTime(), nullable=False),
    sa.PrimaryKeyConstraint("task_done_id", "ordinal", name="pk_task_done_recipient"),
    # The primary key is the table: a row's recipients lie together, and one index less is written.
    sqlite_with_rowid=False,
)

task_done_state = sa.Table(
    "task_done_state",
    metadata,
    sa.Column("name", sa.Text(), primary_key=True),
    sa.Column("value", sa.Text(), nullable=False),
    sa.Column("expires_at", UtcDateTime()),
)
"""What the processes on one database tell each other: the retention in force, and who deletes until when."""

task_in_doubt = sa.Table(
    "task_in_doubt",
    metadata,
    sa.Column(
        "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=True), primary_key=True
    ),
    sa.Column("task_id", sa.Text().with_variant(UUID(as_uuid=False), "postgresql"), nullable=False),
    sa.Column("client_task_id", sa.Text()),
    sa.Column("task_type", sa.Text(), nullable=False),
    sa.Column("sender", sa.Text(), nullable=False),
    sa.Column("sender_domain", sa.Text(), nullable=False),
    sa.Column("client", sa.Text(), nullable=False),
    sa.Column("since", UtcDateTime(), nullable=False),
    sa.Column("expires_at", UtcDateTime()),
    sa.Column("upstream", sa.Text(), nullable=False),
    sa.Column("reason", sa.Text(), nullable=False),
    sa.Column("message_id", sa.Text()),
    sa.Column("size", sa.BigInteger(), nullable=False),
    sa.Column("duration_ms", sa.BigInteger(), nullable=False),
    sa.Column("recipients", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    sa.Column("data", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
    sa.UniqueConstraint("task_id", name="uq_task_in_doubt_task_id"),
)
"""Messages of which nobody knows whether the upstream accepted them. Few: its searches read it by time."""

sa.Index("ix_task_in_doubt_since", task_in_doubt.c.since)
sa.Index(
    "ix_task_in_doubt_expires_at",
    task_in_doubt.c.expires_at,
    sqlite_where=task_in_doubt.c.expires_at.is_not(None),
    postgresql_where=task_in_doubt.c.expires_at.is_not(None),
)
sa.Index("ix_task_done_sent_at", task_done.c.sent_at)
sa.Index("ix_task_done_sender", sa.func.lower(task_done.c.sender), task_done.c.sent_at)
sa.Index("ix_task_done_sender_domain", task_done.c.sender_domain, task_done.c.sent_at)
sa.Index("ix_task_done_client", task_done.c.client, task_done.c.sent_at)
sa.Index("ix_task_done_task_type", task_done.c.task_type, task_done.c.sent_at)
sa.Index(
    "ix_task_done_message_id",
    task_done.c.message_id,
    postgresql_using="hash",
    sqlite_where=task_done.c.message_id.is_not(None),
    postgresql_where=task_done.c.message_id.is_not(None),
)
sa.Index(
    "ix_task_done_client_task_id",
    task_done.c.client_task_id,
    sqlite_where=task_done.c.client_task_id.is_not(None),
    postgresql_where=task_done.c.client_task_id.is_not(None),
)
sa.Index(
    "ix_task_done_expires_at",
    task_done.c.expires_at,
    sqlite_where=task_done.c.expires_at.is_not(None),
    postgresql_where=task_done.c.expires_at.is_not(None),
)
sa.Index(
    "ix_task_done_recipient_recipient",
    sa.func.lower(task_done_recipient.c.recipient),
    task_done_recipient.c.sent_at,
)
sa.Index(
    "ix_task_done_recipient_recipient_domain",
    task_done_recipient.c.recipient_domain,
    task_done_recipient.c.sent_at,
)

_flat: list[sa.ColumnClause[Any]] = [sa.column(column.name, column.type) for column in task_done.columns]
task_done_send = sa.table(
    "task_done_send",
    *_flat,
    sa.column("ordinal", sa.Integer()),
    sa.column("recipient", sa.Text()),
    sa.column("recipient_domain", sa.Text()),
)
"""The view: one flat row for each recipient, the columns of `task_done` first."""
