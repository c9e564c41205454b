"""TLS for clients: the certificate that listeners show, and the handshake of one connection.

Rules: every handshake takes the certificate that is newest at that moment; sessions that are under way keep
theirs, so a renewal drops nobody. A new pair of files that cannot be used changes nothing, and is reported
once. TLS 1.2 is the oldest version; ciphers are those of Python's defaults. During the handshake nothing that
came in clear can reach the session (RFC 3207 4.2): the transport belongs to TLS from the first octet.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["HANDSHAKE_TIMEOUT", "Certificate", "CertificateError", "shake_hands"]

HANDSHAKE_TIMEOUT = 30.0
"""Seconds that a client gets for its handshake."""

_Stamp = tuple[tuple[int, int, int, int], ...]


class CertificateError(Exception):
    """The certificate or its key cannot be used; the text is one line that names the files.

    `unread`: what they hold is not known.
    """

    def __init__(self, text: str, *, unread: bool = False) -> None:
        super().__init__(text)
        self.unread = unread


class Certificate:
    """A certificate and its key, in two files that may be replaced while the relay runs."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read both; raises CertificateError."""
        self._files = cert, key
        self._seen = self._stamp()
        self._refused: tuple[_Stamp, str] | None = None
        self.context: ssl.SSLContext
        """For the next handshake."""
        self.not_after: float
        """When the first certificate of the chain expires, in seconds since 1970."""
        self._read()

    def refresh(self) -> bool:
        """Read the files again if they have changed; return whether they were read.

        Raises CertificateError when they cannot be used; what was in use stays in use. A bad pair is tried
        once, files that cannot be read again and again; either is reported once.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            self._read()
        except CertificateError as error:
            if not error.unread:
                self._seen = stamp
            if (stamp, str(error)) == self._refused:
                return False
            self._refused = stamp, str(error)
            raise
        self._seen, self._refused = stamp, None
        return True

    def _stamp(self) -> _Stamp:
        """What tells of a change, of who may read a file too; one that is missing just now has none yet."""
        try:
            stats = [path.stat() for path in self._files]
        except OSError:
            return getattr(self, "_seen", ())
        return tuple((stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _read(self) -> None:
        cert, key = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        from cryptography import x509  # slow to load, and most listeners on loopback have no certificate

        try:
            context.load_cert_chain(cert, key, password=_no_passphrase)
            chain = x509.load_pem_x509_certificates(cert.read_bytes())
        except OSError as error:  # also what ssl raises
            text = f"{cert} and {key} cannot be used: {error.strerror or error}"
            raise CertificateError(text, unread=not isinstance(error, ssl.SSLError)) from error
        except ValueError as error:
            raise CertificateError(f"{cert} and {key} cannot be used: {error}") from error
        self.context = context
        self.not_after = min(each.not_valid_after_utc for each in chain).timestamp()


async def shake_hands(
    transport: asyncio.Transport,
    protocol: asyncio.Protocol,
    context: ssl.SSLContext,
    received: Callable[[], bytes | None],
) -> asyncio.Transport:
    """Make TLS of a connection that is open in clear, and return its new transport.

    `received` is called once, when nothing more is given to the protocol in clear; it returns the octets of
    the handshake that were, or None where the protocol has heard that the connection is lost. The protocol
    may be given what the client sends inside TLS before this returns. Raises OSError (also ssl.SSLError).
    """
    loop = asyncio.get_running_loop()
    transport.pause_reading()
    handshake = loop.create_task(
        loop.start_tls(
            transport, protocol, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_TIMEOUT
        )
    )
    await asyncio.sleep(0)  # start_tls has now scheduled the beginning of TLS, and this comes behind it
    tls, octets = cast("asyncio.BufferedProtocol", transport.get_protocol()), received()
    if octets is None:  # TLS came too late to hear it, and would wait
        loop.call_soon(tls.connection_lost, ConnectionResetError("the client went away"))
    elif octets:
        loop.call_soon(_feed, tls, octets)
    secured = await handshake
    if secured is None:
        raise ConnectionResetError("the client went away")
    return secured


def _feed(protocol: asyncio.BufferedProtocol, octets: bytes) -> None:
    """Give octets to TLS as if they had just been read."""
    while octets:
        buffer: Any = protocol.get_buffer(len(octets))
        taken = min(len(buffer), len(octets))
        buffer[:taken] = octets[:taken]
        protocol.buffer_updated(taken)
        octets = octets[taken:]


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")
