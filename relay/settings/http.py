"""The keys of `[http]`: where metrics, health, page and API are, and who gets an answer. No I/O.

Rules: a token is one that can stand in a header, and that nobody guesses.
"""

from __future__ import annotations

from pydantic import SecretStr, field_validator

from relay.settings.kinds import FileName, HttpAddress, OwnName, check_length, written
from relay.settings.section import Endpoint

__all__ = ["HttpSettings"]


class HttpSettings(Endpoint):
    """Metrics, health, page and API."""

    address: HttpAddress = written("127.0.0.1:9025")
    """host:port or [IPv6]:port. Port 0: any free one."""
    token_file: FileName | None = None
    """File with the token that page and API ask for. Off loopback they answer only with one."""
    token: SecretStr | None = None
    """The token itself. Better: token_file."""
    hosts: tuple[OwnName, ...] = ()
    """More names by which a browser may reach page and API, such as that of a proxy in front."""

    @field_validator("token")
    @classmethod
    def _long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("a token has letters, digits and ASCII signs, and no space")
            check_length(text)
        return value
