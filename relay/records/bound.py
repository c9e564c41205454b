"""How long the lines of a message can become in the spool, told before the upstream has given its verdict.

Rules: never too little, whatever the octets; and cheap, since every message asks: one look at all its text
together instead of an encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MAX_REASON", "MAX_VERDICT", "lines_bound"]

MAX_VERDICT = 4 * 1024
"""Characters of the upstream's verdict that a row holds: as many as the reply parser takes in one line. Of a
whole reply it takes 64 KiB, for which 20 messages in flight would ask for a reserve of 2.5 MiB."""

MAX_REASON = 256
"""Characters of the reason for a doubt that its entry holds."""

_PLAIN = bytes(octet for octet in range(0x20, 0x7F) if octet not in b'"\\')
_LONGEST = 6
"""Octets that JSON makes of one at most: `\\u0001`; of an octet that is not UTF-8 text `\\\\xff`, of a
character of two octets `\\u00e9`, of one of four `\\ud83d\\ude00`."""
_FIXED = 1024 + _LONGEST * MAX_REASON
"""Octets of names, numbers, times, checksum, the relay's own words and the reason of a doubt in a line."""
_AROUND = 16
"""Octets around one value: quotation marks, a separator, its share of the names in a list of refusals."""


def lines_bound(octets: Sequence[bytes], texts: Sequence[str]) -> int:
    """Return the octets, at most, of the row of a message and of its entry in doubt, which may precede it.

    `octets` and `texts` are all the values that come from clients, upstreams or the configuration, but for
    the verdict.
    """
    # Without the surrogates' own rule a lone one, which JSON carries, would raise.
    joined = b"".join(octets) + "".join(texts).encode("utf-8", "surrogatepass")
    special = len(joined.translate(None, _PLAIN))
    values = len(joined) + (_LONGEST - 1) * special + _AROUND * (len(octets) + len(texts))
    # Printable ASCII, tabs and line ends: what is not plain in a reply takes two octets.
    return 2 * (values + _FIXED) + 2 * MAX_VERDICT
