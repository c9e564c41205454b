"""An SMTP client for one purpose: to ask a listener what it should refuse. Blocking; never sends content.

Rules: every failure is an OSError, one that the peer's reply explains a RefusedError. A certificate is
taken as it is: the relay is looked at here, not trusted. There is no DATA in this module.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import NamedTuple, Self

from relay.reply import MalformedReplyError, Reply, ReplyParser

__all__ = ["Place", "RefusedError", "Wire"]

CONNECT_TIMEOUT = 5.0
"""Seconds for TCP, and for each TLS handshake."""
REPLY_TIMEOUT = 10.0
"""Seconds for one reply."""


class Place(NamedTuple):
    """Where a listener can be met: an IP address and a port, or the path of a unix socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RefusedError(ConnectionError):
    """The listener does not let us in; `reply` is what it said."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"it says {reply}")
        self.reply = reply


class Wire:
    """One connection to a listener, from the IP address `source` if one is given.

    `preface` goes out before anything is read; `tls` means TLS from the first octet behind it.
    """

    def __init__(self, place: Place, source: str = "", preface: bytes = b"", *, tls: bool = False) -> None:
        self._socket = _connected(place, source)
        self._parser = ReplyParser()
        self._replies: list[Reply] = []
        try:
            if preface:
                self._socket.sendall(preface)
            if tls:
                self.secure()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, without a word: nothing is under way that a QUIT would end."""
        self._socket.close()

    @property
    def protocol(self) -> str:
        """The version of TLS; empty in clear."""
        return (self._socket.version() or "") if isinstance(self._socket, ssl.SSLSocket) else ""

    @property
    def certificate(self) -> bytes:
        """The certificate that the listener has shown, DER; empty in clear."""
        return (self._socket.getpeercert(True) or b"") if isinstance(self._socket, ssl.SSLSocket) else b""

    def say(self, line: str) -> Reply:
        """Send a command line; return the reply."""
        return self.say_together(line)[0]

    def say_together(self, *lines: str) -> list[Reply]:
        """Send command lines in one piece; return their replies."""
        self._socket.sendall("".join(f"{line}\r\n" for line in lines).encode())
        return [self.reply() for _ in lines]

    def reply(self) -> Reply:
        """Return the next reply."""
        until = time.monotonic() + REPLY_TIMEOUT
        while not self._replies:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            octets = self._socket.recv(4096)
            if not octets:
                raise ConnectionResetError("it closes the connection")
            try:
                self._replies += self._parser.feed(octets)
            except MalformedReplyError as error:
                raise ConnectionAbortedError(f"what it says is no reply: {error}") from None
        return self._replies.pop(0)

    def secure(self, *, trust: bytes = b"") -> None:
        """Begin TLS. With `trust` that certificate (DER) alone is trusted, and its dates have to hold."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        if trust:
            context.load_verify_locations(cadata=trust)
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        else:
            context.verify_mode = ssl.CERT_NONE
        self._socket.settimeout(CONNECT_TIMEOUT)
        self._socket.getpeername()  # raises where it was reset: `wrap_socket` would leave that open
        self._socket = context.wrap_socket(self._socket)

    def described(self) -> dict[str, object]:
        """Return what is written in the certificate (as `ssl` has it); only after `secure` with `trust`."""
        described = self._socket.getpeercert() if isinstance(self._socket, ssl.SSLSocket) else None
        return dict(described or {})


def _connected(place: Place, source: str) -> socket.socket:
    if not place.path:
        return socket.create_connection(
            (place.host, place.port), CONNECT_TIMEOUT, (source, 0) if source else None
        )
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(CONNECT_TIMEOUT)
        connection.connect(place.path)
    except OSError:
        connection.close()
        raise
    return connection
