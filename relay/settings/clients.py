"""The keys of `[clients]`: who may relay, and how clients log in. No I/O.

Rules: networks that make an open relay are refused, and so is a section that lets nobody in. Keys of one way
to log in are refused beside another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from relay.settings.kinds import FileName, Flag, NetworkText
from relay.settings.networks import Network, too_wide
from relay.settings.section import Section

__all__ = ["ClientSettings"]

LOOPBACK = ("127.0.0.0/8", "::1/128")


def _allowed_by_default(data: dict[str, Any]) -> Any:
    """Loopback, as long as nobody can log in; once clients can, they have to."""
    return LOOPBACK if data.get("auth", "none") == "none" else ()


class ClientSettings(Section):
    """Who may relay."""

    auth: Literal["none", "users", "passthrough"] = "none"
    """How clients log in: not at all, as users of users_file, or with what the upstream takes from them."""
    auth_without_tls: Flag = False
    """Whether AUTH is offered without TLS to clients on this machine; to others it never is."""
    users_file: FileName | None = None
    """File of the users for auth = "users"; `relay user` keeps it. Read again when it changes."""
    allow: tuple[NetworkText, ...] = Field(default_factory=_allowed_by_default)
    """Networks and addresses that may relay without AUTH. With auth, the default is nobody."""
    passthrough_to: str | None = None
    """The upstream that decides about logins with auth = "passthrough", and gets the mail of who is in."""
    trusted_proxies: tuple[NetworkText, ...] = ()
    """Networks and addresses whose PROXY header is believed; a unix socket counts as 127.0.0.1."""

    @field_validator("auth_without_tls")
    @classmethod
    def _something_to_offer(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("auth") == "none":
            raise ValueError('is of no use with auth = "none"')
        return value

    @field_validator("users_file")
    @classmethod
    def _users(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        auth = info.data.get("auth")
        if auth == "users" and value is None:
            raise ValueError('missing: auth = "users" needs it (make it with: relay user add NAME)')
        if auth in ("none", "passthrough") and value is not None:
            raise ValueError(f'is of no use with auth = "{auth}"')
        return value

    @field_validator("passthrough_to")
    @classmethod
    def _passthrough_to(cls, value: str | None, info: ValidationInfo) -> str | None:
        auth = info.data.get("auth")
        if value is not None and auth in ("none", "users"):
            raise ValueError(f'is of no use with auth = "{auth}"')
        return value

    @field_validator("allow")
    @classmethod
    def _no_open_relay(cls, value: tuple[Network, ...], info: ValidationInfo) -> tuple[Network, ...]:
        reason = too_wide(value)
        if reason:
            raise ValueError(f"would be an open relay: {reason}")
        if not value and info.data.get("auth") == "none":
            raise ValueError("is empty: nobody could relay")
        return value
