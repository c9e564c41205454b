"""An entry as one line of a spool, and back.

Rules. A line is a JSON object that says its kind (`record`, `doubt`, `settled`) and carries a checksum of its
octets: what a crash tore, or a disk spoiled, is recognised. What another version wrote is told from that.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

from relay.records.model import Doubt, Entry, Json, Record, Settled

__all__ = ["CorruptLineError", "UnknownRowError", "contents", "decode", "encode"]

_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","([a-z]{1,20})":(\{.*\})\}\n?', re.DOTALL)
_KINDS: dict[type[Entry], bytes] = {Record: b"record", Doubt: b"doubt", Settled: b"settled"}
_NOT_KEPT = frozenset({"doubted"})
_encode_json = json.JSONEncoder(separators=(",", ":")).encode  # ASCII: any text survives, surrogates too


class CorruptLineError(ValueError):
    """A line is not what was written."""


class UnknownRowError(CorruptLineError):
    """A line is as it was written, by a version that keeps what this one does not know."""


def encode(entry: Entry, reason: str | None = None) -> bytes:
    """Return the line for `entry`; `reason` is for people who read the file and is not read back.

    Raises ValueError, TypeError or RecursionError for `data` that JSON cannot carry.
    """
    kind = _KINDS[type(entry)]
    row: dict[str, object] = {
        name: getattr(entry, name) for name in entry.__dataclass_fields__ if name not in _NOT_KEPT
    }
    row["task_id"] = str(entry.task_id)
    if isinstance(entry, Record):
        row["sent_at"] = entry.sent_at.isoformat()
    elif isinstance(entry, Doubt):
        row["since"] = entry.since.isoformat()
    if reason is not None:
        # A doubt has a reason of its own.
        row["rejected" if isinstance(entry, Doubt) else "reason"] = reason
    octets = _encode_json(row).encode("ascii")
    return b'{"crc32":"%08x","%b":%b}\n' % (zlib.crc32(octets), kind, octets)


def contents(line: bytes) -> tuple[str, dict[str, Json]]:
    """Return the kind of a line and its object; raise CorruptLineError when it is not as it was written."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise CorruptLineError("torn, or not a line of a spool")
    checksum, kind, octets = match.groups()
    if zlib.crc32(octets) != int(checksum, 16):
        raise CorruptLineError("checksum differs")
    try:
        row: dict[str, Json] = json.loads(octets)
    except (ValueError, RecursionError) as error:
        raise CorruptLineError(f"not JSON: {error!r}") from error
    return kind.decode(), row


def decode(line: bytes) -> Entry:
    """Return the entry of a line; raise CorruptLineError when the line is not as it was written."""
    kind, row = contents(line)
    try:
        return _READERS[kind](row)
    except (ValueError, TypeError, KeyError) as error:
        raise UnknownRowError(f"not a {kind} of this version: {error!r}") from error


def _record(row: dict[str, Any]) -> Record:
    return Record(
        task_id=UUID(row["task_id"]),
        task_type=row["task_type"],
        sender=row["sender"],
        client=row["client"],
        sent_at=datetime.fromisoformat(row["sent_at"]),
        upstream=row["upstream"],
        upstream_reply=row["upstream_reply"],
        size=row["size"],
        duration_ms=row["duration_ms"],
        recipients=tuple(row["recipients"]),
        client_task_id=row["client_task_id"],
        message_id=row["message_id"],
        data=row["data"],
        # It has waited, and what else was kept of its message meanwhile, nobody knows here.
        doubted=True,
    )


def _doubt(row: dict[str, Any]) -> Doubt:
    return Doubt(
        task_id=UUID(row["task_id"]),
        task_type=row["task_type"],
        sender=row["sender"],
        client=row["client"],
        since=datetime.fromisoformat(row["since"]),
        upstream=row["upstream"],
        reason=row["reason"],
        size=row["size"],
        duration_ms=row["duration_ms"],
        recipients=tuple(row["recipients"]),
        client_task_id=row["client_task_id"],
        message_id=row["message_id"],
        data=row["data"],
    )


def _settled(row: dict[str, Any]) -> Settled:
    return Settled(UUID(row["task_id"]))


_READERS: dict[str, Callable[[dict[str, Any]], Entry]] = {
    "record": _record,
    "doubt": _doubt,
    "settled": _settled,
}
