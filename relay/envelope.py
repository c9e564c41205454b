"""The envelope of one transaction: what MAIL and RCPT said, octet for octet (RFC 5321 2.3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.reply import Reply

__all__ = ["Envelope", "Recipient", "domain_of", "text"]


class Recipient:
    """One RCPT command: the forward-path between its angle brackets, and the upstream's reply to it."""

    __slots__ = ("path", "refused_here", "reply")

    def __init__(self, path: bytes, reply: Reply | None = None) -> None:
        self.path = path
        self.reply = reply
        self.refused_here = False
        """Whether the reply is a refusal of the relay's own policy."""

    def answered(self, reply: Reply) -> None:
        """Keep the upstream's reply, or the relay's instead of it; of a long one the beginning."""
        self.reply = reply.brief()

    @property
    def negative(self) -> bool:
        """Whether this recipient got a negative reply."""
        return self.reply is not None and not self.reply.positive


class Envelope:
    """Reverse-path and recipients, in the order in which the client gave them."""

    __slots__ = ("recipients", "reverse_path")

    def __init__(self, reverse_path: bytes, recipients: list[Recipient] | None = None) -> None:
        self.reverse_path = reverse_path
        self.recipients: list[Recipient] = [] if recipients is None else recipients

    @property
    def accepted(self) -> list[Recipient]:
        """The recipients that the upstream took."""
        return [each for each in self.recipients if each.reply is not None and each.reply.positive]

    @property
    def anybody(self) -> bool:
        """Whether the upstream took at least one."""
        return any(each.reply is not None and each.reply.positive for each in self.recipients)

    @property
    def possible(self) -> list[Recipient]:
        """The recipients that the upstream took, or may have taken: its reply is not known."""
        return [each for each in self.recipients if each.reply is None or each.reply.positive]

    @property
    def refused(self) -> list[Recipient]:
        """The recipients that got a negative reply."""
        return [each for each in self.recipients if each.reply is not None and not each.reply.positive]


def text(octets: bytes) -> str:
    """Return octets from the wire as text that can be stored: invalid UTF-8 and NUL escaped."""
    return octets.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def domain_of(address: str) -> str:
    """Return what follows the last "@", in lower case; empty when there is none (`<>`, `postmaster`)."""
    return address.rpartition("@")[2].lower() if "@" in address else ""
