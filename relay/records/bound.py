"""How long the lines of a message can become in the spool, told before the upstream has given its verdict.

Rules: never too little, whatever the octets; and cheap, since every message asks: its line in the journal is
there already, and says how long its values are as JSON.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MAX_REASON", "MAX_VERDICT", "lines_bound"]

MAX_VERDICT: Final = 4 * 1024
"""Characters of the upstream's verdict that a row holds: as many as the reply parser takes in one line. Of a
whole reply it takes 64 KiB, for which 20 messages in flight would ask for a reserve of 2.5 MiB."""

MAX_REASON: Final = 256
"""Characters of the reason for a doubt that its entry holds."""

_PRINTABLE: Final = bytes(range(0x20, 0x7F))
_LONGEST: Final = 6
"""Octets that the spool makes of one in the journal at most: of DEL `\\u007f`; of a character of two octets
`\\u00e9`, of one of four `\\ud83d\\ude00`. All else stands in both alike, escapes with it."""
_FIXED: Final = 1024 + 6 * MAX_REASON
"""Octets of names, numbers, times, checksum, the relay's own words and the reason of a doubt in a line."""


def lines_bound(line: bytes) -> int:
    """Return the octets, at most, of the row of a message and of its entry in doubt, which may precede it.

    `line` is the message as the journal has it, whole: all the values that come from clients, upstreams or
    the configuration, but for the verdict.
    """
    special = 0 if line.isascii() and line.find(b"\x7f") < 0 else len(line.translate(None, _PRINTABLE))
    # Printable ASCII, tabs and line ends: what is not plain in a reply takes two octets.
    return 2 * (len(line) + (_LONGEST - 1) * special + _FIXED) + 2 * MAX_VERDICT
