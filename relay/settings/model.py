"""The configuration as validated values: every key, its type, its default, what it means.

Rules: the names are public interface. Each check stands in a validator of the key that it is about, so that
all mistakes of a file are reported together, each under its key; a check that needs two keys stands at the
later one. What this version does not carry is refused by name, never ignored. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    Strict,
    ValidationInfo,
    field_validator,
)

from relay.settings.address import Address
from relay.settings.dsn import check_dsn, is_dsn, shown_url, with_password
from relay.settings.kinds import (
    Count,
    Duration,
    DurationOrZero,
    Flag,
    HeaderName,
    HttpAddress,
    Lifetime,
    ListenAddress,
    MatchPattern,
    NetworkText,
    OwnName,
    RelayName,
    Size,
    StoreUrl,
    TaskTypeName,
    UpstreamAddress,
    Weight,
    fits,
    machine_name,
    written,
)
from relay.settings.limits import LimitSettings, kept_too_short, named_twice
from relay.settings.networks import Network, parse_network, too_wide
from relay.settings.section import Section as _Section

__all__ = [
    "ClientSettings",
    "ExpirySettings",
    "HttpSettings",
    "LimitSettings",
    "ListenerSettings",
    "LogSettings",
    "MatchSettings",
    "Origin",
    "RecordSettings",
    "RetentionSettings",
    "ServerSettings",
    "Settings",
    "TaskTypeRule",
    "TaskTypeSettings",
    "TlsSettings",
    "TokenSettings",
    "UpstreamSettings",
]

SHORTEST_TOKEN = 16
_NOT_YET = "not available in this version"
LOOPBACK = ("127.0.0.0/8", "::1/128")


class ServerSettings(_Section):
    """The relay as its clients meet it."""

    hostname: OwnName = Field(default_factory=machine_name)
    """Name in the greeting and towards the upstream. Default: the machine's fully qualified name."""
    max_message_size: Size = written("50MiB")
    """Largest message, in octets as sent. 0: whatever the upstream allows."""
    max_recipients: Count = 1000
    """Recipients of one message."""
    max_connections: Count = 1000
    """Client connections at the same time."""
    max_connections_per_client: Count = 100
    """Client connections at the same time from one address."""
    bare_newlines: Literal["normalize", "refuse"] = "normalize"
    """A stray CR or LF in a message: LF is made a line end and CR a space, or the message is refused."""
    received_header: Flag = False
    """Whether the relay puts a Received header before the message. In this version: no."""
    idle_timeout: Duration = written("5m")
    """How long a client may be silent between commands (RFC 5321 4.5.3.2.7 asks for 5 minutes)."""
    min_data_rate: Size = written("500B")
    """A message that arrives slower than this in a second, after 30 s of grace, is aborted. 0: no limit."""
    lease_idle_timeout: Duration = written("30s")
    """How long a client silent in the middle of a transaction keeps its upstream connection."""
    drain_timeout: DurationOrZero = written("30s")
    """How long a stop waits for the transactions under way."""
    reuse_port: Flag = False
    """Whether several relays on one machine may listen on the same port (SO_REUSEPORT)."""

    @field_validator("received_header")
    @classmethod
    def _no_received_header(cls, value: bool) -> bool:
        if value:
            raise ValueError(f"{_NOT_YET}: the Received header of the relay's own")
        return value


class _Endpoint(_Section):
    address: str

    @property
    def host(self) -> str:
        """The name or the IP address (without brackets) in the address."""
        return Address.parse(self.address, unix=True).host

    @property
    def path(self) -> str:
        """The file of a unix socket; empty for a TCP port."""
        return Address.parse(self.address, unix=True).path

    @property
    def port(self) -> int:
        """The TCP port in the address."""
        return Address.parse(self.address, unix=True).port

    @property
    def loopback(self) -> bool:
        """Whether the address is this machine's own and nobody else's."""
        return Address.parse(self.address, unix=True).loopback

    def collides(self, other: _Endpoint) -> bool:
        """Whether both cannot be bound at the same time."""
        mine, theirs = Address.parse(self.address, unix=True), Address.parse(other.address, unix=True)
        return mine.collides(theirs)


