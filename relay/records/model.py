"""What is kept of messages, as values: those that were accepted, and those of which that is not known.

Nobody changes one that is made. That `Record` and `Doubt` are not frozen is for the message path alone: a
frozen object sets each field by a call, and two of them are made for each message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

__all__ = ["Doubt", "Entry", "Json", "Record", "Settled", "signed"]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(slots=True, init=False)
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
    client_task_id: str | None
    message_id: str | None
    data: dict[str, Json]
    doubted: bool = field(compare=False)
    """Whether a `Doubt` of this message may be kept already: its entry then goes. Not a column."""

    def __init__(
        self,
        task_id: UUID,
        task_type: str,
        sender: str,
        client: str,
        sent_at: datetime,
        upstream: str,
        upstream_reply: str,
        size: int,
        duration_ms: int,
        recipients: tuple[str, ...],
        client_task_id: str | None = None,
        message_id: str | None = None,
        data: dict[str, Json] | None = None,
        doubted: bool = False,
    ) -> None:
        """Written out, since only so it is compiled: that which `dataclass` makes takes six times as long."""
        self.task_id = task_id
        self.task_type = task_type
        self.sender = sender
        self.client = client
        self.sent_at = sent_at
        self.upstream = upstream
        self.upstream_reply = upstream_reply
        self.size = size
        self.duration_ms = duration_ms
        self.recipients = recipients
        self.client_task_id = client_task_id
        self.message_id = message_id
        self.data = {} if data is None else data
        self.doubted = doubted


@dataclass(slots=True)
class Doubt:
    """One message whose end of data went up, and of which nobody knows whether the upstream accepted it.

    Text, `size` and `duration_ms` are as in `Record`, the latter up to `since`, when the doubt began.
    `reason` says in one line why there is no verdict.
    """

    task_id: UUID
    task_type: str
    sender: str
    client: str
    since: datetime
    upstream: str
    reason: str
    size: int
    duration_ms: int
    recipients: tuple[str, ...]
    client_task_id: str | None = None
    message_id: str | None = None
    data: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of a doubt other than by acceptance: the upstream refused the message after all."""

    task_id: UUID


Entry = Record | Doubt | Settled
"""What the recorder keeps, in the order in which it was given."""


def signed(data: dict[str, Json], relay: str) -> dict[str, Json]:
    """Return the `data` of an entry with the name of the relay that writes it, if that has one."""
    return {"relay": relay, **data} if relay else data
