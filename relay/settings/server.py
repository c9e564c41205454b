"""The keys of `[server]`: the relay as its clients meet it. No I/O, but for the machine's own name.

Rules: what this version does not carry is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from relay.settings.kinds import Count, Duration, DurationOrZero, Flag, OwnName, Size, machine_name, written
from relay.settings.section import Section

__all__ = ["ServerSettings"]

_NOT_YET = "not available in this version"


class ServerSettings(Section):
    """The relay as its clients meet it."""

    hostname: OwnName = Field(default_factory=machine_name)
    """Name in the greeting and towards the upstream. Default: the machine's fully qualified name."""
    max_message_size: Size = written("50MiB")
    """Largest message, in octets as sent. 0: whatever the upstream allows."""
    max_recipients: Count = 1000
    """Recipients of one message."""
    max_connections: Count = 1000
    """Client connections at the same time."""
    max_connections_per_client: Count = 100
    """Client connections at the same time from one address."""
    bare_newlines: Literal["normalize", "refuse"] = "normalize"
    """A stray CR or LF in a message: LF is made a line end and CR a space, or the message is refused."""
    received_header: Flag = False
    """Whether the relay puts a Received header before the message. In this version: no."""
    idle_timeout: Duration = written("5m")
    """How long a client may be silent between commands (RFC 5321 4.5.3.2.7 asks for 5 minutes)."""
    min_data_rate: Size = written("500B")
    """A message that arrives slower than this in a second, after 30 s of grace, is aborted. 0: no limit."""
    lease_idle_timeout: Duration = written("30s")
    """How long a client silent in the middle of a transaction keeps its upstream connection."""
    drain_timeout: DurationOrZero = written("30s")
    """How long a stop waits for the transactions under way."""
    reuse_port: Flag = False
    """Whether several relays on one machine may listen on the same port (SO_REUSEPORT)."""

    @field_validator("received_header")
    @classmethod
    def _no_received_header(cls, value: bool) -> bool:
        if value:
            raise ValueError(f"{_NOT_YET}: the Received header of the relay's own")
        return value
