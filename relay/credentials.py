"""What somebody logs in with, as values: they never show what they hold, and compare by all of it.

Who is told something may say it again, as a server that repeats a command which it does not take. `without`
is for what is logged of that.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["PASSWORD_MECHANISMS", "TOKEN_MECHANISMS", "Credentials", "Password", "Token", "without"]

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

    @property
    def plain(self) -> bytes:
        """The initial response of PLAIN (RFC 4616), before base64."""
        return f"{self.authorization}\0{self.user}\0{self.password}".encode()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What of it must not be shown, in every form in which it is told."""
        return (_base64(self.plain), _base64(self.password.encode()), self.password)

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

    @property
    def secrets(self) -> tuple[str, ...]:
        """What of it must not be shown, in every form in which it is told."""
        token = self.response.partition(b"auth=Bearer ")[2].partition(b"\1")[0]
        return (_base64(self.response), token.decode("utf-8", "replace"))

    def __repr__(self) -> str:
        return f"<Token for {self.mechanism}>"


Credentials = Password | Token


def without(secrets: Iterable[str], text: str) -> str:
    """Return `text` with stars in the place of secrets."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


def _fingerprint(key: bytes, *parts: str) -> bytes:
    message = b"".join(b"%d:%b" % (len(octets), octets) for octets in (part.encode() for part in parts))
    return hmac.digest(key, message, "sha256")
