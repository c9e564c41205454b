"""The keys of `[records]`: where the rows go, and what they hold. No I/O.

Rules: the URL of a database may hold a password, so no message repeats it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from relay.settings.dsn import check_dsn, is_dsn, shown_url, with_password
from relay.settings.kinds import Duration, FileName, HeaderName, RelayName, StoreUrl, check_length, written
from relay.settings.section import Section

__all__ = ["RecordSettings", "check_url"]


def check_url(url: str) -> None:
    """Raise ValueError for what is no URL of a store; it never shows the URL, which may hold a password."""
    if "\0" in url:
        raise ValueError("must not hold NUL")
    if is_dsn(url):
        check_dsn(url)
        return
    if not url.startswith("sqlite:///"):
        raise ValueError("must be sqlite:///path or postgresql://user@host:port/database")
    path = url.removeprefix("sqlite:///")
    if not path or path.startswith(":memory:"):
        raise ValueError("names no file: rows would be lost at the end")
    if "?" in path or "#" in path or path.endswith("/"):
        raise ValueError("must end in the name of a file, without parameters")


class RecordSettings(Section):
    """Where the rows go, and what they hold."""

    url: StoreUrl = "sqlite:///data/task_done.db"
    """Database: sqlite:///file (four slashes: an absolute path), or postgresql://user@host/database."""
    password_file: FileName | None = None
    """File that holds the password of the database's user; its last line end does not count."""
    password: SecretStr | None = None
    """Password of the database's user. Better: password_file, or libpq's own PGPASSFILE."""
    relay: RelayName = ""
    """Name of this relay in data.relay of its rows. Default: server.hostname."""
    spool: FileName = written("data/spool")
    """Directory where accepted rows wait while the store is away."""
    commit_timeout: Duration = written("2s")
    """A store that takes longer: the row goes to the spool, and the client gets its reply."""
    when_unavailable: Literal["spool", "refuse"] = "spool"
    """While the store is away: mail flows and rows wait in the spool, or new mail is told 451."""
    headers: tuple[HeaderName, ...] = ("Message-ID",)
    """Message headers that are kept with the row."""
    recipients: Literal["plain", "hashed"] = "plain"
    """How recipients are kept and logged. hashed: as keyed pseudonyms, their domains as they are."""
    recipients_key_file: FileName | None = None
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
    def _database(cls, value: str) -> str:
        check_url(value)
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
        if value is not None:
            check_length(value.get_secret_value())
        return value
