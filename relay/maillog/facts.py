"""What is known of one message, as the line about it has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict
from uuid import UUID

from relay.outcome import Outcome

__all__ = ["Facts", "Refusal", "Wire"]

Wire = str | bytes
"""Text as it came: it may hold any octet or character."""


class Refusal(TypedDict):
    """A recipient that the upstream did not take, and its reply."""

    recipient: Wire
    reply: Wire


class Facts(TypedDict, total=False):
    """What is known of a message, in the order of its line; what is not known is left out.

    `recipients` are those that the upstream accepted, `refused` the others; `reply` is the upstream's last
    word, `client_reply` what the client was told. Times in seconds: waiting for a connection, from the end of
    data to the upstream's reply, making the row durable, and from MAIL to now.
    """

    outcome: Outcome | str | None
    task_id: Required[UUID | str]
    client: Required[str]
    listener: Required[str]
    sender: Required[Wire]
    recipients: Required[Sequence[Wire]]
    recipient_count: Required[int]
    refused: Sequence[Refusal]
    refused_count: int
    task_type: str
    message_id: Wire
    size: int
    upstream: str
    reply: Wire
    client_reply: Wire
    wait_s: float
    upstream_s: float
    commit_s: float
    total_s: float
    client_gone: bool
