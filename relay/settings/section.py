"""What sections of the configuration have in common: all of them, and those with an address. No I/O.

Rules: each check stands in a validator of the key that it is about, so that all mistakes of a file are
reported together, each under its key; a check that needs two keys stands at the later one.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from relay.settings.address import Address

__all__ = ["Endpoint", "Section"]


class Section(BaseModel):
    """A table of the file: frozen, every key known, described by the texts under its fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        hide_input_in_errors=True,  # the input may be a secret
    )


class Endpoint(Section):
    """A table with an address, to listen on or to connect to."""

    address: str

    @property
    def host(self) -> str:
        """The name or the IP address (without brackets) in the address."""
        return Address.parse(self.address, unix=True).host

    @property
    def path(self) -> str:
        """The file of a unix socket; empty for a TCP port."""
        return Address.parse(self.address, unix=True).path

    @property
    def port(self) -> int:
        """The TCP port in the address."""
        return Address.parse(self.address, unix=True).port

    @property
    def loopback(self) -> bool:
        """Whether the address is this machine's own and nobody else's."""
        return Address.parse(self.address, unix=True).loopback

    def collides(self, other: Endpoint) -> bool:
        """Whether both cannot be bound at the same time."""
        mine, theirs = Address.parse(self.address, unix=True), Address.parse(other.address, unix=True)
        return mine.collides(theirs)
