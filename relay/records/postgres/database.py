"""One PostgreSQL database: how it is reached, looked at before it is touched, brought up, asked and left.

Rules. What is not ours is never changed. Connections come from a pool that makes them as they are needed, so
that a server that was away is found again by the next call, and nothing is kept in a session: a pooler
between may hand each transaction to another one. asyncpg's errors end here, as `StoreError` (the database
cannot be used now), `UnreachableError` (nor is anybody there) or `RejectedRecordError` (this data never).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from typing import Any

from relay.records.errors import (
    MissingStoreError,
    OlderStoreError,
    RejectedRecordError,
    StoreError,
    UnreachableError,
)
from relay.records.tables import COLUMNS, NAMES, SCHEMA_VERSION, SCHEMA_VERSIONS, VERSION_TABLE
from relay.settings.dsn import shown_url

try:
    import asyncpg
except ImportError as error:  # an optional dependency
    raise StoreError(
        "records.url: PostgreSQL needs the driver asyncpg: pip install 'smtp-relay-record[postgres]'"
    ) from error

__all__ = [
    "GOODBYE_TIMEOUT_S",
    "Connection",
    "Database",
    "check",
    "check_makeable",
    "connect",
    "explained",
    "leave",
    "version_in",
]

_log = logging.getLogger(__name__)

Connection = Any
"""An asyncpg connection; asyncpg says nothing of its types."""

CONNECT_TIMEOUT_S = 10.0
STATEMENT_TIMEOUT_S = 60.0
"""How long a statement may take, here and, as `statement_timeout`, in the transactions of long work."""
CLOSE_TIMEOUT_S = 5.0
GOODBYE_TIMEOUT_S = 2.0
"""How long a server is waited for that is told of an end: of a statement, of a connection, of a relay."""
POOL_SIZE = 4
"""Connections of one relay: a commit, a late one, a step of long work, a look."""

_LOOK = """
    SELECT current_schema() AS schema, current_setting('server_encoding') AS encoding,
        current_setting('synchronous_commit') AS synchronous_commit, pg_is_in_recovery() AS in_recovery,
        ARRAY(
            SELECT relname::text FROM pg_class
            WHERE relnamespace = to_regnamespace(quote_ident(current_schema())) AND relname = ANY($1)
        ) AS names