class ListenerSettings(_Endpoint):
    """One address where clients connect."""

    address: ListenAddress
    """host:port, [IPv6]:port, or unix:/path of a socket file. Port 0: any free one."""
    tls: Literal["none", "starttls", "required", "implicit"] = "none"
    """starttls: offered. required: no mail without it. implicit: TLS from the first octet."""
    proxy_protocol: Flag = False
    """Whether connections begin with a PROXY header (versions 1 and 2), from clients.trusted_proxies."""


class TlsSettings(_Section):
    """The certificate that listeners show. Its files are read again when they change, and at SIGHUP."""

    cert: Path | None = None
    """File with the certificate and its chain, PEM."""
    key: Path | None = None
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


def _allowed_by_default(data: dict[str, Any]) -> Any:
    """Loopback, as long as nobody can log in; once clients can, they have to."""
    return LOOPBACK if data.get("auth", "none") == "none" else ()


class ClientSettings(_Section):
    """Who may relay."""

    auth: Literal["none", "users", "passthrough"] = "none"
    """How clients log in: not at all, as users of users_file, or with what the upstream takes from them."""
    auth_without_tls: Flag = False
    """Whether AUTH is offered without TLS to clients on this machine; to others it never is."""
    users_file: Path | None = None
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


class TokenSettings(_Section):
    """Where the bearer token for an upstream comes from: a file, a command or an OAuth 2.0 token endpoint."""

    file: Path | None = None
    """File that holds the token; it is read anew for every login."""
    command: tuple[str, ...] = ()
    """Program and arguments that print the token; run for every login, without a shell."""
    url: str | None = None
    """Token endpoint (RFC 6749), https; http only on loopback."""
    client_id: str | None = None
    """The relay's identifier at the token endpoint."""
    client_secret_file: Path | None = None
    """File that holds the client's secret; its last line end does not count."""
    client_secret: SecretStr | None = None
    """The client's secret. Better: client_secret_file."""
    refresh_token_file: Path | None = None
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
        if text is not None and (not text or any(character in "\0\r\n" for character in text)):
            raise ValueError("must not be empty or hold line ends or NUL")
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


def _not_in_clear(info: ValidationInfo) -> None:
    address, tls = info.data.get("address"), info.data.get("tls")
    if tls == "opportunistic":  # whoever strips STARTTLS from the EHLO reply would be handed the credentials
        raise ValueError('credentials could go in clear: set tls = "starttls" or "implicit"')
    if tls == "none" and address and not Address.parse(address).loopback:
        raise ValueError('credentials would go in clear: set tls = "starttls" or "implicit"')


_Patterns = tuple[MatchPattern, ...]


class MatchSettings(_Section):
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


class UpstreamSettings(_Endpoint):
    """The server that messages are relayed to."""

    address: UpstreamAddress
    """host:port or [IPv6]:port of the upstream's submission service. The one value that has no default."""
    name: str = ""
    """Its name in records, metrics and log. Default: the host of the address."""
    tls: Literal["none", "opportunistic", "starttls", "implicit"] = "starttls"
    """starttls: never go on without it. implicit: TLS from the first octet. opportunistic: TLS if offered."""
    tls_verify: Flag = True
    """Whether the upstream's certificate must be valid for its name."""
    ca_file: Path | None = None
    """File with the certificates to trust instead of the system's, PEM."""
    username: str | None = None
    """User for AUTH with the upstream; the mechanism is chosen from what the upstream offers."""
    token: TokenSettings | None = None
    """A bearer token instead of a password (XOAUTH2, OAUTHBEARER), and where it comes from."""
    password_file: Path | None = None
    """File that holds the password; its last line end does not count."""
    password: SecretStr | None = None
    """Password for AUTH with the upstream. Better: password_file."""
    max_connections: Count = 20
    """Connections to the upstream at the same time."""
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
    priority: Annotated[int, Strict(), Field(ge=0)] = 10
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
        if value is not None and (not value or any(character in "\0\r\n" for character in value)):
            raise ValueError("must not be empty or hold line ends or NUL")
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
        secret = value.get_secret_value()
        if not secret or any(character in "\0\r\n" for character in secret):
            raise ValueError("must not be empty or hold line ends or NUL")
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


