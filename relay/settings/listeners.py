"""The keys of `[[listeners]]`, where clients connect, and of `[tls]`, the certificate they are shown. No I/O.

Rules: a certificate and its key come together or not at all. Whether listeners are in each other's way, and
whether one needs the certificate, is asked of all of them together, in `model.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, field_validator

from relay.settings.kinds import FileName, Flag, ListenAddress
from relay.settings.section import Endpoint, Section

__all__ = ["ListenerSettings", "TlsSettings"]


class ListenerSettings(Endpoint):
    """One address where clients connect."""

    address: ListenAddress
    """host:port, [IPv6]:port, or unix:/path of a socket file. Port 0: any free one."""
    tls: Literal["none", "starttls", "required", "implicit"] = "none"
    """starttls: offered. required: no mail without it. implicit: TLS from the first octet."""
    proxy_protocol: Flag = False
    """Whether connections begin with a PROXY header (versions 1 and 2), from clients.trusted_proxies."""


class TlsSettings(Section):
    """The certificate that listeners show. Its files are read again when they change, and at SIGHUP."""

    cert: FileName | None = None
    """File with the certificate and its chain, PEM."""
    key: FileName | None = None
    """File with the private key, PEM, without a passphrase."""

    @field_validator("key")
    @classmethod
    def _pair(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        cert = info.data.get("cert")
        if cert and not value:
            raise ValueError("missing: tls.cert needs its key")
        if value and not cert:
            raise ValueError("is of no use without tls.cert")
        return value
