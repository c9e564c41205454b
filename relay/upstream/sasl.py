"""What is said in an AUTH exchange with an upstream, mechanism by mechanism (RFC 4954). No I/O.

Rules: a login is one exchange with one mechanism. An exchange is a generator: it yields the lines to send,
without CRLF, and gets the 334 that answers each; when it ends, only a final reply may come. Secrets
are base64 before they leave it, so no octet of them can end a line.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Generator
from functools import partial
from typing import Protocol

from relay.credentials import Credentials, Password, Token
from relay.reply import Reply

__all__ = ["Exchange", "Login", "RefusedError", "of_client", "tokens", "with_password", "with_token"]

MAX_COMMAND = 510
"""Octets of a command line; a longer initial response goes in a line of its own (RFC 4954 section 4)."""

ACTS_FOR_NOBODY = Reply.own(535, "7.8", "The upstream server takes no identity to act as with this mechanism")

Exchange = Generator[bytes, Reply, None]


class RefusedError(Exception):
    """The upstream has answered the credentials, and not with 235."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Login(Protocol):
    """How to log in."""

    def __call__(self, offered: frozenset[str], *, secured: bool) -> Exchange | None:
        """Begin the exchange with the best of the mechanisms that are offered; None: none of them will do."""


def with_password(user: str, password: str) -> Login:
    """Log in with a password: PLAIN, LOGIN or CRAM-MD5."""
    return partial(_password, Password(user, password))


def with_token(user: str, token: str, host: str, port: int) -> Login:
    """Log in with a bearer token: XOAUTH2, or OAUTHBEARER (RFC 7628) where that alone is offered."""
    return partial(_token, user, token, host, port)


def tokens(user: str, token: str, host: str, port: int) -> tuple[Token, Token]:
    """Return a bearer token as each mechanism carries it, the better one first."""
    name = user.replace("=", "=3D").replace(",", "=2C")  # RFC 5801 section 4
    bearer = f"n,a={name},\1host={host}\1port={port}\1auth=Bearer {token}\1\1"
    return (
        Token("XOAUTH2", user, f"user={user}\1auth=Bearer {token}\1\1".encode()),
        Token("OAUTHBEARER", user, bearer.encode()),
    )


def of_client(credentials: Credentials) -> Login:
    """Log in with what a client gave, as it gave it."""
    if isinstance(credentials, Password):
        return partial(_password, credentials)
    return partial(_clients_token, credentials.mechanism, credentials.response)


def _password(given: Password, offered: frozenset[str], *, secured: bool) -> Exchange | None:
    """Under TLS that is PLAIN, which every password store can check; in clear it is CRAM-MD5."""
    exchanges = {"PLAIN": _plain, "LOGIN": _login, "CRAM-MD5": _cram_md5}
    if given.authorization not in ("", given.user):
        # The other two cannot carry it, and to act as somebody else than asked for would be wrong.
        if "PLAIN" in offered:
            return _plain(given)
        if offered & exchanges.keys():
            raise RefusedError(ACTS_FOR_NOBODY)
        return None
    for mechanism in exchanges if secured else reversed(exchanges):
        if mechanism in offered:
            return exchanges[mechanism](given)
    return None


def _token(
    user: str, token: str, host: str, port: int, offered: frozenset[str], *, secured: bool
) -> Exchange | None:
    del secured
    for given in tokens(user, token, host, port):
        if given.mechanism in offered:
            return _bearer(given.mechanism, given.response)
    return None


def _clients_token(
    mechanism: str, response: bytes, offered: frozenset[str], *, secured: bool
) -> Exchange | None:
    del secured
    return _bearer(mechanism.upper(), response) if mechanism.upper() in offered else None


def _plain(given: Password) -> Exchange:
    """RFC 4616."""
    yield from _initial("PLAIN", given.plain)


def _login(given: Password) -> Exchange:
    yield b"AUTH LOGIN"
    yield base64.b64encode(given.user.encode())
    yield base64.b64encode(given.password.encode())


def _cram_md5(given: Password) -> Exchange:
    """RFC 2195."""
    reply = yield b"AUTH CRAM-MD5"
    try:
        challenge = base64.b64decode(reply.lines[0], validate=True)
    except binascii.Error:
        return
    digest = hmac.new(given.password.encode(), challenge, "md5").hexdigest()
    yield base64.b64encode(f"{given.user} {digest}".encode())


def _bearer(mechanism: str, response: bytes) -> Exchange:
    """A 334 that follows the token tells why it was refused; the final reply comes after our answer to it."""
    yield from _initial(mechanism, response)
    yield b"AQ==" if mechanism == "OAUTHBEARER" else b""  # RFC 7628 3.2.3; XOAUTH2: an empty response


def _initial(mechanism: str, response: bytes) -> Exchange:
    encoded = base64.b64encode(response)
    line = b"AUTH %b %b" % (mechanism.encode(), encoded)
    if len(line) <= MAX_COMMAND:
        yield line
    else:
        yield b"AUTH " + mechanism.encode()
        yield encoded
