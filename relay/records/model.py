"""The record: what one row of `task_done` says, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

__all__ = ["Json", "Record"]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Record:
    """One message that the upstream accepted.

    Text is ready to be stored: UTF-8, with invalid octets and NUL escaped. `sent_at` is aware, UTC;
    `size` is in octets, `duration_ms` in milliseconds from MAIL to the upstream's acceptance.
    `expires_at` is not here: the store computes it from the retention settings when it writes.
    """

    task_id: UUID
    task_type: str
    sender: str
    client: str
    sent_at: datetime
    upstream: str
    upstream_reply: str
    size: int
    duration_ms: int
    recipients: tuple[str, ...]
    client_task_id: str | None = None
    message_id: str | None = None
    data: dict[str, Json] = field(default_factory=dict)
