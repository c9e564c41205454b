"""A batch of entries into PostgreSQL: one statement, a transaction of its own, in one round trip.

Rules. The whole batch goes as JSON, which costs the relay least, and the server takes it apart. How entries
of one batch bear on each other is seen to here, since all parts of one statement look at the same moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import orjson

from relay.envelope import domain_of
from relay.records.errors import RejectedRecordError
from relay.records.model import Doubt, Entry, Record, signed
from relay.records.postgres.database import Connection
from relay.records.retention import Retention
from relay.records.tables import utc_text

__all__ = ["insert_entries", "statement_of"]


async def insert_entries(
    connection: Connection, entries: Sequence[Entry], retention: Retention, relay: str
) -> None:
    """Insert the entries; raises RejectedRecordError for a value that JSON or UTC cannot express."""
    await connection.execute(*statement_of(entries, retention, relay))


def statement_of(entries: Sequence[Entry], retention: Retention, relay: str) -> tuple[object, ...]:
    """Return the statement for the entries, and its arguments."""
    rows: list[dict[str, object]] = []
    recipients: list[dict[str, object]] = []
    doubts: list[Doubt] = []
    ended: list[UUID] = []
    try:
        for entry in entries:
            if isinstance(entry, Record):
                rows.append(_row(entry, retention, relay))
                recipients += _recipients(entry)
                if entry.doubted:
                    ended.append(entry.task_id)
            elif isinstance(entry, Doubt):
                doubts.append(entry)
            else:
                ended.append(entry.task_id)
        batch = orjson.dumps(rows).decode(), orjson.dumps(recipients).decode()
        if not doubts and not ended:
            return _BATCH, *batch
        over = {*ended, *(row["task_id"] for row in rows)}
        open_doubts = [_doubt(doubt, retention, relay) for doubt in doubts if doubt.task_id not in over]
        _check([_doubt(doubt, retention, relay) for doubt in doubts if doubt.task_id in over])
        return _MIXED, *batch, orjson.dumps(open_doubts).decode(), ended
    except (TypeError, ValueError) as error:  # no time zone, a lone surrogate, an integer beyond 64 bits
        raise RejectedRecordError(f"a value that cannot be stored: {error}") from error


def _check(rows: Sequence[dict[str, object]]) -> None:
    """See that rows that are not kept could be: a batch is refused whatever its order."""
    orjson.dumps(rows)


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else f"{utc_text(moment)}+00"


def _row(record: Record, retention: Retention, relay: str) -> dict[str, object]:
    return {
        "task_id": record.task_id,
        "client_task_id": record.client_task_id,
        "task_type": record.task_type,
        "sender": record.sender,
        "sender_domain": domain_of(record.sender),
        "client": record.client,
        "sent_at": _moment(record.sent_at),
        "expires_at": _moment(retention.expires_at(record.task_type, record.sent_at)),
        "upstream": record.upstream,
        "upstream_reply": record.upstream_reply,
        "message_id": record.message_id,
        "size": record.size,
        "duration_ms": record.duration_ms,
        "data": signed(record.data, relay),
    }


def _recipients(record: Record) -> list[dict[str, object]]:
    return [
        {
            "task_id": record.task_id,
            "ordinal": ordinal,
            "recipient": recipient,
            "recipient_domain": domain_of(recipient),
        }
        for ordinal, recipient in enumerate(record.recipients)
    ]


def _doubt(doubt: Doubt, retention: Retention, relay: str) -> dict[str, object]:
    return {
        "task_id": doubt.task_id,
        "client_task_id": doubt.client_task_id,
        "task_type": doubt.task_type,
        "sender": doubt.sender,
        "sender_domain": domain_of(doubt.sender),
        "client": doubt.client,
        "since": _moment(doubt.since),
        "expires_at": _moment(retention.expires_at(doubt.task_type, doubt.since)),
        "upstream": doubt.upstream,
        "reason": doubt.reason,
        "message_id": doubt.message_id,
        "size": doubt.size,
        "duration_ms": doubt.duration_ms,
        "recipients": doubt.recipients,
        "data": signed(doubt.data, relay),
    }


_INSERT = """
    INSERT INTO task_done (
        task_id, client_task_id, task_type, sender, sender_domain, client, sent_at, expires_at,
        upstream, upstream_reply, message_id, size, duration_ms, data
    )
    SELECT * FROM jsonb_to_recordset($1::jsonb) AS batch (
        task_id uuid, client_task_id text, task_type text, sender text, sender_domain text, client text,
        sent_at timestamptz, expires_at timestamptz, upstream text, upstream_reply text, message_id text,
        size bigint, duration_ms bigint, data jsonb
    )
    ON CONFLICT (task_id) DO NOTHING
    RETURNING id, task_id, sent_at
"""
# A row that was there before has its recipients already: both came in one statement.
_INSERT_RECIPIENTS = """
    INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
    SELECT new.id, ordinal, recipient, recipient_domain, new.sent_at
    FROM jsonb_to_recordset($2::jsonb) AS batch (
        task_id uuid, ordinal integer, recipient text, recipient_domain text
    )
    JOIN new USING (task_id)
    ON CONFLICT (task_done_id, ordinal) DO NOTHING
"""
_INSERT_DOUBTS = """
    INSERT INTO task_in_doubt (
        task_id, client_task_id, task_type, sender, sender_domain, client, since, expires_at,
        upstream, reason, message_id, size, duration_ms, recipients, data
    )
    SELECT * FROM jsonb_to_recordset($3::jsonb) AS batch (
        task_id uuid, client_task_id text, task_type text, sender text, sender_domain text, client text,
        since timestamptz, expires_at timestamptz, upstream text, reason text, message_id text,
        size bigint, duration_ms bigint, recipients jsonb, data jsonb
    )
    WHERE NOT EXISTS (SELECT 1 FROM task_done WHERE task_done.task_id = batch.task_id)
    ORDER BY task_id  -- else a join decides which of one moment comes first
    ON CONFLICT (task_id) DO NOTHING
"""
_BATCH = f"WITH new AS ({_INSERT}) {_INSERT_RECIPIENTS}"
_MIXED = f"""
    WITH new AS ({_INSERT}), received AS ({_INSERT_RECIPIENTS}), doubtful AS ({_INSERT_DOUBTS})
    DELETE FROM task_in_doubt WHERE task_id = ANY($4::uuid[])
"""  # noqa: S608
