"""What became of a mail transaction: the one value that reply, metric, log line and row agree on."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """The seven ends of a transaction; the values are the metric's label values."""

    ACCEPTED = "accepted"
    """The upstream replied 2yz to the end of data. The only outcome that writes a row."""
    REJECTED = "rejected"
    """The upstream replied 5yz."""
    DEFERRED = "deferred"
    """The upstream replied 4yz."""
    UNAVAILABLE = "unavailable"
    """No usable answer from the upstream before the end of data."""
    IN_DOUBT = "in_doubt"
    """The end of data went up and no usable reply came back (RFC 1047)."""
    REFUSED = "refused"
    """Refused by the relay's own policy."""
    ABORTED = "aborted"
    """The client went, or gave the transaction up."""
