"""Views for analysts, and, where the database keeps them, comments that a tool such as Metabase shows."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

_FIGURES = """
    count(*) AS messages,
    sum((SELECT count(*) FROM task_done_recipient WHERE task_done_id = task_done.id)) AS recipients,
    sum(size) AS octets,
    avg(duration_ms) AS average_ms,
    max(duration_ms) AS slowest_ms,
    max(sent_at) AS last_sent_at
"""
_HOUR = {
    "sqlite": "strftime('%Y-%m-%d %H:00:00', sent_at)",
    "postgresql": "date_trunc('hour', sent_at, 'UTC')",
}


def upgrade() -> None:
    """Make the views, then say what everything is."""
    dialect = op.get_context().dialect.name
    hour = _HOUR[dialect]
    op.execute(
        f"CREATE VIEW task_done_by_hour AS SELECT {hour} AS hour, {_FIGURES} FROM task_done GROUP BY {hour}"  # noqa: S608
    )
    op.execute(
        f"CREATE VIEW task_done_by_type AS SELECT task_type, {_FIGURES} FROM task_done GROUP BY task_type"  # noqa: S608
    )
    op.execute(
        f"CREATE VIEW task_done_by_sender AS SELECT lower(sender) AS sender, {_FIGURES} "  # noqa: S608
        "FROM task_done GROUP BY lower(sender)"
    )
    op.execute(
        "CREATE VIEW task_done_by_recipient_domain AS "
        "SELECT recipient_domain, count(DISTINCT task_done_id) AS messages, count(*) AS recipients, "
        "max(sent_at) AS last_sent_at FROM task_done_recipient GROUP BY recipient_domain"
    )
    if dialect == "postgresql":
        for name, (kind, text, columns) in _COMMENTS.items():
            op.execute(f"COMMENT ON {kind} {name} IS '{text}'")
            for column, meaning in columns.items():
                op.execute(f"COMMENT ON COLUMN {name}.{column} IS '{meaning}'")


_SEND = {
    "id": "Integer key",
    "task_id": "UUIDv7, the identity of this send, also in the log of the relay",
    "client_task_id": "Id that the application gave, if any",
    "task_type": "What kind of message it is",
    "sender": "Reverse-path as given; empty for the null reverse-path",
    "sender_domain": "What follows its last @, in lower case",
    "client": "Authenticated user, else the address of the client",
    "sent_at": "When the upstream accepted",
    "expires_at": "When the row may be deleted; null: never",
    "upstream": "Name of the upstream",
    "upstream_reply": "Its reply to the end of data, usually with its id of the message",
    "message_id": "The Message-ID header, if any",
    "size": "Octets of the message as sent",
    "duration_ms": "Milliseconds from MAIL to the acceptance",
    "data": "Everything else: kept headers, tags, refused recipients, the name of the relay",
}
_RECIPIENT = {
    "ordinal": "Place among the accepted recipients, from 0",
    "recipient": "Forward-path as given",
    "recipient_domain": "What follows its last @, in lower case",
}
_GROUP = {
    "messages": "Messages that the upstream accepted",
    "recipients": "Recipients of them that it accepted",
    "octets": "Octets of the messages",
    "average_ms": "Milliseconds from MAIL to the acceptance, on average",
    "slowest_ms": "The most of them",
    "last_sent_at": "When the last of them was accepted",
}
_COMMENTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "task_done": ("TABLE", "One row for each message that the upstream accepted", _SEND),
    "task_done_recipient": (
        "TABLE",
        "One row for each recipient that the upstream accepted",
        {"task_done_id": "The row in task_done", **_RECIPIENT, "sent_at": "As in task_done"},
    ),
    "task_in_doubt": (
        "TABLE",
        "Messages that went up, and of which nobody knows whether the upstream accepted them",
        {
            **{name: text for name, text in _SEND.items() if name not in ("sent_at", "upstream_reply")},
            "since": "When the doubt began",
            "reason": "Why there is no verdict",
            "recipients": "The recipients that the upstream had accepted",
        },
    ),
    "task_done_state": (
        "TABLE",
        "What the relays on this database tell each other; leave it alone",
        {"name": "What it is about", "value": "What is said", "expires_at": "Until when it counts"},
    ),
    "task_done_version": ("TABLE", "Version of these tables; leave it alone", {"version_num": "The version"}),
    "task_done_send": (
        "VIEW",
        "One flat row for each recipient, with the columns of its message",
        {**_SEND, **_RECIPIENT},
    ),
    "task_done_by_hour": ("VIEW", "Figures of each hour, UTC", {"hour": "Its beginning", **_GROUP}),
    "task_done_by_type": ("VIEW", "Figures of each task type", {"task_type": "The task type", **_GROUP}),
    "task_done_by_sender": (
        "VIEW",
        "Figures of each sender, whatever the case",
        {"sender": "Reverse-path in lower case", **_GROUP},
    ),
    "task_done_by_recipient_domain": (
        "VIEW",
        "Figures of each domain that mail goes to",
        {
            "recipient_domain": "The domain",
            **{name: _GROUP[name] for name in ("messages", "recipients", "last_sent_at")},
        },
    ),
}
