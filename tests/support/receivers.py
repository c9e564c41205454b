"""Models of receivers that are lenient about the end of data: whose behaviour each is, and where it stops.

Rules: a model knows nothing of the relay. It reads what follows the CRLF of DATA and stops at the first end
of data *in its own eyes*; what stands behind that it runs as commands. All of them read a message that holds
no stray CR, LF or NUL as RFC 5321 does, so that whatever one sees wrongly was made of stray octets. (One that
trims blanks, or ends at any line that begins with a lone dot, is betrayed by clean messages of every sender
already: not a matter of this relay, which passes clean messages octet for octet.)
"""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["RECEIVERS", "Receiver", "strict"]

Receiver = Callable[[bytes], int | None]
"""Octets behind the CRLF of DATA -> how many the receiver takes as content, its end of data included;
None: it has not seen an end of data yet."""

_DATA = b"\r\n"
"""What ends the DATA command is the line end before the first line."""


def _stops_at(octets: bytes, end_of_data: re.Pattern[bytes]) -> int | None:
    found = end_of_data.search(_DATA + octets)
    return None if found is None else found.end() - len(_DATA)


_STRICT = re.compile(rb"\r\n\.\r\n")
_POSTFIX = re.compile(rb"\n\.\r*\n")
_SENDMAIL = re.compile(rb"\n\.\r?\n")
_LF_BEFORE = re.compile(rb"\n\.\r\n")
_LF_BEHIND = re.compile(rb"\r\n\.\r?\n")
_CR_BEHIND = re.compile(rb"\r\n\.\r\n?")
_CR_BOTH = re.compile(rb"\r\n?\.\r\n?")
_CR_BEFORE = re.compile(rb"\r\n?\.\r\n")
_CLEANED = re.compile(rb"[\r\n]\.(?:\r\n|\r|\n)")
_CR_DROPPED = re.compile(rb"\n\r*\.\r*\n")
_NUL_DROPPED = re.compile(rb"\r\0*\n\0*\.\0*\r\0*\n")
_C_STRING = re.compile(rb"\r\n\.(?:\0(?:(?!\r\n).)*)?\r\n", re.DOTALL)


def strict(octets: bytes) -> int | None:
    """RFC 5321 4.1.1.4 by the letter; no model, but what the models are compared with."""
    return _stops_at(octets, _STRICT)


def postfix(octets: bytes) -> int | None:
    """Postfix before 3.9, CVE-2023-51764: LF ends a line, however many CRs stand before it."""
    return _stops_at(octets, _POSTFIX)


def sendmail(octets: bytes) -> int | None:
    """Sendmail before 8.18 (CVE-2023-51765), Exim before 4.97.1 (CVE-2023-51766): <LF>.<LF>, <LF>.<CRLF>."""
    return _stops_at(octets, _SENDMAIL)


def aiosmtpd(octets: bytes) -> int | None:
    """aiosmtpd before 1.4.5, CVE-2024-27305, qpsmtpd and Haraka as reported in 2023: <LF>.<CRLF>."""
    return _stops_at(octets, _LF_BEFORE)


def slimta(octets: bytes) -> int | None:
    """python-slimta's data reader: <CRLF>.<LF>, a dot on a line of its own that only LF ends."""
    return _stops_at(octets, _LF_BEHIND)


def ends_at_cr(octets: bytes) -> int | None:
    """<CRLF>.<CR>, one of the forms in SEC Consult's list: an LF behind it is thrown away."""
    return _stops_at(octets, _CR_BEHIND)


def carriage_return(octets: bytes) -> int | None:
    """<CR>.<CR>, SEC Consult: CR ends a line, an LF behind it is thrown away."""
    return _stops_at(octets, _CR_BOTH)


def begins_at_cr(octets: bytes) -> int | None:
    """<CR>.<CRLF>, from the same list: a bare CR begins a line, only CRLF ends the one with the dot."""
    return _stops_at(octets, _CR_BEFORE)


def cisco(octets: bytes) -> int | None:
    """Cisco Secure Email Gateway, "Clean", its default: bare CR and LF become CRLF at once."""
    return _stops_at(octets, _CLEANED)


def without_cr(octets: bytes) -> int | None:
    """Servers that drop every CR and read lines by LF: <LF><CR>.<LF> and the like."""
    return _stops_at(octets, _CR_DROPPED)


def without_nul(octets: bytes) -> int | None:
    r"""The "exotic servers" of SEC Consult, <CRLF>\0.<CRLF>: NUL is dropped wherever it stands."""
    return _stops_at(octets, _NUL_DROPPED)


def c_string(octets: bytes) -> int | None:
    r"""Servers that compare lines as C strings, <CRLF>.\0<CRLF>: what stands behind NUL does not count."""
    return _stops_at(octets, _C_STRING)


RECEIVERS: tuple[Receiver, ...] = (
    *(postfix, sendmail, aiosmtpd, slimta, ends_at_cr, carriage_return),
    *(begins_at_cr, cisco, without_cr, without_nul, c_string),
)
