"""Where to listen and where to connect: `host:port`, `[IPv6]:port` and `unix:/path` as a value.

Rules: a port is always written, an IPv6 address always stands in brackets, so that nothing is guessed.
No I/O: names are not resolved here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

__all__ = ["ADDRESS_PATTERN", "LISTEN_PATTERN", "Address", "host_name"]

ADDRESS_PATTERN = r"^(\[[0-9A-Fa-f:.%A-Za-z]+\]|[^:\[\]\s/@]+):[0-9]{1,5}$"
"""Regular expression of an address, in the dialect of JSON Schema."""
LISTEN_PATTERN = rf"{ADDRESS_PATTERN}|^unix:/.+$"
"""The same where a unix socket may stand too."""

# Letters, digits, hyphen (RFC 1123 2.1), and the underscore that container networks put into names.
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_LOCALHOST = ("127.0.0.1", "::1")
_LONGEST_PATH = 107
"""Octets of a unix socket's path that Linux takes (unix(7)); others take a few less."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or IP address, without brackets) and a TCP port, or the file of a unix socket."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str, *, unix: bool = False) -> Address:
        """Return the address that `text` writes, with `unix` also that of a unix socket.

        Raises ValueError with the reason if it writes none.
        """
        if unix and text.startswith("unix:"):
            return cls("", 0, _socket_path(text.removeprefix("unix:")))
        host, port = _split(text)
        if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError("the port must be a number up to 65535")
        if not host:
            raise ValueError("names no host: write host:port (0.0.0.0 or [::] for every address here)")
        if not text.startswith("["):
            return cls(host_name(host), int(port))
        try:
            return cls(str(IPv6Address(host)), int(port))
        except ValueError:
            raise ValueError("no IPv6 address stands in the brackets") from None

    @property
    def loopback(self) -> bool:
        """Whether this host is the machine itself by its address or by the name localhost (RFC 6761 6.3)."""
        if self.path:
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            name = self.host.rstrip(".").lower()
            return name == "localhost" or name.endswith(".localhost")

    def collides(self, other: Address) -> bool:
        """Whether both cannot be bound at the same time, as far as can be told without resolving names."""
        if self.path or other.path:
            return self.path == other.path
        if self.port != other.port or self.port == 0:
            return False
        return any(_same(mine, theirs) for mine in self._bound() for theirs in other._bound())

    def _bound(self) -> tuple[str, ...]:
        name = self.host.lower()
        return _LOCALHOST if name == "localhost" else (name,)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def host_name(text: str) -> str:
    """Return `text` if it has the form of a host name or an IPv4 address; raise ValueError otherwise."""
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("is no host name: letters, digits, hyphens and dots")
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):  # a name never ends in a number; "127.1" is a trap
        try:
            ip_address(text)
        except ValueError:
            raise ValueError("is no IPv4 address") from None
    return text


def _socket_path(path: str) -> str:
    if not path.startswith("/") or not path.isprintable():
        raise ValueError("a unix socket is written with its whole path: unix:/run/relay/relay.sock")
    if len(path.encode()) > _LONGEST_PATH:
        raise ValueError(f"the path of a unix socket may have {_LONGEST_PATH} octets at most")
    return path


def _split(text: str) -> tuple[str, str]:
    """Return host and port as they are written, the host without its brackets."""
    if "://" in text:
        raise ValueError("is a URL: write host:port")
    if text.startswith("unix:"):
        raise ValueError("a unix socket cannot stand here: write host:port")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise ValueError("has no closing bracket: write [IPv6 address]:port")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = text.rpartition(":")
        if ":" in host:
            raise ValueError("an IPv6 address stands in brackets: [::1]:2525")
    if colon != ":" or not port:
        raise ValueError("has no port: write host:port")
    return host, port


def _same(one: str, other: str) -> bool:
    # asyncio binds IPv6 sockets for IPv6 only, so :: and 0.0.0.0 live side by side.
    if one == other:
        return True
    for wildcard, specific in ((one, other), (other, one)):
        try:
            version = ip_address(specific).version
        except ValueError:
            continue
        if (wildcard, version) in {("0.0.0.0", 4), ("::", 6)}:  # noqa: S104  compared, not bound
            return True
    return False
