"""Certificates for the tests' TLS servers, from an authority made for the run."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

__all__ = ["Certificates"]


class Certificates:
    """An authority and the server contexts that it vouches for."""

    def __init__(self) -> None:
        self._authority = trustme.CA()

    def server(self, *names: str, expired: bool = False) -> ssl.SSLContext:
        """Return a server's context with a certificate for `names` (default: localhost and 127.0.0.1)."""
        yesterday = datetime.now(UTC) - timedelta(days=1)
        issued = self._authority.issue_cert(
            *(names or ("localhost", "127.0.0.1")), not_after=yesterday if expired else None
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(context)
        return context

    def write_server(self, directory: Path, *names: str, days: float = 30) -> tuple[Path, Path]:
        """Write a server's chain and key (PEM) to `directory`, as `[tls]` wants them; return both paths.

        Files that are there are replaced, as a renewal does.
        """
        issued = self._authority.issue_cert(
            *(names or ("localhost", "127.0.0.1")), not_after=datetime.now(UTC) + timedelta(days=days)
        )
        cert, key = directory / "cert.pem", directory / "key.pem"
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        for path, octets in ((cert, chain), (key, issued.private_key_pem.bytes())):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(octets)
            fresh.chmod(0o600)
            fresh.replace(path)
        return cert, key

    def client(self) -> ssl.SSLContext:
        """Return a client's context that trusts this authority alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._authority.configure_trust(context)
        return context

    def write_authority(self, path: Path) -> Path:
        """Write the authority's certificate (PEM) to `path`, for SSL_CERT_FILE or a `ca_file`."""
        self._authority.cert_pem.write_to_path(str(path))
        return path