"""
_NEWEST = f"SELECT max(version_num) FROM {VERSION_TABLE}"  # noqa: S608
_COLUMNS = """
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped
"""


async def connect(url: str) -> Connection:
    """Return a connection to the database that `url` names; raises StoreError."""
    try:
        return await asyncpg.connect(_dsn(url), **_options(url))
    except Exception as error:
        raise explained(error, url) from error


async def leave(connection: Connection) -> None:
    """Close a connection, also one to a server that does not answer."""
    with contextlib.suppress(*_BREAK):  # it is closed by that
        await connection.close(timeout=CLOSE_TIMEOUT_S)


async def check_makeable(url: str) -> None:
    """Raise StoreError unless tables can be made in the database that `url` names, which has none."""
    connection = await connect(url)
    try:
        allowed = await connection.fetchval("SELECT has_schema_privilege(current_schema(), 'CREATE')")
    except Exception as error:
        raise explained(error, url) from error
    finally:
        await leave(connection)
    if not allowed:
        raise StoreError(f"{shown_url(url)}: this role may not make tables; {_MAKER}")


def _dsn(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}://{rest}"


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"timeout": CONNECT_TIMEOUT_S, "command_timeout": STATEMENT_TIMEOUT_S}
    if "application_name=" not in url:
        options["server_settings"] = {"application_name": "smtp-relay"}
    return options


class Database:
    """A PostgreSQL database, open or to be opened."""

    def __init__(self, url: str, *, create: bool, upgrade: bool) -> None:
        self.url = url
        self._create = create
        self._upgrade = upgrade
        self._pool: Any = None
        self._opening = asyncio.Lock()
        self._uses = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @classmethod
    async def open(cls, url: str, *, create: bool, later: bool, upgrade: bool = True) -> Database:
        """Open the database; make its tables if it has none and `create`; bring its schema to this version.

        Without `upgrade`, one that has an older version is refused with OlderStoreError.

        With `later`, one that cannot be reached now is opened by the first call that can.
        """
        database = cls(url, create=create, upgrade=upgrade)
        try:
            await database._open()
        except UnreachableError:
            if not later:
                raise
        return database

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection for one statement, or for a transaction; raises StoreError."""
        if self._closed:
            raise StoreError(f"{shown_url(self.url)}: the store is closed")
        self._uses += 1
        self._idle.clear()
        try:
            if self._pool is None:
                await self._open()
            connection = await self._pool.acquire(timeout=CONNECT_TIMEOUT_S)
            try:
                yield connection
            except _BREAK as error:
                if not isinstance(error, _NEVER):
                    # Nobody knows what it is about; and what a session was given as it began (a limit,
                    # read-only) it keeps, whatever was changed since.
                    _terminate(connection)
                raise
            finally:
                # Behind a cancellation the pool waits until the server has ended the statement; where that
                # takes too long it closes the connection, and the cancellation must not become an error.
                with contextlib.suppress(*_BREAK):
                    await self._pool.release(connection, timeout=GOODBYE_TIMEOUT_S)
        except Exception as error:
            raise explained(error, self.url) from error
        finally:
            self._uses -= 1
            if not self._uses:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Lend a connection within one short transaction: durable at the end, undone whole on any error."""
        milliseconds = round(STATEMENT_TIMEOUT_S * 1000)
        async with self.connection() as connection:
            try:
                await connection.execute(
                    f"BEGIN; SET LOCAL statement_timeout = {milliseconds}; "
                    f"SET LOCAL idle_in_transaction_session_timeout = {milliseconds}"
                )
                yield connection
                await connection.execute("COMMIT")
            except BaseException:
                # The end of the session undoes it: a ROLLBACK would wait for a server that does not answer.
                _terminate(connection)
                raise

    async def close(self) -> None:
        """Finish what was asked for, then close. Again: nothing happens."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), CLOSE_TIMEOUT_S)
        pool = self._pool  # by now: it may have been opened meanwhile
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), CLOSE_TIMEOUT_S)
        except (TimeoutError, OSError, asyncpg.InterfaceError, asyncpg.PostgresError):
            pool.terminate()

    async def _open(self) -> None:
        async with self._opening:
            if self._pool is not None:
                return
            connection = await connect(self.url)
            try:
                version = await version_in(connection, self.url, writes=True)
                if version is None and not self._create:
                    raise MissingStoreError(
                        f"{shown_url(self.url)}: has no tables of the relay; nothing was recorded yet, or "
                        "records.url names another database"
                    )
                if version not in (None, SCHEMA_VERSION) and not self._upgrade:
                    raise OlderStoreError(shown_url(self.url), str(version))
                if version != SCHEMA_VERSION:
                    # Alembic takes longer to load than all the rest of a start.
                    from relay.records.migrations import upgrade_postgres

                    if version is not None:
                        steps = (shown_url(self.url), version, SCHEMA_VERSION)
                        _log.warning("%s: schema version %s is brought up to %s", *steps)
                    await upgrade_postgres(lambda: connect(self.url))
                await check(connection, self.url)
            except Exception as error:
                raise explained(error, self.url) from error
            finally:
                await leave(connection)
            self._pool = await asyncpg.create_pool(
                _dsn(self.url),
                min_size=0,
                max_size=POOL_SIZE,
                reset=_leave_as_it_is,
                **_options(self.url),
            )


def _terminate(connection: Connection) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):  # it is closed already
        connection.terminate()


async def _leave_as_it_is(_connection: Connection) -> None:
    """Keep the session: nothing of ours is in it, and to reset it would be a round trip for each commit."""


async def version_in(connection: Connection, url: str, *, writes: bool) -> str | None:
    """Return the schema version of the database, None when it has nothing of ours; refuse what is not ours.

    With `writes`, refuse also what rows cannot be entrusted to.
    """
    # One statement, thus one moment: another process may be making the tables just now.
    found = await connection.fetchrow(_LOOK, list(NAMES))
    name, names = shown_url(url), set(found["names"])
    if found["schema"] is None:
        raise StoreError(f"{name}: no schema of the search path exists; CREATE SCHEMA, or set search_path")
    if found["encoding"] != "UTF8":
        raise StoreError(f"{name}: its encoding is {found['encoding']}; make a database with ENCODING 'UTF8'")
    if writes and found["in_recovery"]:
        raise UnreachableError(
            f"{name}: is a standby that cannot be written; name the primary in records.url"
        )
    if writes and found["synchronous_commit"] == "off":
        raise StoreError(
            f"{name}: synchronous_commit is off, so a crash would lose rows; "
            "ALTER ROLE (or DATABASE) ... SET synchronous_commit = on"
        )
    if not names:
        return None
    if VERSION_TABLE not in names:
        raise StoreError(
            f"{name}: has a table or view {min(names)} that the relay did not make; "
            "name another database in records.url"
        )
    version = await connection.fetchval(_NEWEST)
    if version not in SCHEMA_VERSIONS:
        raise StoreError(
            f"{name}: has schema version {version}, and this version of the relay knows none after "
            f"{SCHEMA_VERSION}; install the newer version again"
        )
    return str(version)


