"""URLs of PostgreSQL databases: what may stand in one, how it is shown, and how a password comes into it.

Rules: no I/O. A mistake is a ValueError whose text never repeats the URL, which may hold a password.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

__all__ = ["PARAMETERS", "check_dsn", "files_of", "has_password", "is_dsn", "shown_url", "with_password"]

PARAMETERS = (
    *("host", "port", "passfile", "application_name", "target_session_attrs"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "ssl_min_protocol_version"),
)
"""What may follow the question mark: libpq's names, as far as they mean something to the driver."""
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def is_dsn(url: str) -> bool:
    """Whether a URL is one of PostgreSQL, right or wrong."""
    return re.match(r"postgres(ql)?(\+\w+)?:", url) is not None


def check_dsn(url: str) -> None:
    """Raise ValueError for a URL that cannot mean a database."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("must be postgresql://user@host:port/database") from None
    if parts.scheme not in {"postgresql", "postgres", "postgresql+asyncpg"} or not url.startswith(
        f"{parts.scheme}://"
    ):
        raise ValueError("must be postgresql://user@host:port/database")
    if port == 0 or parts.fragment or not parts.path.strip("/") or "/" in parts.path[1:]:
        raise ValueError("must end in the name of a database: postgresql://user@host:port/database")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in PARAMETERS:
            raise ValueError(f"has an unknown parameter; known: {', '.join(PARAMETERS)}")
        if name == "sslmode" and value not in _MODES:
            raise ValueError(f"sslmode must be one of {', '.join(_MODES)}")


def files_of(url: str) -> list[tuple[str, str]]:
    """Return the parameters of a PostgreSQL URL that name files to be read, and those; none of any other."""
    query = url.partition("?")[2] if is_dsn(url) else ""
    return [(name, value) for name, value in parse_qsl(query) if name in _FILES]


def has_password(url: str) -> bool:
    """Whether a URL is one of PostgreSQL with a password in it."""
    return is_dsn(url) and ":" in url.partition("://")[2].partition("/")[0].rpartition("@")[0]


def shown_url(url: str) -> str:
    """Return a URL as people may see it: without password and parameters."""
    if not is_dsn(url):
        return url
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user.partition(':')[0]}{at}{place}{parts.path}"


def with_password(url: str, password: str) -> str:
    """Return a URL, which names a user, with the password in it."""
    parts = urlsplit(url)
    user, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{place}"))
