"""A batch of entries into SQLite: one statement, a transaction of its own, whatever the batch holds.

Rules. What takes the batch apart are triggers of a temporary view, which belong to the connection and not to
the file. The view has a row for each entry, and one more for each doubt that ends. A batch of nothing but
sends to one recipient, the usual one, is a single row of a wider view instead, with a slot for each send.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Final
from uuid import UUID

import orjson

from relay.envelope import domain_of
from relay.records.errors import RejectedRecordError
from relay.records.model import Doubt, Entry, Record, signed
from relay.records.retention import Retention
from relay.records.sqlite.connection import in_transaction
from relay.records.tables import utc_text

__all__ = ["insert_entries", "prepare"]

_AT_ONCE: Final = 1024
"""Rows of the view in one statement: two for each entry of the recorder's largest batch. SQLite takes no more
than 32,766 values."""
_COLUMNS: Final = (
    *("kind", "task_id", "client_task_id", "task_type", "sender", "sender_domain", "client", "moment"),
    *("expires_at", "upstream", "said", "message_id", "size", "duration_ms", "recipients", "domain", "data"),
)
_NOTHING: Final = (0,) * len(_COLUMNS)
"""A row that no trigger takes. Not NULL: the sqlite3 module looks for an adapter of each None, which costs as
much as ten texts. So an id that is not there is an empty text, too."""
_SEND: Final = 1
_SEND_TO_ONE: Final = 2
_DOUBT: Final = 3
_END: Final = 4
_WIDTHS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Slots of the wider views. SQLite takes no more than 2,000 columns, and each slot takes time at a start."""


def prepare(raw: sqlite3.Connection) -> None:
    """Make what takes a batch apart; temporary, so it belongs to this connection and not to the file."""
    for statement in (_VIEW, *_TRIGGERS):
        raw.execute(statement)
    for width in _WIDTHS:
        raw.execute(_wide_view(width))
        raw.execute(_wide_trigger(width))


def insert_entries(
    raw: sqlite3.Connection, entries: Sequence[Entry], retention: Retention, relay: str
) -> None:
    """Insert the entries with one statement, however many they are: a transaction of its own.

    Each statement, BEGIN and COMMIT among them, lets go of the interpreter lock and asks for it again,
    `executemany` for every row; that costs up to 5 ms each time when the event loop is busy, which is when
    batches are big. Measured for 500 rows beside a loop that never rests: `executemany` 0.8 s, two statements
    0.07 s; in the whole relay under load one statement takes 5 % less CPU for a message than BEGIN, two and
    COMMIT. Values are bound as they are: a batch as one JSON text costs a lone message 88,000 instructions
    more, of nine each 12,000 (docs/benchmarks.md).

    Rows of a view with triggers go through a table of their own first, and each runs a program that opens
    every index anew; one wide row does neither: of nine messages each costs 37,000 instructions less
    (docs/benchmarks.md).
    """
    rows: list[object] = []
    doubts: list[object] = []
    ended = []
    try:
        for entry in entries:
            if type(entry) is Record:
                rows += _send_row(entry, retention, relay)
                if entry.doubted:
                    ended.append(entry.task_id)
            elif type(entry) is Doubt:
                doubts += _doubt_row(entry, retention, relay)
            else:
                ended.append(entry.task_id)
        # In this order, so that the one within the batch does not matter: nobody doubts a message again.
        rows += doubts
        for task_id in ended:
            rows += (_END, _uuid_text(task_id), *_NOTHING[2:])
        if len(rows) <= _WIDTHS[-1] * len(_COLUMNS) and _all_to_one(rows):
            _execute_wide(raw, rows)
        else:
            _execute(raw, rows)
    # No time zone, a lone surrogate, an integer beyond 64 bits: all values are bound before SQLite begins.
    except (TypeError, ValueError, OverflowError) as error:
        raise RejectedRecordError(f"a value that cannot be stored: {error}") from error


def _all_to_one(rows: list[object]) -> bool:
    kinds = rows[:: len(_COLUMNS)]
    return kinds.count(_SEND_TO_ONE) == len(kinds)


