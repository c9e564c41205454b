"""The keys of `[upstreams.token]`: where the bearer token for an upstream comes from. No I/O.

Rules: it has one source, a file, a command or a token endpoint; keys of the endpoint are refused without one.
Secrets go to an endpoint by https alone, unless it is this machine.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr, ValidationInfo, field_validator

from relay.settings.address import Address
from relay.settings.kinds import FileName, check_line
from relay.settings.section import Section

__all__ = ["TokenSettings"]


class TokenSettings(Section):
    """Where the bearer token for an upstream comes from: a file, a command or an OAuth 2.0 token endpoint."""

    file: FileName | None = None
    """File that holds the token; it is read anew for every login."""
    command: tuple[str, ...] = ()
    """Program and arguments that print the token; run for every login, without a shell."""
    url: str | None = None
    """Token endpoint (RFC 6749), https; http only on loopback."""
    client_id: str | None = None
    """The relay's identifier at the token endpoint."""
    client_secret_file: FileName | None = None
    """File that holds the client's secret; its last line end does not count."""
    client_secret: SecretStr | None = None
    """The client's secret. Better: client_secret_file."""
    refresh_token_file: FileName | None = None
    """File that holds the refresh token. Without one the grant is client_credentials."""
    refresh_token: SecretStr | None = None
    """The refresh token. Better: refresh_token_file."""
    scope: str | None = None
    """Scope to ask the token endpoint for, several with spaces between."""

    @field_validator("command")
    @classmethod
    def _command(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and (not value[0] or any("\0" in part for part in value)):
            raise ValueError("must be a program and its arguments, without NUL")
        return value

    @field_validator("url")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        named = [name for name in ("file", "command") if info.data.get(name)]
        if value is None:
            if len(named) == 2:
                raise ValueError("file and command are given together: keep one of file, command and url")
            if not named and {"file", "command"} <= info.data.keys():
                raise ValueError("missing: one of file, command and url must say where the token comes from")
            return value
        if named:
            raise ValueError(f"given together with {named[0]}: keep one of file, command and url")
        return _endpoint_url(value)

    @field_validator("client_id", "client_secret", "refresh_token", "scope")
    @classmethod
    def _of_the_endpoint(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("url", "") is None:
            raise ValueError("is of no use without url")
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is not None:
            check_line(text)
        return value

    @field_validator("client_id")
    @classmethod
    def _client(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("url"):
            raise ValueError("missing: the token endpoint wants to know who asks")
        return value

    @field_validator("refresh_token")
    @classmethod
    def _grant(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        data = info.data
        files = data.get("client_secret_file") or data.get("refresh_token_file")
        if value is None and data.get("url") and not files and data.get("client_secret", "") is None:
            raise ValueError("missing: url needs a refresh token, or a client secret (client_credentials)")
        return value


def _endpoint_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        host = Address(parts.hostname or "", parts.port or 0)
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in ("https", "http") or not host.host:
        raise ValueError("must be an https URL")
    if parts.username is not None or parts.fragment:
        raise ValueError("must have no user and no fragment")
    if parts.scheme == "http" and not host.loopback:
        raise ValueError("secrets would go in clear: https is needed, but on loopback")
    return text
