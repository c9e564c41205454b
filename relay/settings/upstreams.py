"""The keys of `[[upstreams]]` and `[upstreams.match]`: where messages go, and which of them. No I/O.

Rules: credentials never go in clear, but to this machine. What would fit no message is refused, since it can
only be a mistake; leaving a key out is the way to say "any".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from relay.settings.address import Address
from relay.settings.kinds import (
    Count,
    Duration,
    FileName,
    Flag,
    MatchPattern,
    UpstreamAddress,
    Weight,
    check_line,
    written,
)
from relay.settings.networks import parse_network
from relay.settings.section import Endpoint, Section
from relay.settings.tokens import TokenSettings

__all__ = ["MatchSettings", "UpstreamSettings", "at_odds"]

_Patterns = tuple[MatchPattern, ...]


class MatchSettings(Section):
    """Which messages an upstream is for; a message must fit every key that is given."""

    sender_domain: _Patterns | None = None
    """Domains of the reverse-path. The null reverse-path has none: write it as <>."""
    recipient_domain: _Patterns | None = None
    """Domains of the recipients. The first one chooses; others that go elsewhere are told 452."""
    client: _Patterns | None = None
    """Users, and addresses or networks that clients connect from."""
    listener: _Patterns | None = None
    """Addresses of listeners, as they are configured."""
    task_type: _Patterns | None = None
    """Task types, as far as task_type.rules tell them at MAIL: by sender, before there is a header."""

    @field_validator("sender_domain", "recipient_domain", "client", "listener", "task_type")
    @classmethod
    def _something(cls, value: _Patterns | None) -> _Patterns | None:
        if value == ():
            raise ValueError("is empty: no message would fit (leave the key out for all)")
        return value

    @field_validator("sender_domain", "recipient_domain")
    @classmethod
    def _domains(cls, value: _Patterns | None, info: ValidationInfo) -> _Patterns | None:
        for pattern in value or ():
            domain = pattern.removeprefix("!")
            if "@" in domain:
                raise ValueError(f'"{pattern}" is no domain: write what stands behind the @')
            if domain == "<>" and info.field_name == "recipient_domain":
                raise ValueError(f'"{pattern}": no recipient is the null path')
        return value

    @field_validator("client")
    @classmethod
    def _clients(cls, value: _Patterns | None) -> _Patterns | None:
        for pattern in value or ():
            if "/" in pattern:
                parse_network(pattern.removeprefix("!"))
        return value

    @property
    def given(self) -> dict[str, tuple[str, ...]]:
        """The keys that are given, and their patterns."""
        return {key: value for key, value in self if value is not None}


class UpstreamSettings(Endpoint):
    """The server that messages are relayed to."""

    address: UpstreamAddress
    """host:port or [IPv6]:port of the upstream's submission service. The one value that has no default."""
    name: str = ""
    """Its name in records, metrics and log. Default: the host of the address."""
    tls: Literal["none", "opportunistic", "starttls", "implicit"] = "starttls"
    """starttls: never go on without it. implicit: from the first octet. opportunistic: if it can be had."""
    tls_verify: Flag = True
    """Whether the upstream's certificate must be valid for its name."""
    ca_file: FileName | None = None
    """File with the certificates to trust instead of the system's, PEM."""
    username: str | None = None
    """User for AUTH with the upstream; the mechanism is chosen from what the upstream offers."""
    token: TokenSettings | None = None
    """A bearer token instead of a password (XOAUTH2, OAUTHBEARER), and where it comes from."""
    password_file: FileName | None = None
    """File that holds the password; its last line end does not count."""
    password: SecretStr | None = None
    """Password for AUTH with the upstream. Better: password_file."""
    max_connections: Annotated[Count, Field(le=65_535)] = 20
    """Connections to the upstream at the same time, or as many as it takes; no more than TCP has ports."""
    idle_timeout: Duration = written("60s")
    """An unused connection is closed after this time."""
    max_age: Duration = written("5m")
    """A connection of this age is not used again."""
    max_messages: Count = 100
    """A connection that has carried so many messages is not used again."""
    connect_timeout: Duration = written("10s")
    """How long each step of connecting may take: TCP, greeting, EHLO, STARTTLS, AUTH."""
    reply_timeout: Duration = written("5m")
    """How long the reply to one command may take."""
    end_of_data_timeout: Duration = written("10m")
    """How long the reply to a whole message may take (RFC 5321 4.5.3.2.6 asks for 10 minutes)."""
    lease_wait_timeout: Duration = written("10s")
    """How long a transaction waits for a free connection; then the client is told to try later."""
    xforward: Flag = False
    """Whether an upstream that offers XFORWARD is told each message's client and task id, for its log."""
    priority: Weight = 10
    """Lower is tried first. With one upstream it makes no difference."""
    weight: Weight = 1
    """Share among upstreams of one priority. 0: drained, it gets no new messages."""
    match: MatchSettings | None = None
    """Which messages it is for. Without it: all, also those that others are for while these are away."""

    @field_validator("name")
    @classmethod
    def _named(cls, value: str, info: ValidationInfo) -> str:
        if not value:
            return Address.parse(info.data["address"]).host.lower() if "address" in info.data else value
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
            raise ValueError("must be 1 to 64 letters, digits, dots, hyphens, underscores or colons")
        if value == "none":
            raise ValueError('is taken: metrics use "none" where no upstream had a part')
        return value

    @field_validator("tls_verify")
    @classmethod
    def _verify_with_tls(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and info.data.get("tls") == "none":
            raise ValueError('makes no sense with tls = "none"')
        return value

    @field_validator("ca_file")
    @classmethod
    def _ca_file_with_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value and info.data.get("tls") == "none":
            raise ValueError('makes no sense with tls = "none"')
        if value and info.data.get("tls_verify") is False:
            raise ValueError("makes no sense with tls_verify = false")
        return value

    @field_validator("username")
    @classmethod
    def _username(cls, value: str | None) -> str | None:
        if value is not None:
            check_line(value)
        return value

    @field_validator("token")
    @classmethod
    def _token(cls, value: TokenSettings | None, info: ValidationInfo) -> TokenSettings | None:
        if value is None:
            return value
        if info.data.get("username", "") is None:
            raise ValueError("is of no use without username")
        _not_in_clear(info)
        return value

    @field_validator("password")
    @classmethod
    def _credentials(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            without = "token" in info.data and info.data["token"] is None
            if info.data.get("username") and without and not info.data.get("password_file"):
                raise ValueError("missing: username needs password_file (or password)")
            return value
        if info.data.get("token") is not None:
            raise ValueError("given together with token: keep one of the two")
        check_line(value.get_secret_value())
        if info.data.get("username", "") is None:
            raise ValueError("is of no use without username")
        _not_in_clear(info)
        return value

    @field_validator("match")
    @classmethod
    def _match_something(cls, value: MatchSettings | None) -> MatchSettings | None:
        if value is not None and not value.given:
            raise ValueError("is empty: leave it out for an upstream that takes any message")
        return value


def _not_in_clear(info: ValidationInfo) -> None:
    address, tls = info.data.get("address"), info.data.get("tls")
    if tls == "opportunistic":  # whoever strips STARTTLS from the EHLO reply would be handed the credentials
        raise ValueError('credentials could go in clear: set tls = "starttls" or "implicit"')
    if tls == "none" and address and not Address.parse(address).loopback:
        raise ValueError('credentials would go in clear: set tls = "starttls" or "implicit"')


def at_odds(upstreams: Sequence[UpstreamSettings]) -> list[str]:
    """Say why these upstreams cannot be those of one relay."""
    reasons = []
    if not upstreams:
        reasons.append("is empty: at least the address of one upstream is needed")
    names = [upstream.name for upstream in upstreams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        reasons.append(f"two upstreams of one name: {', '.join(twice)}")
    reasons += _same_address(upstreams)
    if upstreams and not any(upstream.weight for upstream in upstreams):
        reasons.append("all have weight = 0: no message could go anywhere")
    return reasons


def _same_address(upstreams: Sequence[UpstreamSettings]) -> list[str]:
    """Two names for one server would count its connections twice; two accounts on it are two upstreams."""
    return [
        f"two upstreams of one address and user: {earlier.name}, {upstream.name}"
        for index, upstream in enumerate(upstreams)
        for earlier in upstreams[:index]
        if upstream.address.lower() == earlier.address.lower() and upstream.username == earlier.username
    ]