class RecordSettings(_Section):
    """Where the rows go, and what they hold."""

    url: StoreUrl = "sqlite:///data/task_done.db"
    """Database: sqlite:///file (four slashes: an absolute path), or postgresql://user@host/database."""
    password_file: Path | None = None
    """File that holds the password of the database's user; its last line end does not count."""
    password: SecretStr | None = None
    """Password of the database's user. Better: password_file, or libpq's own PGPASSFILE."""
    relay: RelayName = ""
    """Name of this relay in data.relay of its rows. Default: server.hostname."""
    spool: Path = written("data/spool")
    """Directory where accepted rows wait while the store is away."""
    commit_timeout: Duration = written("2s")
    """A store that takes longer: the row goes to the spool, and the client gets its reply."""
    when_unavailable: Literal["spool", "refuse"] = "spool"
    """While the store is away: mail flows and rows wait in the spool, or new mail is told 451."""
    headers: tuple[HeaderName, ...] = ("Message-ID",)
    """Message headers that are kept with the row."""
    recipients: Literal["plain", "hashed"] = "plain"
    """How recipients are kept and logged. hashed: as keyed pseudonyms, their domains as they are."""
    recipients_key_file: Path | None = None
    """File with the key of the pseudonyms, the same for all relays on one database."""
    recipients_key: SecretStr | None = Field(default=None, validate_default=True)
    """The key itself. Better: recipients_key_file."""

    @property
    def shown_url(self) -> str:
        """The URL without its secrets."""
        return shown_url(self.url)

    @property
    def connect_url(self) -> str:
        """The URL with the password in it: for who connects, and never to be shown."""
        if self.password is None:
            return self.url
        return with_password(self.url, self.password.get_secret_value())

    @field_validator("url")
    @classmethod
    def _database(cls, value: str) -> str:  # never shows the value: it may hold a password
        if is_dsn(value):
            check_dsn(value)
            return value
        if not value.startswith("sqlite:///"):
            raise ValueError("must be sqlite:///path or postgresql://user@host:port/database")
        path = value.removeprefix("sqlite:///")
        if not path or path.startswith(":memory:"):
            raise ValueError("names no file: rows would be lost at the end")
        if "?" in path or "#" in path or path.endswith("/"):
            raise ValueError("must end in the name of a file, without parameters")
        return value

    @field_validator("password")
    @classmethod
    def _password_of_a_user(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        url = info.data.get("url")
        if value is not None and url is not None:
            if not is_dsn(url):
                raise ValueError("a SQLite file has no password")
            user, at, _ = urlsplit(url).netloc.rpartition("@")
            if not at or not user or ":" in user:
                raise ValueError("is for the user in url: postgresql://user@host/database")
        return value

    @field_validator("spool")
    @classmethod
    def _spool_is_named(cls, value: Path) -> Path:
        if value == Path():
            raise ValueError("must name a directory of its own")
        return value

    @field_validator("recipients_key")
    @classmethod
    def _key_for_hashes(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        hashed = info.data.get("recipients") == "hashed"
        if hashed and value is None and info.data.get("recipients_key_file") is None:
            raise ValueError('is missing: recipients = "hashed" needs recipients_key_file')
        if value is not None and len(value.get_secret_value()) < SHORTEST_TOKEN:
            raise ValueError(
                f"is shorter than {SHORTEST_TOKEN} characters: make one with openssl rand -hex 32"
            )
        return value


class TaskTypeRule(_Section):
    """A task type for what one sender sends."""

    sender: str
    """Reverse-path that the rule is for, without angle brackets; empty for the null reverse-path."""
    type: TaskTypeName
    """The task type."""

    @field_validator("sender")
    @classmethod
    def _path(cls, value: str) -> str:
        if not value.isprintable() or value.startswith("<") or value.endswith(">"):
            raise ValueError("must be an address without angle brackets")
        return value


class TaskTypeSettings(_Section):
    """How a message's task type is found: from the first header present, else by rule, else the default."""

    headers: tuple[HeaderName, ...] = (
        "X-Task-Type",
        "X-MC-Tags",
        "X-Mailgun-Tag",
        "X-PM-Tag",
        "X-SES-Message-Tags",
        "X-SMTPAPI",
    )
    """Headers that name the task type, the first one present wins."""
    default: TaskTypeName = "unclassified"
    """The task type of a message that neither a header nor a rule names."""
    id_header: HeaderName = "X-Task-ID"
    """Header with the application's own id of the task, kept in client_task_id."""
    rules: tuple[TaskTypeRule, ...] = ()
    """Task types by sender."""

    @property
    def known_at_mail(self) -> tuple[str, ...]:
        """The types that can be known before there is a header: by rule, and the default if none is read."""
        of_rules = [rule.type for rule in self.rules]
        return tuple(dict.fromkeys(of_rules if self.headers else [*of_rules, self.default]))


class RetentionSettings(_Section):
    """How long rows are kept."""

    default: Lifetime = written("30d")
    """Lifetime of a row, or "never" for rows that are not deleted."""
    by_type: dict[TaskTypeName, Lifetime] = Field(default_factory=dict)
    """Lifetimes of their own for single task types."""


class ExpirySettings(_Section):
    """How expired rows are deleted."""

    interval: Duration = written("1h")
    """Time from one round to the next."""
    batch_size: Count = 5000
    """Rows deleted in one transaction, at most."""


class HttpSettings(_Endpoint):
    """Metrics, health, page and API."""

    address: HttpAddress = written("127.0.0.1:9025")
    """host:port or [IPv6]:port. Port 0: any free one."""
    token_file: Path | None = None
    """File with the token that page and API ask for. Off loopback they answer only with one."""
    token: SecretStr | None = None
    """The token itself. Better: token_file."""
    hosts: tuple[OwnName, ...] = ()
    """More names by which a browser may reach page and API, such as that of a proxy in front."""

    @field_validator("token")
    @classmethod
    def _long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            text = value.get_secret_value()
            if not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("a token has letters, digits and ASCII signs, and no space")
            if len(text) < SHORTEST_TOKEN:
                raise ValueError(
                    f"is shorter than {SHORTEST_TOKEN} characters: make one with openssl rand -hex 32"
                )
        return value


class LogSettings(_Section):
    """What is written to standard output."""

    format: Literal["json", "console"] = "json"
    """One JSON object a line, or lines for people."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events that are written."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What came up while the settings were loaded."""

    warnings: tuple[str, ...] = ()


def _same_address(upstreams: tuple[UpstreamSettings, ...]) -> list[str]:
    """Two names for one server would count its connections twice; two accounts on it are two upstreams."""
    return [
        f"two upstreams of one address and user: {earlier.name}, {upstream.name}"
        for index, upstream in enumerate(upstreams)
        for earlier in upstreams[:index]
        if upstream.address.lower() == earlier.address.lower() and upstream.username == earlier.username
    ]


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


class Settings(_Section):
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
        reasons = []
        if not value:
            reasons.append("is empty: at least the address of one upstream is needed")
        names = [upstream.name for upstream in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            reasons.append(f"two upstreams of one name: {', '.join(twice)}")
        reasons += _same_address(value)
        if value and not any(upstream.weight for upstream in value):
            reasons.append("all have weight = 0: no message could go anywhere")
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
        return (*self._origin.warnings, *unverified, *unused)

    @property
    def relay_name(self) -> str:
        """The name of this relay in its rows."""
        return self.records.relay or self.server.hostname

    def effective(self) -> dict[str, Any]:
        """Return every value in the form in which it is written in the file, secrets hidden."""
        return self.model_dump(mode="json")
