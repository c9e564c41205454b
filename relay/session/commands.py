"""Command lines as values: verb, path and parameters, parsed on octets. No I/O.

Rules: the parser checks what safety needs and no more: where a path begins and ends, that no control octet is
anywhere, that octets above 0x7F are UTF-8 and announced (SMTPUTF8, RFC 6531), and that parameters have the
form `keyword["=" value]`, none twice (RFC 5321 4.1.2). Whether an address is a good one is for the
upstream to say. Nothing is decoded, folded or rewritten: what passes is forwarded octet for octet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from relay.reply import Reply
from relay.session.lines import MAX_AUTH_LINE

if TYPE_CHECKING:
    from relay.upstream.capabilities import Capabilities

__all__ = [
    "LINE_LIMITS",
    "Chunk",
    "CommandError",
    "Mail",
    "is_text",
    "mail_for",
    "parse_bdat",
    "parse_mail",
    "parse_rcpt",
]

DEFAULT_LINE_LIMIT: Final = 512
"""Octets of a command line, CRLF included (RFC 5321 4.5.3.1.4)."""
LINE_LIMITS: Final = {
    # What the offered extensions add: SIZE 26 (RFC 1870), BODY 17 (RFC 6152), SMTPUTF8 10 (RFC 6531),
    # AUTH 500 (RFC 4954), RET and ENVID 115, NOTIFY 28 and ORCPT 507 (RFC 3461).
    b"MAIL": DEFAULT_LINE_LIMIT + 26 + 17 + 10 + 500 + 115,
    b"RCPT": DEFAULT_LINE_LIMIT + 28 + 507,
    b"AUTH": MAX_AUTH_LINE,
}

# Mailbox = quoted strings and other visible octets; a "<", ">" or blank only inside quotes (RFC 5321 4.1.2).
# Runs of one set, possessive: a third of the time that an alternative for each octet takes. No group is
# possessive, here or elsewhere: CPython before 3.11.5 matches those wrongly (gh-100061). None needs to be:
# each repeat of a group can be read in one way only, so that a line that fails is gone back through once.
_VISIBLE: Final = rb'[^\x00-\x20\x7f"\\<>]*+'
_QUOTED: Final = rb'"(?:[^\x00-\x1f\x7f"\\]++|\\[\x20-\x7e])*"'
_ARGUMENT: Final = re.compile(
    rb"(FROM|TO): *+<(%b(?:%b%b)*)>((?: ++[^ ]++)*) *+" % (_VISIBLE, _QUOTED, _VISIBLE), re.IGNORECASE
)
# What nearly every MAIL and RCPT is: ASCII without quotes, and at most a size (smtplib writes it small).
_PLAIN: Final = rb'[^\x00-\x20\x7f-\xff"\\<>]'
_USUAL_MAIL: Final = re.compile(rb"FROM:<(%b*+)>(?: (?:SIZE|size)=([0-9]{1,20}))?" % _PLAIN)
_USUAL_RCPT: Final = re.compile(rb"TO:<(%b++)>" % _PLAIN)
_PARAMETER: Final = re.compile(rb"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20\x7f]+))?")
# What the relay offers on its own account too: an upstream that does not would refuse the parameter.
_OWN: Final = {
    keyword: re.compile(rb" +%b=[^ ]+(?= |$)" % keyword.encode(), re.IGNORECASE)
    for keyword in ("SIZE", "AUTH")
}
_CHUNK: Final = re.compile(rb"([0-9]{1,20})( LAST)?", re.IGNORECASE)  # RFC 3030 2
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
# C1 controls, line and paragraph separators: valid UTF-8 that terminals and logs would obey.
_CONTROL_UTF8: Final = re.compile("[\x80-\x9f\u2028\u2029]")

_BAD_UTF8: Final = Reply.own(501, "5.2", "The address is not valid UTF-8 text")
_NEEDS_SMTPUTF8: Final = Reply.own(553, "6.7", "An address beyond ASCII needs SMTPUTF8 on MAIL (RFC 6531)")


class CommandError(Exception):
    """The command line is not acceptable; `reply` says why."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Mail(NamedTuple):
    """MAIL: the reverse-path as given (empty for the null one), and what the relay needs to know of it."""

    reverse_path: bytes
    size: int | None
    smtputf8: bool
    binary: bool = False
    """Whether it says BODY=BINARYMIME: content comes by BDAT only (RFC 3030 3)."""
    own: tuple[str, ...] = ()
    """The parameters that it has of those which the relay offers on its own account: SIZE (RFC 1870), AUTH
    (RFC 4954)."""
    at: int = 0
    """Where the parameters begin, if there are such."""


