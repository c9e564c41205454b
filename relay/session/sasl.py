"""The server's side of a SASL exchange (RFC 4954 section 4): lines in, challenges or credentials out. No I/O.

Rules: base64 is taken strictly (RFC 4648 section 3), lines are bounded, and what a mechanism does not allow
ends the exchange: whatever octets come, the end is credentials or SaslError. Here is only said what somebody
claims; whether it is true is for an authenticator to say. No error text repeats anything of what came.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Generator

from relay.credentials import Credentials, Password, Token
from relay.reply import Reply
from relay.session import answers
from relay.session.commands import is_text
from relay.session.lines import MAX_AUTH_LINE

__all__ = ["Exchange", "SaslError"]

_ABORTED = Reply.own(501, "7.0", "The login was given up")
_NOT_BASE64 = Reply.own(501, "5.2", "That is not base64 (RFC 4648)")

# RFC 7628 3.1: the GS2 header (no channel binding; the identity, if any), then pairs, each behind ^A.
_GS2 = re.compile(rb"[ny],(?:a=([^,\x01]+))?,")
_BEARER = re.compile(rb"Bearer +[\x21-\x7e]+", re.IGNORECASE)
_PAIR = re.compile(rb"([A-Za-z]+)=([\t\x20-\x7e\x80-\xff]*)")
_SASL_NAME = re.compile(r"=(2C|3D)|=")  # RFC 5801 section 4: "," and "=" are written =2C and =3D


class SaslError(Exception):
    """The exchange came to no end that can be tried; `reply` says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Exchange:
    """One exchange, from the AUTH command on."""

    __slots__ = ("_begun", "_steps")

    def __init__(self, mechanism: str) -> None:
        """Begin; `mechanism` is one of those in `credentials`, PASSWORD_MECHANISMS and TOKEN_MECHANISMS."""
        self._steps = _MECHANISMS[mechanism]()
        self._begun = False

    def step(self, line: bytes | None) -> bytes | Credentials:
        """Take the client's turn; return the next challenge, before base64, or what it logs in with.

        The first time `line` is what stood behind the mechanism, None if nothing did; later it is the line
        that answered the challenge, without its CRLF. Raises SaslError, after which the exchange is over.
        """
        initial, self._begun = not self._begun, True
        if initial:
            next(self._steps)
        try:
            return self._steps.send(None if line is None else _decoded(line, initial=initial))
        except StopIteration as end:
            credentials: Credentials = end.value
            return credentials


_Steps = Generator[bytes, bytes | None, Credentials]
"""Yields challenges, is sent responses (first the initial one, None if there is none)."""


def _decoded(line: bytes, *, initial: bool) -> bytes:
    if len(line) + 2 > MAX_AUTH_LINE:
        raise SaslError(answers.AUTH_LINE_TOO_LONG)
    if initial and line == b"=":  # an initial response that is there and empty
        return b""
    if not initial and line == b"*":
        raise SaslError(_ABORTED)
    try:
        if not len(line) % 4:  # the library's strict mode lets padding pass behind whole groups
            return binascii.a2b_base64(line, strict_mode=True)
    except ValueError:
        pass
    raise SaslError(_NOT_BASE64)


def _first(response: bytes | None) -> Generator[bytes, bytes | None, bytes]:
    """Return the initial response, asked for with an empty challenge where none came (RFC 4954 section 4)."""
    return response if response is not None else (yield from _ask(b""))


def _ask(challenge: bytes) -> Generator[bytes, bytes | None, bytes]:
    return (yield challenge) or b""


def _plain() -> _Steps:
    """RFC 4616: [authzid] NUL authcid NUL passwd."""
    response = yield from _first((yield b""))
    parts = response.split(b"\0")
    if len(parts) != 3:
        raise _malformed("PLAIN takes three parts with a NUL between them (RFC 4616)")
    authorization, user, password = parts
    return Password(_name(user), _secret(password), _identity(authorization))


def _login() -> _Steps:
    """draft-murchison-sasl-login: user name and password, each asked for."""
    response = yield b""
    user = _name(response if response is not None else (yield from _ask(b"Username:")))
    return Password(user, _secret((yield from _ask(b"Password:"))))


def _xoauth2() -> _Steps:
    """user=NAME ^A auth=Bearer TOKEN ^A ^A."""
    response = yield from _first((yield b""))
    pairs = _pairs(response, "XOAUTH2")
    return Token("XOAUTH2", _name(pairs.get(b"user", b"")), response)


def _oauthbearer() -> _Steps:
    """RFC 7628 section 3.1: GS2 header ^A key=value ^A ... ^A."""
    response = yield from _first((yield b""))
    header, _, rest = response.partition(b"\x01")
    match = _GS2.fullmatch(header)
    if match is None:
        raise _malformed("OAUTHBEARER begins with n,a=user, (RFC 7628 3.1)")
    _pairs(rest, "OAUTHBEARER")
    return Token("OAUTHBEARER", _sasl_name(_identity(match[1] or b"")), response)


_MECHANISMS: dict[str, Callable[[], _Steps]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "XOAUTH2": _xoauth2,
    "OAUTHBEARER": _oauthbearer,
}


def _pairs(octets: bytes, mechanism: str) -> dict[bytes, bytes]:
    """Return the pairs of a token's response, of which `auth` must be a bearer token (RFC 6750)."""
    if not octets.endswith(b"\x01\x01"):
        raise _malformed(f"{mechanism} ends with two octets 0x01")
    pairs: dict[bytes, bytes] = {}
    for pair in octets[:-2].split(b"\x01"):
        match = _PAIR.fullmatch(pair)
        if match is None or match[1].lower() in pairs:
            raise _malformed(f"{mechanism} takes pairs key=value, each key once, with 0x01 between them")
        pairs[match[1].lower()] = match[2]
    if not _BEARER.fullmatch(pairs.get(b"auth", b"")):
        raise _malformed(f"{mechanism} takes auth=Bearer and a token")
    return pairs


def _name(octets: bytes) -> str:
    """Return a user name, which must not be empty."""
    if not octets:
        raise _malformed("the user name is empty")
    return _identity(octets)


def _identity(octets: bytes) -> str:
    """Return an identity: it goes to log and record, so it is text without controls."""
    if not is_text(octets):
        raise _malformed("a user name is UTF-8 text without control characters")
    return octets.decode()


def _secret(octets: bytes) -> str:
    """Return a password: any UTF-8 but NUL (RFC 4616 section 2); it is never shown."""
    try:
        secret = octets.decode()
    except UnicodeDecodeError:
        raise _malformed("the password is not UTF-8 (RFC 4616 2)") from None
    if "\0" in secret:
        raise _malformed("the password holds a NUL (RFC 4616 2)")
    return secret


def _sasl_name(text: str) -> str:
    """Undo the escapes of a GS2 identity."""

    def plain(match: re.Match[str]) -> str:
        if match[1] is None:
            raise _malformed("in a GS2 identity = is written =3D (RFC 5801 4)")
        return "," if match[1] == "2C" else "="

    return _SASL_NAME.sub(plain, text)


def _malformed(reason: str) -> SaslError:
    return SaslError(Reply.own(501, "5.2", f"The login is malformed: {reason}"))
