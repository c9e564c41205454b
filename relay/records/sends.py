"""Sends and messages in doubt as values: which a search wants, and what it finds. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from relay.records.model import Json

__all__ = ["InDoubt", "Key", "Send", "SendFilter"]

Key = tuple[datetime, int]
"""The place of a row in the order of its table, and where a page ended: time and id."""


@dataclass(frozen=True, slots=True)
class SendFilter:
    """Which rows: those to which all that is given applies.

    `sender` and `recipient` are an address, matched without regard to case, `@` and a domain, or a pattern
    with `*`; an empty `sender` is the null reverse-path. `aliases` are other spellings under which an address
    that is whole may be kept as a recipient. `task_type`, `client` and `upstream` are names or patterns; the
    others match exactly, `message_id` also without its angle brackets. `since` is the first moment, `until`
    the first one that no longer counts; aware.
    """

    sender: str | None = None
    recipient: str | None = None
    task_type: str | None = None
    client: str | None = None
    message_id: str | None = None
    task_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None
    upstream: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Send:
    """One row of `task_done`, with the recipients that the upstream accepted, in their order.

    Times are aware, UTC; `size` is in octets, `duration_ms` in milliseconds.
    """

    id: int
    task_id: str
    client_task_id: str | None
    task_type: str
    sender: str
    sender_domain: str
    client: str
    sent_at: datetime
    expires_at: datetime | None
    upstream: str
    upstream_reply: str
    message_id: str | None
    size: int
    duration_ms: int
    data: dict[str, Json]
    recipients: tuple[str, ...]

    @property
    def key(self) -> Key:
        """Its place among all."""
        return self.sent_at, self.id


@dataclass(frozen=True, slots=True)
class InDoubt:
    """One row of `task_in_doubt`, with the recipients that the upstream had accepted, in their order.

    Times are aware, UTC; `size` is in octets, `duration_ms` in milliseconds, from MAIL to `since`.
    """

    id: int
    task_id: str
    client_task_id: str | None
    task_type: str
    sender: str
    sender_domain: str
    client: str
    since: datetime
    expires_at: datetime | None
    upstream: str
    reason: str
    message_id: str | None
    size: int
    duration_ms: int
    data: dict[str, Json]
    recipients: tuple[str, ...]

    @property
    def key(self) -> Key:
        """Its place among all."""
        return self.since, self.id
