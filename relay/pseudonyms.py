"""Pseudonyms of recipients, for records and logs that are to say how much went where, and not to whom.

Rules. A pseudonym is `hmac-` and 128 bits of the HMAC-SHA-256 of the address in lower case (truncated as
RFC 2104, 5 allows) in place of the local part; the domain stays. With the key an address gives its pseudonym
again, so that it can be searched, counted and forgotten; nothing gives the address back. In text, such as a
server's reply, an address is replaced wherever it stands, its local part alone too, and the form in which it
stands in return paths (`local=domain`). Of a reverse-path only a recipient's whole address is replaced, that
form, or a local part behind a "+": senders are searched and counted by what they are.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["PREFIX", "Pseudonyms"]

PREFIX: Final = "hmac-"
_DIGITS: Final = 32
_CODE: Final = re.compile(r"\A[2-5][0-9]{2}[ -](?:[245]\.[0-9]{1,3}\.[0-9]{1,3} )?")


class Pseudonyms:
    """Gives pseudonyms by one key."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def address(self, address: str) -> str:
        """Return the pseudonym of an address; what is one already stays."""
        local, at, domain = address.rpartition("@")
        if not at:
            local, domain = address, ""
        if re.fullmatch(rf"{PREFIX}[0-9a-f]{{{_DIGITS}}}", local):
            return address
        digest = hmac.new(self._key, address.lower().encode("utf-8", "surrogatepass"), hashlib.sha256)
        return f"{PREFIX}{digest.hexdigest()[:_DIGITS]}{at}{domain}"

    def aliases(self, address: str) -> tuple[str, ...]:
        """Return what a whole address is kept as too; of a domain or a pattern nothing."""
        return () if not address or "*" in address or address.startswith("@") else (self.address(address),)

    def text(self, text: str, addresses: Iterable[str]) -> str:
        """Return the text with the pseudonyms of these addresses in their place."""
        names: dict[str, str] = {}
        for address in addresses:
            known = self.address(address)
            local, at, domain = address.rpartition("@")
            hidden = known.rpartition("@")[0] or known
            names[address.lower()] = known
            if at and local:
                names[f"{local}={domain}".lower()] = f"{hidden}={domain}"
                names[local.lower()] = hidden
        names.pop("", None)
        if not names or not any(name in text.lower() for name in names):
            return text
        forms = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        pattern = re.compile(rf"(?<!\w)(?:{forms})(?!\w)|(?:{_whole(names)})", re.IGNORECASE)
        return "\n".join(_replaced(line, pattern, names) for line in text.split("\n"))

    def path(self, path: str, addresses: Iterable[str]) -> str:
        """Return a reverse-path with the pseudonyms of these addresses in their place, if it holds any."""
        for address in addresses:
            local, at, domain = address.rpartition("@")
            forms = (address, f"{local}={domain}", f"+{local}@")
            if not at or not local or not any(form.lower() in path.lower() for form in forms):
                continue
            known = self.address(address)
            hidden = known.rpartition("@")[0]
            # Not the end of a longer local part, nor the beginning of a longer domain: that is somebody else.
            whole = rf"(?<![^=:]){re.escape(address)}(?![\w.-])"
            returned = rf"(?<![^\W_]){re.escape(f'{local}={domain}')}(?![\w-]|\.\w)"
            tag = rf"(?<=\+){re.escape(local)}(?=@)"
            for pattern, told in ((whole, known), (returned, f"{hidden}={domain}"), (tag, hidden)):
                path = told.join(re.split(pattern, path, flags=re.IGNORECASE))
        return path


def _whole(names: Iterable[str]) -> str:
    """What is replaced wherever it stands: whole addresses, also in the middle of a return path."""
    whole = sorted((name for name in names if "@" in name or "=" in name), key=len, reverse=True)
    return "|".join(map(re.escape, whole)) or r"(?!)"


def _replaced(line: str, pattern: re.Pattern[str], names: dict[str, str]) -> str:
    code = _CODE.match(line)
    begin = code.end() if code else 0
    return line[:begin] + pattern.sub(lambda found: names.get(found[0].lower(), PREFIX), line[begin:])
