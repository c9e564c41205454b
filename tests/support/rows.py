"""Rows to be kept, and lines of a spool, for tests to which it does not matter what is in them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from relay.records.identity import uuid7
from relay.records.model import Record

__all__ = ["SENT_AT", "make_record", "spool_line"]

SENT_AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def make_record(sender: str = "a@example.com", **changes: Any) -> Record:
    """Return a row with an identity of its own."""
    record = Record(
        task_id=uuid7(),
        task_type="mention",
        sender=sender,
        client="127.0.0.1",
        sent_at=SENT_AT,
        upstream="primary",
        upstream_reply="250 2.0.0 Ok: queued as 4FZ",
        size=1234,
        duration_ms=56,
        recipients=("b@example.org", "c@example.net"),
    )
    return replace(record, **changes)


def spool_line(kind: str, octets: bytes) -> bytes:
    """Return a line of a spool whose checksum is right, whatever it carries."""
    return b'{"crc32":"%08x","%b":%b}\n' % (zlib.crc32(octets), kind.encode(), octets)
