"""The first schema: rows, recipients, the flat view, and what the processes tell each other."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, UUID

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make everything."""
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "task_done",
        sa.Column("id", key, sa.Identity(always=True), primary_key=True),
        sa.Column("task_id", sa.Text().with_variant(UUID(as_uuid=False), "postgresql"), nullable=False),
        sa.Column("client_task_id", sa.Text()),
        sa.Column("task_type", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("sender_domain", sa.Text(), nullable=False),
        sa.Column("client", sa.Text(), nullable=False),
        sa.Column("sent_at", moment, nullable=False),
        sa.Column("expires_at", moment),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("upstream_reply", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text()),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
        sa.UniqueConstraint("task_id", name="uq_task_done_task_id"),
    )
    op.create_table(
        "task_done_recipient",
        sa.Column(
            "task_done_id",
            key,
            sa.ForeignKey("task_done.id", ondelete="CASCADE", name="fk_task_done_recipient_task_done_id"),
            nullable=False,
        ),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("recipient", sa.Text(), nullable=False),
        sa.Column("recipient_domain", sa.Text(), nullable=False),
        sa.Column("sent_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("task_done_id", "ordinal", name="pk_task_done_recipient"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "task_done_state",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("expires_at", moment),
    )
    op.create_index("ix_task_done_sender", "task_done", [sa.text("lower(sender)"), "sent_at"])
    op.create_index("ix_task_done_sender_domain", "task_done", ["sender_domain", "sent_at"])
    op.create_index("ix_task_done_client", "task_done", ["client", "sent_at"])
    op.create_index("ix_task_done_task_type", "task_done", ["task_type", "sent_at"])
    for column in ("message_id", "client_task_id", "expires_at"):
        present = sa.text(f"{column} IS NOT NULL")
        op.create_index(
            f"ix_task_done_{column}",
            "task_done",
            [column],
            sqlite_where=present,
            postgresql_where=present,
            postgresql_using="hash" if column == "message_id" else "btree",
        )
    op.create_index(
        "ix_task_done_recipient_recipient", "task_done_recipient", [sa.text("lower(recipient)"), "sent_at"]
    )
    op.create_index(
        "ix_task_done_recipient_recipient_domain", "task_done_recipient", ["recipient_domain", "sent_at"]
    )
    op.execute(
        "CREATE VIEW task_done_send AS "
        "SELECT t.id, t.task_id, t.client_task_id, t.task_type, t.sender, t.sender_domain, t.client, "
        "t.sent_at, t.expires_at, t.upstream, t.upstream_reply, t.message_id, t.size, t.duration_ms, t.data, "
        "r.ordinal, r.recipient, r.recipient_domain "
        "FROM task_done AS t JOIN task_done_recipient AS r ON r.task_done_id = t.id"
    )
