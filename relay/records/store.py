"""The store: rows go in durably, follow the retention settings, and go away when they have expired.

This is the door: what a store promises, whichever database it is, and how it is opened.

Rules. A write is one transaction, and done when it is on the disk. Long work (retention, expiry) is cut
into short transactions with pauses between them, so that writes, here and in other processes on the same
database, come in between. Nobody but `open_store` knows which database a URL names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol

from relay.records.errors import (
    ExpiryBusyError,
    MissingStoreError,
    OlderStoreError,
    RejectedRecordError,
    StoreError,
)
from relay.records.model import Entry
from relay.records.retention import Retention

__all__ = [
    "ExpiryBusyError",
    "MissingStoreError",
    "OlderStoreError",
    "RejectedRecordError",
    "Store",
    "StoreError",
    "check_makeable",
    "is_postgres",
    "open_store",
    "utc_now",
]

BUSY_TIMEOUT_S = 5.0
LEASE = timedelta(seconds=60)
"""How long a run of expiry that shows no life keeps others away."""
LONGEST_LEASE = 2 * LEASE
"""What ends later was said by a clock that was wrong, and keeps nobody away."""
LEASE_RENEWAL_S = 5.0


def utc_now() -> datetime:
    """Return the time of day, aware, UTC."""
    return datetime.now(UTC)


class Store(Protocol):
    """An open store. Its methods may be called at the same time, from one event loop."""

    def write(self, entries: Sequence[Entry], /) -> Awaitable[None]:
        """Make the entries durable, all or none; one that is there already (by `task_id`) stays as it is.

        A record ends the doubt of its message if it says that there may be one (`doubted`); a doubt of a
        message that has its row, or that is settled in the same batch, is none. What is written again,
        in the order in which it was given, comes to the same.

        Raises RejectedRecordError if one of them can never be taken, StoreError if the store cannot be
        written now. A caller that is cancelled does not know: the transaction may be finished all the same.
        """

    def use_retention(self, retention: Retention) -> None:
        """Give new rows the ends of this retention; `follow_retention` does so for those that exist."""

    async def count(self) -> int:
        """Return how many rows there are."""

    async def close(self) -> None:
        """Finish what was asked for, then close. Afterwards every method raises StoreError."""

    async def follow_retention(
        self, *, again: bool = False, on_due: Callable[[int], None] | None = None
    ) -> int:
        """Make the rows that exist follow the retention settings; return how many changed.

        Nothing happens unless the settings differ from those that the rows follow, or with `again`. Before
        the first row changes, `on_due` is told how many rows will become due by it, if any. Call it before
        expiry: a run that was cut short is taken up again by the next call, and expiry waits until then.
        """

    async def expire(
        self,
        now: datetime,
        batch_size: int,
        *,
        dry_run: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> int:
        """Delete every row whose `expires_at` is not after `now`, and give the space back; return how many.

        No transaction deletes more than `batch_size` rows; each is about as long as a commit of new rows (a
        row goes with all its recipients, so one with a thousand takes longer). `on_batch` is told of each
        one's rows. With `dry_run` they are only counted. Raises ExpiryBusyError while another run, here or in
        another process, is at work.
        """

    async def say_alive(self, name: str, until: datetime) -> None:
        """Say to all who share the store that the relay of this name lives; good until then."""

    async def say_gone(self, name: str) -> None:
        """Say that it has ended, or that what was said under this name counts no more."""

    async def say_retention(self, name: str, value: str, until: datetime) -> Mapping[str, str]:
        """Say how long the relay of this name wants rows kept, good until then; return the others' words."""

    async def expiry_lag(self, now: datetime) -> float:
        """Return for how long, in seconds, the oldest row that has expired is due; 0.0 when there is none."""


def is_postgres(url: str) -> bool:
    """Whether a `records.url` names a PostgreSQL database, and not a SQLite file."""
    return url.partition(":")[0].partition("+")[0] in {"postgresql", "postgres"}


async def check_makeable(url: str) -> None:
    """Raise StoreError unless a start can make the store that is missing, as far as a look tells."""
    if is_postgres(url):
        from relay.records.postgres import database

        await database.check_makeable(url)
    else:
        from relay.records.sqlite import file

        file.check_makeable(file.path_of(url))


async def open_store(
    url: str,
    retention: Retention,
    *,
    create: bool = True,
    upgrade: bool = True,
    busy_timeout: float = BUSY_TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    later: bool = False,
    relay: str = "",
) -> Store:
    """Open the store at `url` and bring its schema to this version.

    One that does not exist is made, a file with its directory, when `create`; else MissingStoreError is
    raised. One of an older version stays as it is without `upgrade`, and OlderStoreError is raised.
    `busy_timeout`, in seconds, is how long another process's lock is waited for; `clock` gives the time,
    aware, for leases and for what is due. With `later`, a server that cannot be reached now is no error but
    for who uses the store before it can. `relay` is the name that rows get in their `data`; empty: they have
    it already, or none. Raises StoreError, in one line that names the store and what to change.
    """
    if is_postgres(url):
        from relay.records.postgres.store import PostgresStore

        return await PostgresStore.open(
            url, retention, create=create, upgrade=upgrade, later=later, relay=relay, clock=clock
        )
    from relay.records.sqlite.store import SqliteStore

    return await SqliteStore.open(
        url,
        retention,
        create=create,
        upgrade=upgrade,
        busy_timeout=busy_timeout,
        relay=relay,
        clock=clock,
    )
