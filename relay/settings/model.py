"""The configuration as validated values: all of its sections, and what they ask of each other. No I/O.

Rules: the names are public interface. A section stands in the module of its name; `tls` is with the
listeners, `expiry` with `retention`. What one section can tell by itself is checked there; here is what
takes several of them, or all entries of one, each check at the section that comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from relay.settings.clients import ClientSettings
from relay.settings.http import HttpSettings
from relay.settings.kinds import fits, written
from relay.settings.limits import LimitSettings, fits_no_pseudonym, kept_too_short, named_twice
from relay.settings.listeners import ListenerSettings, TlsSettings
from relay.settings.log import LogSettings
from relay.settings.records import RecordSettings
from relay.settings.retention import ExpirySettings, RetentionSettings
from relay.settings.section import Section
from relay.settings.server import ServerSettings
from relay.settings.task_type import TaskTypeSettings
from relay.settings.upstreams import UpstreamSettings, at_odds

__all__ = ["Origin", "Settings"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What came up while the settings were loaded."""

    warnings: tuple[str, ...] = ()


class Settings(Section):
    """The configuration of one relay. Frozen; make one with `load`."""

    server: ServerSettings = Field(default_factory=ServerSettings)
    """The relay as its clients meet it."""
    listeners: tuple[ListenerSettings, ...] = written(({"address": "127.0.0.1:2525"},))
    """Where clients connect."""
    tls: TlsSettings = Field(default_factory=TlsSettings)
    """The certificate that listeners show. Its files are read again when they change, and at SIGHUP."""
    clients: ClientSettings = Field(default_factory=ClientSettings)
    """Who may relay."""
    upstreams: tuple[UpstreamSettings, ...]
    """The servers that messages are relayed to: one or more."""
    records: RecordSettings = Field(default_factory=RecordSettings)
    """Where the rows go, and what they hold."""
    task_type: TaskTypeSettings = Field(default_factory=TaskTypeSettings)
    """How a message's task type is found."""
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    """How long rows are kept."""
    expiry: ExpirySettings = Field(default_factory=ExpirySettings)
    """How expired rows are deleted."""
    limits: tuple[LimitSettings, ...] = ()
    """Rate limits, counted from the records."""
    http: HttpSettings = Field(default_factory=HttpSettings)
    """Metrics, health, page and API."""
    log: LogSettings = Field(default_factory=LogSettings)
    """What is written to standard output."""

    _origin: Origin = PrivateAttr(default=Origin())

    @field_validator("listeners")
    @classmethod
    def _listeners_apart(cls, value: tuple[ListenerSettings, ...]) -> tuple[ListenerSettings, ...]:
        if not value:
            raise ValueError("is empty: nobody could connect")
        for index, listener in enumerate(value):
            for earlier in value[:index]:
                if listener.collides(earlier):
                    raise ValueError(f"two listeners on one address: {earlier.address}, {listener.address}")
        return value

    @field_validator("tls")
    @classmethod
    def _certificate_for_tls(cls, value: TlsSettings, info: ValidationInfo) -> TlsSettings:
        for listener in info.data.get("listeners", ()):
            if listener.tls != "none" and value.cert is None:
                raise ValueError(
                    f'cert is missing: the listener {listener.address} has tls = "{listener.tls}"'
                )
        return value

    @field_validator("clients")
    @classmethod
    def _clients_fit_listeners(cls, value: ClientSettings, info: ValidationInfo) -> ClientSettings:
        listeners: tuple[ListenerSettings, ...] = info.data.get("listeners", ())
        reasons = []
        if (
            value.auth != "none"
            and not value.auth_without_tls
            and all(each.tls == "none" for each in listeners)
        ):
            reasons.append(
                f'auth = "{value.auth}" is offered with TLS alone, and no listener has it: set tls of a '
                "listener (auth_without_tls = true would do for clients on this machine)"
            )
        proxied = [each.address for each in listeners if each.proxy_protocol]
        if proxied and not value.trusted_proxies:
            reasons.append(f"trusted_proxies is empty: the listener {proxied[0]} awaits PROXY headers")
        if value.trusted_proxies and listeners and not proxied:
            reasons.append("trusted_proxies is of no use: no listener has proxy_protocol = true")
        if reasons:
            raise ValueError("; ".join(reasons))
        return value

    @field_validator("upstreams")
    @classmethod
    def _upstreams_fit(
        cls, value: tuple[UpstreamSettings, ...], info: ValidationInfo
    ) -> tuple[UpstreamSettings, ...]:
        reasons = at_odds(value)
        listeners: tuple[ListenerSettings, ...] = info.data.get("listeners", ())
        reasons += [
            f"{upstream.address} is a listener of this relay: mail would go round in circles"
            for upstream in value
            if any(upstream.collides(listener) for listener in listeners)
        ]
        clients: ClientSettings | None = info.data.get("clients")
        if clients is not None and clients.auth == "passthrough":
            reasons += [
                f"{upstream.address} would be given the passwords of clients in clear "
                '(clients.auth = "passthrough"): set its tls = "starttls" or "implicit"'
                for upstream in value
                if upstream.tls not in ("starttls", "implicit")
                and not upstream.loopback
                and clients.passthrough_to in (upstream.name, None)
            ]
            reasons += _passthrough_reasons(value, clients.passthrough_to)
        reasons += _listener_reasons(value, listeners)
        if reasons:
            raise ValueError("; ".join(reasons))
        return value

    @field_validator("task_type")
    @classmethod
    def _known_at_mail(cls, value: TaskTypeSettings, info: ValidationInfo) -> TaskTypeSettings:
        known = value.known_at_mail
        reasons = [
            f'upstreams.{index}.match.task_type: "{pattern}" fits no type that is known at MAIL, before the '
            f"headers: {_listed(known) or 'there are no rules'} (add a rule, or match another key)"
            for index, pattern in _patterns(info.data.get("upstreams", ()), "task_type")
            if not any(fits(pattern, each) for each in known)
        ]
        if reasons:
            raise ValueError("; ".join(reasons))
        return value

    @field_validator("limits")
    @classmethod
    def _limits_fit(cls, value: tuple[LimitSettings, ...], info: ValidationInfo) -> tuple[LimitSettings, ...]:
        reasons = named_twice(value)
        retention: RetentionSettings | None = info.data.get("retention")
        if retention is not None:
            reasons += kept_too_short(value, retention.default, retention.by_type)
        if reasons:
            raise ValueError("; ".join(reasons))
        return value

    @field_validator("http")
    @classmethod
    def _http_apart(cls, value: HttpSettings, info: ValidationInfo) -> HttpSettings:
        listeners: tuple[ListenerSettings, ...] = info.data.get("listeners", ())
        for listener in listeners:
            if value.collides(listener):
                raise ValueError(f"the address {value.address} is taken by the listener {listener.address}")
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Keep what `load` found on the way."""
        if isinstance(context, Origin):
            self._origin = context

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and yet worth a line at start, one text each."""
        unverified = (
            f"upstreams.{index}.tls_verify: off: whoever is in between can read the mail and the password"
            for index, upstream in enumerate(self.upstreams)
            if not upstream.tls_verify
        )
        unused = (
            ["tls.cert: not used: no listener has tls"]
            if self.tls.cert and all(listener.tls == "none" for listener in self.listeners)
            else []
        )
        unfit = fits_no_pseudonym(self.limits) if self.records.recipients == "hashed" else []
        return (*self._origin.warnings, *unverified, *unused, *unfit)

    @property
    def relay_name(self) -> str:
        """The name of this relay in its rows."""
        return self.records.relay or self.server.hostname

    def effective(self) -> dict[str, Any]:
        """Return every value in the form in which it is written in the file, secrets hidden."""
        return self.model_dump(mode="json")


