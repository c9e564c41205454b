"""A send, or a message in doubt, as API and page show it. Pure functions of a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from relay.provider import accepted_as
from relay.records.sends import InDoubt, Send
from relay.web.shown import octets, seconds

__all__ = ["Line", "document", "facts", "headers", "line_of", "refused"]

# For programs


def document(row: Send | InDoubt) -> dict[str, Any]:
    """Return a send, or a message in doubt, as the API shows it: its columns, and what they tell."""
    names = (field.name for field in dataclasses.fields(row))
    found = {name: _plain(getattr(row, name)) for name in names if name != "id"}
    found["state"] = "accepted" if isinstance(row, Send) else "in_doubt"
    if isinstance(row, Send):
        found["provider_id"] = accepted_as(row.upstream_reply)
    return found


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value


# For people


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A send, or a message in doubt, in a table."""

    task_id: str
    moment: datetime
    task_type: str
    sender: str
    recipients: tuple[str, ...]
    reply: str


def line_of(row: Send | InDoubt) -> Line:
    """Return the line of a row."""
    said = row.upstream_reply if isinstance(row, Send) else row.reason
    return Line(row.task_id, row.key[0], row.task_type, row.sender, row.recipients, said)


def facts(row: Send | InDoubt) -> Iterable[tuple[str, Any, str]]:
    """Give what is known of a send: a name, the value, how it is shown."""
    if isinstance(row, Send):
        accepted = accepted_as(row.upstream_reply)
        yield "Accepted", row.sent_at, "time"
        yield "The upstream said", row.upstream_reply.split("\n"), "lines"
        if accepted is not None:
            yield "The provider's id", accepted, "mono"
    else:
        yield "In doubt since", row.since, "time"
        yield "Because", row.reason, ""
    if "client_reply" in row.data:
        heard = row.data["client_reply"]
        yield "The client heard", "nothing: its connection had broken" if heard is None else str(heard), ""
    yield "From", row.sender, "search"
    yield "Client", _client(row), ""
    yield "Upstream", row.upstream, ""
    if row.message_id is not None:
        yield "Message-ID", row.message_id, "mono"
    yield "Task id", row.task_id, "mono"
    if row.client_task_id is not None:
        yield "The application's id", row.client_task_id, "mono"
    exactly = "" if row.size < 1000 else f" ({row.size:,} octets)"
    yield "Size", f"{octets(row.size)}{exactly}", ""
    yield "Took", f"{seconds(row.duration_ms / 1000)} from MAIL on", ""
    if isinstance(row.data.get("tags"), list):
        yield "Tags", row.data["tags"], "lines"
    if row.expires_at is None:
        yield "Kept", "for ever", ""
    else:
        yield "Kept until", row.expires_at, "time"


def _client(row: Send | InDoubt) -> str:
    address = row.data.get("client_address")
    return row.client if address is None else f"{row.client}, from {address}"


def refused(row: Send | InDoubt) -> list[dict[str, str]]:
    """Return the recipients that the upstream refused, each with its reply."""
    found = row.data.get("refused")
    if not isinstance(found, list):
        return []
    return [
        {"recipient": str(each.get("recipient", "")), "reply": str(each.get("reply", ""))}
        for each in found
        if isinstance(each, Mapping)
    ]


def headers(row: Send | InDoubt) -> Iterable[tuple[str, str]]:
    """Give the headers that were kept: each name with a value."""
    found = row.data.get("headers")
    for name, value in found.items() if isinstance(found, Mapping) else ():
        for each in value if isinstance(value, list) else [value]:
            yield str(name), str(each)