async def check(connection: Connection, url: str) -> None:
    """Raise StoreError unless the tables have the columns that this version reads and writes."""
    for table, columns in COLUMNS.items():
        found = {row[0] for row in await connection.fetch(_COLUMNS, table)}
        missing = sorted(set(columns) - found)
        if missing:
            raise StoreError(f"{shown_url(url)}: {table} has no column {missing[0]}; restore a backup")


def explained(error: Exception, url: str) -> Exception:
    """Say in one line what an error of asyncpg means for the operator; what is none of its errors stays."""
    if isinstance(error, StoreError):
        return error
    cause = error.__context__
    if isinstance(error, asyncpg.InterfaceError) and isinstance(
        cause, asyncpg.PostgresError | asyncpg.InternalClientError
    ):
        error = cause  # the transaction could not be undone, since this had ended its session
    if isinstance(error, asyncpg.PostgresError):
        return _said_by_server(error, shown_url(url))
    return _met_on_the_way(error, shown_url(url))


def _said_by_server(error: Exception, name: str) -> StoreError:
    if isinstance(error, _FORGOTTEN):
        # The driver adds what its programmer may do; the operator cannot.
        return StoreError(
            f"{name}: {error.args[0]}; the pooler in between loses prepared statements: it must be pgbouncer "
            "1.21 or later with max_prepared_statements above 0, or have pool_mode = session"
        )
    said = f"{name}: {_line(error)}"
    if isinstance(error, _NEVER):
        return RejectedRecordError(said)
    for kind, advice in _ADVICE:
        if isinstance(error, kind):
            return StoreError(f"{said}; {advice}")
    kind = UnreachableError if isinstance(error, _AWAY) else StoreError
    return kind(f"{said} (SQLSTATE {getattr(error, 'sqlstate', None)})")


def _met_on_the_way(error: Exception, name: str) -> Exception:
    if isinstance(error, ssl.SSLError):
        return StoreError(
            f"{name}: TLS failed: {_line(error)}; look at sslmode and sslrootcert in records.url"
        )
    if isinstance(error, ConnectionError) and "SSL" in str(error):
        return StoreError(
            f"{name}: the server has no TLS; switch it on there, or change sslmode in records.url"
        )
    if isinstance(error, TimeoutError):
        return UnreachableError(f"{name}: no answer in time; look at the server, and at the network to it")
    if isinstance(error, OSError) and error.filename is not None:  # in HOME, where libpq looks unasked
        return StoreError(
            f"{name}: {error.filename} cannot be read: {error.strerror}; set HOME to that of the relay's user"
        )
    if isinstance(error, OSError):
        return UnreachableError(f"{name}: cannot be reached: {_line(error)}; start it, or change records.url")
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return UnreachableError(f"{name}: no server is what target_session_attrs in records.url asks for")
    if isinstance(error, asyncpg.InternalClientError):
        return UnreachableError(f"{name}: the session ended as a statement began ({_line(error)})")
    if isinstance(error, asyncpg.InterfaceError):
        return StoreError(f"{name}: {_line(error)}")
    return error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_FORGOTTEN = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
_NEVER = (
    asyncpg.exceptions.DataError,
    asyncpg.exceptions.IntegrityConstraintViolationError,
    asyncpg.exceptions.ProgramLimitExceededError,
    asyncpg.exceptions.UntranslatableCharacterError,
)
_BREAK = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_AWAY = (
    asyncpg.exceptions.PostgresConnectionError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.exceptions.InsufficientResourcesError,
    asyncpg.exceptions.ReadOnlySQLTransactionError,
)
_MAKER = "GRANT CREATE, USAGE ON SCHEMA ... to the relay's role, or make it the owner"
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (asyncpg.InvalidPasswordError, "change records.password_file"),
    (asyncpg.InvalidAuthorizationSpecificationError, "change records.url, or pg_hba.conf of the server"),
    (asyncpg.InvalidCatalogNameError, "make it (createdb), or change records.url"),
    (asyncpg.InsufficientPrivilegeError, _MAKER),
)
