"""An index on the time alone: the newest rows, and those since a moment, were found by reading every row."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the index; its end is where new rows go, so that it costs a write little."""
    op.create_index("ix_task_done_sent_at", "task_done", ["sent_at"])
