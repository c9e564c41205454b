"""A table for the messages in doubt: those whose end of data went up, and whose verdict is not known."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, UUID

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table and its indexes."""
    moment = sa.DateTime(timezone=True)
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.create_table(
        "task_in_doubt",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            sa.Identity(always=True),
            primary_key=True,
        ),
        sa.Column("task_id", sa.Text().with_variant(UUID(as_uuid=False), "postgresql"), nullable=False),
        sa.Column("client_task_id", sa.Text()),
        sa.Column("task_type", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("sender_domain", sa.Text(), nullable=False),
        sa.Column("client", sa.Text(), nullable=False),
        sa.Column("since", moment, nullable=False),
        sa.Column("expires_at", moment),
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text()),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("duration_ms", sa.BigInteger(), nullable=False),
        sa.Column("recipients", json, nullable=False),
        sa.Column("data", json, nullable=False),
        sa.UniqueConstraint("task_id", name="uq_task_in_doubt_task_id"),
    )
    op.create_index("ix_task_in_doubt_since", "task_in_doubt", ["since"])
    present = sa.text("expires_at IS NOT NULL")
    op.create_index(
        "ix_task_in_doubt_expires_at",
        "task_in_doubt",
        ["expires_at"],
        sqlite_where=present,
        postgresql_where=present,
    )