def _passthrough_reasons(upstreams: tuple[UpstreamSettings, ...], named: str | None) -> list[str]:
    names = [upstream.name for upstream in upstreams]
    if named is None:
        if len(names) < 2:
            return []
        return [f"clients.passthrough_to is missing: which one decides about logins? {_listed(names)}"]
    if named not in names:
        return [f'clients.passthrough_to names no upstream: "{named}" (there are: {_listed(names)})']
    if not upstreams[names.index(named)].weight:
        return [f"{named} has weight = 0: who logs in there (clients.passthrough_to) could send nothing"]
    return []


def _listener_reasons(
    upstreams: tuple[UpstreamSettings, ...], listeners: tuple[ListenerSettings, ...]
) -> list[str]:
    addresses = [listener.address for listener in listeners]
    return [
        f'match.listener of {upstreams[index].name}: "{pattern}" fits no listener ({_listed(addresses)})'
        for index, pattern in _patterns(upstreams, "listener")
        if addresses and not any(fits(pattern, address) for address in addresses)
    ]


def _patterns(upstreams: tuple[UpstreamSettings, ...], key: str) -> list[tuple[int, str]]:
    """Every pattern of one key of match, without its "!", and the index of its upstream."""
    return [
        (index, pattern.removeprefix("!"))
        for index, upstream in enumerate(upstreams)
        if upstream.match is not None
        for pattern in upstream.match.given.get(key, ())
    ]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
