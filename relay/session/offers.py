"""What EHLO offers: what the relay can carry and the upstream can do (RFC 5321 4.1.1.1). No I/O.

Rules: nothing is offered that the chain cannot do. STARTTLS and AUTH are the relay's own affair, the rest is
the upstream's as far as the relay can carry it; where both have a limit, the smaller one counts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from relay.reply import Reply

if TYPE_CHECKING:
    from relay.upstream.capabilities import Capabilities

__all__ = ["Offers"]

MIRRORED = ("8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES", "CHUNKING")
"""Extensions that the relay can carry and offers when the upstream has them."""
MAX_MADE = 100
"""Replies that are kept."""
MAX_LIMIT = 999_999
"""The largest value that a limit can have (RFC 9422 4)."""
_LIMIT = re.compile(r"(RCPTMAX|RCPTDOMAINMAX)=([1-9][0-9]{0,5})")
"""The upstream's limits that are a client's business; how often a connection is used is ours."""


class Offers:
    """The EHLO replies of a relay; each is made once for what the upstream can do."""

    def __init__(self, hostname: str, *, max_message_size: int, max_recipients: int) -> None:
        """`max_message_size` in octets, 0: no limit of ours."""
        self._hostname = hostname
        self._max_message_size = max_message_size
        self._max_recipients = max_recipients
        self._made: dict[tuple[Capabilities, bool, tuple[str, ...]], Reply] = {}

    def reply(self, upstream: Capabilities, *, starttls: bool, mechanisms: tuple[str, ...]) -> Reply:
        """Return the EHLO reply; `mechanisms` are those of AUTH, empty: AUTH is not offered."""
        reply = self._made.get((upstream, starttls, mechanisms))
        if reply is None:
            offered = self._keywords(upstream)
            if starttls:
                offered.append("STARTTLS")
            if mechanisms:
                offered.append(" ".join(("AUTH", *mechanisms)))
            reply = Reply.plain(250, self._hostname, *offered)
            if len(self._made) >= MAX_MADE:  # upstreams change what they offer, now and then
                self._made.clear()
            self._made[upstream, starttls, mechanisms] = reply
        return reply

    def _keywords(self, upstream: Capabilities) -> list[str]:
        sizes = [size for size in (self._max_message_size, upstream.size) if size]
        offered = ["PIPELINING", f"SIZE {min(sizes)}" if sizes else "SIZE"]
        offered += [keyword for keyword in MIRRORED if keyword in upstream]
        if "CHUNKING" in upstream and "BINARYMIME" in upstream:  # RFC 3030 3: the one needs the other
            offered.append("BINARYMIME")
        offered.append(f"LIMITS {' '.join(self._limits(upstream))}")
        return offered

    def _limits(self, upstream: Capabilities) -> list[str]:
        words = upstream.parameters.get("LIMITS", ())
        limits = {found[1]: int(found[2]) for word in words if (found := _LIMIT.fullmatch(word))}
        limits["RCPTMAX"] = min(limits.get("RCPTMAX", MAX_LIMIT), self._max_recipients)
        return [f"{name}={value}" for name, value in sorted(limits.items())]
