"""The tables, for those who speak plain SQL: their names, versions, columns, and how a time stands in them.

Whoever only writes rows has no need of what SQLAlchemy knows of the tables (`schema`), which is slow to load.
A test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import orjson

__all__ = ["COLUMNS", "NAMES", "SCHEMA_VERSION", "SCHEMA_VERSIONS", "VERSION_TABLE", "utc_text"]

SCHEMA_VERSIONS: Final = ("0001", "0002", "0003", "0004", "0005")
"""Every revision in `migrations`, oldest first; here, since Alembic is too slow to be asked at each start."""
SCHEMA_VERSION: Final = SCHEMA_VERSIONS[-1]
VERSION_TABLE: Final = "task_done_version"
"""Where the revision stands. Not Alembic's default name: an application's own may be in the same database."""

_SEND: Final = (
    *("id", "task_id", "client_task_id", "task_type", "sender", "sender_domain", "client", "sent_at"),
    *("expires_at", "upstream", "upstream_reply", "message_id", "size", "duration_ms", "data"),
)
COLUMNS: Final = {
    "task_done": _SEND,
    "task_done_send": (*_SEND, "ordinal", "recipient", "recipient_domain"),
    "task_in_doubt": (
        *("id", "task_id", "client_task_id", "task_type", "sender", "sender_domain", "client", "since"),
        *("expires_at", "upstream", "reason", "message_id", "size", "duration_ms", "recipients", "data"),
    ),
}
"""The columns, in their order, of the tables and the view that are read as they are."""
NAMES: Final = (
    *(VERSION_TABLE, "task_done", "task_done_recipient", "task_done_send", "task_done_state"),
    "task_in_doubt",
)
"""Every table and view of ours."""


def utc_text(moment: datetime) -> str:
    """Return an aware time as SQLite keeps it: UTC, 26 characters, in microseconds.

    Raises ValueError for a naive time, whose zone would have to be guessed.
    """
    if moment.tzinfo is not UTC:
        if moment.utcoffset() is None:
            raise ValueError("a time without a zone")
        moment = moment.astimezone(UTC)
    if not moment.microsecond:
        return moment.isoformat(" ", "microseconds")[:26]
    return orjson.dumps(moment)[1:27].decode().replace("T", " ")  # a third of the time of `isoformat`
