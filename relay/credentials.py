"""What somebody logs in with, as values: they never show what they hold, and compare by all of it."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

__all__ = ["PASSWORD_MECHANISMS", "TOKEN_MECHANISMS", "Credentials", "Password", "Token"]

PASSWORD_MECHANISMS = ("PLAIN", "LOGIN")
"""SASL mechanisms that carry a `Password`, the better one first."""
TOKEN_MECHANISMS = ("XOAUTH2", "OAUTHBEARER")
"""SASL mechanisms that carry a `Token`."""


@dataclass(frozen=True, slots=True, repr=False)
class Password:
    """A user name and a password, however they came (PLAIN, RFC 4616, or LOGIN)."""

    user: str
    """The authentication identity."""
    password: str
    authorization: str = ""
    """The identity to act as (RFC 4616 section 2); empty: that of `user`."""

    def fingerprint(self, key: bytes) -> bytes:
        """Return a keyed hash of all of it: equal credentials have equal ones, and it tells nothing else."""
        return _fingerprint(key, "password", self.user, self.password, self.authorization)

    def __repr__(self) -> str:
        return "<Password>"


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A bearer token, in the initial response of its mechanism (XOAUTH2, or OAUTHBEARER, RFC 7628)."""

    mechanism: str
    user: str
    """Whom the response names; empty where it names nobody."""
    response: bytes
    """The initial response as the client gave it, before base64."""

    def fingerprint(self, key: bytes) -> bytes:
        """Return a keyed hash of all of it: equal credentials have equal ones, and it tells nothing else."""
        return _fingerprint(key, self.mechanism, self.user, self.response.hex())

    def __repr__(self) -> str:
        return f"<Token for {self.mechanism}>"


Credentials = Password | Token


def _fingerprint(key: bytes, *parts: str) -> bytes:
    message = b"".join(b"%d:%b" % (len(octets), octets) for octets in (part.encode() for part in parts))
    return hmac.digest(key, message, "sha256")
