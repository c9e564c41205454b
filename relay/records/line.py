"""A message as one line of JSON, made when its end of data has come: what the journal holds of it.

How long it is also says how much place its row may need in the spool (`bound.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import orjson

from relay.records.model import Json

__all__ = ["whole_line"]


def whole_line(
    task_id: UUID,
    task_type: str,
    sender: str,
    client: str,
    since: datetime,
    upstream: str,
    size: int,
    duration_ms: int,
    client_task_id: str | None,
    message_id: str | None,
    recipients: Sequence[str],
    data: dict[str, Json],
) -> bytes:
    """Return a message as a slot holds it, however long: `since` is when its end of data came.

    Its values as they are: to make a `Doubt` of them for every message would cost more than the line.
    """
    values = (
        *(task_id, task_type, sender, client, since, upstream, size, duration_ms, client_task_id, message_id),
        *(recipients, data),
    )
    try:
        return orjson.dumps(values)
    except TypeError:  # a lone surrogate, an integer of more than 64 bits: not for orjson, but for JSON
        return json.dumps(values, default=str).encode("ascii")