def _execute_wide(raw: sqlite3.Connection, rows: list[object]) -> None:
    width, statement = _insert_wide(len(rows) // len(_COLUMNS))
    # What is there already changes nothing, so the last send fills the slots that are left.
    rows += rows[-len(_COLUMNS) :] * (width - len(rows) // len(_COLUMNS))
    raw.execute(statement, rows)


@cache
def _insert_wide(count: int) -> tuple[int, str]:
    width = next(width for width in _WIDTHS if width >= count)
    values = ", ".join("?" * width * len(_COLUMNS))
    return width, f"INSERT INTO task_done_batch_{width} VALUES ({values})"  # noqa: S608


def _execute(raw: sqlite3.Connection, rows: list[object]) -> None:
    width = len(_COLUMNS)
    count = len(rows) // width
    if count > _AT_ONCE:  # none of the recorder's
        in_transaction(raw, lambda raw: _execute_in_steps(raw, rows, _AT_ONCE * width))
        return
    # Few statements serve batches of every size, so that each is compiled once.
    size = 1 << (count - 1).bit_length()
    rows += _NOTHING * (size - count)
    raw.execute(_insert(size), rows)


def _execute_in_steps(raw: sqlite3.Connection, rows: list[object], step: int) -> None:
    for begin in range(0, len(rows), step):
        _execute(raw, rows[begin : begin + step])


@cache
def _insert(size: int) -> str:
    row = f"({', '.join('?' * len(_COLUMNS))})"
    return f"INSERT INTO task_done_batch VALUES {', '.join([row] * size)}"  # noqa: S608


def _send_row(record: Record, retention: Retention, relay: str) -> tuple[object, ...]:
    expires_at = retention.expires_at(record.task_type, record.sent_at)
    recipients = record.recipients
    alone = len(recipients) == 1  # nearly always, and JSON takes SQLite 10,000 instructions
    return (
        _SEND_TO_ONE if alone else _SEND,
        _uuid_text(record.task_id),
        record.client_task_id or "",
        record.task_type,
        record.sender,
        domain_of(record.sender),
        record.client,
        utc_text(record.sent_at),
        None if expires_at is None else utc_text(expires_at),
        record.upstream,
        record.upstream_reply,
        record.message_id or "",
        record.size,
        record.duration_ms,
        recipients[0] if alone else _with_domains(recipients),
        domain_of(recipients[0]) if alone else "",
        orjson.dumps(signed(record.data, relay)).decode(),
    )


def _doubt_row(doubt: Doubt, retention: Retention, relay: str) -> tuple[object, ...]:
    expires_at = retention.expires_at(doubt.task_type, doubt.since)
    return (
        _DOUBT,
        _uuid_text(doubt.task_id),
        doubt.client_task_id or "",
        doubt.task_type,
        doubt.sender,
        domain_of(doubt.sender),
        doubt.client,
        utc_text(doubt.since),
        None if expires_at is None else utc_text(expires_at),
        doubt.upstream,
        doubt.reason,
        doubt.message_id or "",
        doubt.size,
        doubt.duration_ms,
        orjson.dumps(doubt.recipients).decode(),
        "",
        orjson.dumps(signed(doubt.data, relay)).decode(),
    )


def _uuid_text(identity: UUID) -> str:
    return orjson.dumps(identity)[1:-1].decode()  # in half the time of `str`


def _with_domains(recipients: Sequence[str]) -> str:
    """Return a JSON object with a member for each recipient, in order: its address, and its domain.

    A recipient that was given twice has two: an object of JSON may have that, a dict of Python may not.
    """
    domains = {recipient: domain_of(recipient) for recipient in recipients}
    if len(domains) == len(recipients):
        return orjson.dumps(domains).decode()
    members = [orjson.dumps({recipient: domains[recipient]})[1:-1] for recipient in recipients]
    return f"{{{b','.join(members).decode()}}}"


_VIEW: Final = (
    f"CREATE TEMP VIEW task_done_batch AS SELECT {', '.join(f'NULL AS {name}' for name in _COLUMNS)}"
)
_INTO_SENDS: Final = """
    INSERT INTO task_done (
        task_id, client_task_id, task_type, sender, sender_domain, client, sent_at, expires_at,
        upstream, upstream_reply, message_id, size, duration_ms, data
    )
    VALUES {sends} ON CONFLICT (task_id) DO NOTHING;
"""
_INTO_RECIPIENTS: Final = """
    INSERT INTO task_done_recipient (task_done_id, ordinal, recipient, recipient_domain, sent_at)
    {recipients} ON CONFLICT (task_done_id, ordinal) DO NOTHING;
"""
# The columns of a view: their names, and in a wide one the number of the slot behind them.
_SEND_VALUES: Final = """(
    NEW.task_id{slot}, nullif(NEW.client_task_id{slot}, ''), NEW.task_type{slot}, NEW.sender{slot},
    NEW.sender_domain{slot}, NEW.client{slot}, NEW.moment{slot}, NEW.expires_at{slot}, NEW.upstream{slot},
    NEW.said{slot}, nullif(NEW.message_id{slot}, ''), NEW.size{slot}, NEW.duration_ms{slot}, NEW.data{slot}
)"""
# The recipients through the row's task_id: it may have been there before. What costs a recipient is what is
# asked of JSON: an element with five values to extract, looked up by task_id, was twice as dear.
_RECIPIENT_VALUES: Final = """(
    (SELECT id FROM task_done WHERE task_id = NEW.task_id{slot}), 0, NEW.recipients{slot}, NEW.domain{slot},
    NEW.moment{slot}
)"""
_RECIPIENTS: Final = """
    SELECT (SELECT id FROM task_done WHERE task_id = NEW.task_id), rowid, key, value, NEW.moment
    FROM json_each(NEW.recipients) WHERE true
"""


def _keep_to_one(slots: Sequence[str]) -> str:
    """Return the statements for a send to one recipient in each of the slots."""
    sends, recipients = (
        ", ".join(each.format(slot=slot) for slot in slots) for each in (_SEND_VALUES, _RECIPIENT_VALUES)
    )
    return _INTO_SENDS.format(sends=sends) + _INTO_RECIPIENTS.format(recipients=f"VALUES {recipients}")


_KEEP_SEND: Final = _INTO_SENDS.format(sends=_SEND_VALUES.format(slot="")) + _INTO_RECIPIENTS.format(
    recipients=_RECIPIENTS
)
_KEEP_DOUBT: Final = """
    INSERT INTO task_in_doubt (
        task_id, client_task_id, task_type, sender, sender_domain, client, since, expires_at,
        upstream, reason, message_id, size, duration_ms, recipients, data
    )
    SELECT
        NEW.task_id, nullif(NEW.client_task_id, ''), NEW.task_type, NEW.sender, NEW.sender_domain, NEW.client,
        NEW.moment, NEW.expires_at, NEW.upstream, NEW.said, nullif(NEW.message_id, ''),
        NEW.size, NEW.duration_ms, NEW.recipients, NEW.data
    WHERE NOT EXISTS (SELECT 1 FROM task_done WHERE task_id = NEW.task_id)
    ON CONFLICT (task_id) DO NOTHING;
"""
_END_DOUBT: Final = "DELETE FROM task_in_doubt WHERE task_id = NEW.task_id;"
_TRIGGERS: Final = tuple(
    f"""
    CREATE TEMP TRIGGER task_done_batch_{kind} INSTEAD OF INSERT ON task_done_batch WHEN NEW.kind = {kind}
    BEGIN {statements} END
    """
    for kind, statements in (
        (_SEND, _KEEP_SEND),
        (_SEND_TO_ONE, _keep_to_one([""])),
        (_DOUBT, _KEEP_DOUBT),
        (_END, _END_DOUBT),
    )
)


def _wide_view(width: int) -> str:
    columns = ", ".join(f"NULL AS {name}_{slot}" for slot in range(width) for name in _COLUMNS)
    return f"CREATE TEMP VIEW task_done_batch_{width} AS SELECT {columns}"


def _wide_trigger(width: int) -> str:
    return f"""
    CREATE TEMP TRIGGER task_done_batch_{width}_to_one INSTEAD OF INSERT ON task_done_batch_{width}
    BEGIN {_keep_to_one([f"_{slot}" for slot in range(width)])} END
    """