class Chunk(NamedTuple):
    """BDAT: the octets that follow the line, and whether they are the message's last."""

    size: int
    last: bool


def parse_mail(argument: bytes) -> Mail:
    """Parse what follows "MAIL "; raises CommandError."""
    usual = _USUAL_MAIL.fullmatch(argument)
    if usual is not None:
        if usual[2] is None:
            return Mail(usual[1], None, smtputf8=False)
        return Mail(usual[1], int(usual[2]), smtputf8=False, own=("SIZE",), at=usual.end(1) + 1)
    path, parameters, at = _parse(argument, b"FROM", "MAIL FROM:<address>")
    smtputf8 = b"SMTPUTF8" in parameters
    _check_text(path, smtputf8=smtputf8)
    size = parameters.get(b"SIZE")
    if b"SIZE" in parameters and not (size and size.isdigit() and len(size) <= 20):
        raise CommandError(Reply.own(501, "5.4", "SIZE takes a number of octets (RFC 1870)"))
    binary = (parameters.get(b"BODY") or b"").upper() == b"BINARYMIME"
    own = tuple([keyword for keyword in _OWN if parameters.get(keyword.encode())])
    return Mail(path, int(size) if size else None, smtputf8, binary, own, at if own else 0)


def mail_for(argument: bytes, mail: Mail, capabilities: Capabilities) -> bytes:
    """Return the line for an upstream: without what of its parameters only the relay has offered."""
    for keyword in mail.own:
        if keyword not in capabilities:
            argument = argument[: mail.at] + _OWN[keyword].sub(b"", argument[mail.at :])
    return b"MAIL " + argument + b"\r\n"


def parse_rcpt(argument: bytes, *, smtputf8: bool) -> bytes:
    """Parse what follows "RCPT "; return the forward-path as given, or raise CommandError."""
    usual = _USUAL_RCPT.fullmatch(argument)
    if usual is not None:  # a recipient costs a twentieth less
        return usual[1]
    path, _, _ = _parse(argument, b"TO", "RCPT TO:<address>")
    if not path:
        raise CommandError(Reply.own(501, "1.3", "A recipient's address is missing"))
    _check_text(path, smtputf8=smtputf8)
    return path


def parse_bdat(argument: bytes) -> Chunk | None:
    """Parse what follows "BDAT "; None: nobody can tell where the chunk ends."""
    match = _CHUNK.fullmatch(argument)
    return None if match is None else Chunk(int(match[1]), match[2] is not None)


def is_text(octets: bytes) -> bool:
    """Whether octets are free of controls: ASCII, or UTF-8 without C1 controls and line separators."""
    if octets.isascii():
        return not _CONTROL.search(octets)
    try:
        decoded = octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(octets) and not _CONTROL_UTF8.search(decoded)


def _parse(argument: bytes, keyword: bytes, usage: str) -> tuple[bytes, dict[bytes, bytes | None], int]:
    """Return the path, the parameters, and where these begin."""
    match = _ARGUMENT.fullmatch(argument)
    if match is None or match[1].upper() != keyword:
        raise CommandError(Reply.own(501, "5.4", f"Syntax: {usage} [parameters]"))
    if not match[3]:
        return match[2], {}, match.end(3)
    return match[2], _parameters(match[3]), match.start(3)


def _parameters(octets: bytes) -> dict[bytes, bytes | None]:
    parameters: dict[bytes, bytes | None] = {}
    for item in octets.split():
        match = _PARAMETER.fullmatch(item)
        if match is None or not is_text(item):
            raise CommandError(
                Reply.own(501, "5.4", "A parameter is not of the form KEYWORD or KEYWORD=value")
            )
        keyword = match[1].upper()
        if keyword in parameters:
            raise CommandError(Reply.own(501, "5.4", "A parameter is given twice"))
        parameters[keyword] = match[2]
    return parameters


def _check_text(path: bytes, *, smtputf8: bool) -> None:
    if path.isascii():
        return
    if not is_text(path):
        raise CommandError(_BAD_UTF8)
    if not smtputf8:
        raise CommandError(_NEEDS_SMTPUTF8)
