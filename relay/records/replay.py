"""Carries rows from a spool into the store while no relay does: when asked to, and to the end.

Rules: a row leaves the spool once the store has it, or once it is in `rejected.jsonl` because the store works
and will never take it. The store is idempotent by `task_id`, so whatever is cut short can be done again.
"""

from __future__ import annotations

import fcntl
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from relay.records.aside import append_line, take_away
from relay.records.errors import RejectedRecordError
from relay.records.model import Entry
from relay.records.segment import sync_directory
from relay.records.spool import CORRUPT, REJECTED, REPLAYED, Spool, SpoolError
from relay.records.spool_line import CorruptLineError, UnknownRowError, decode, encode

__all__ = ["Carried", "Progress", "replay", "replay_rejected"]

_BATCH = 500

Progress = Callable[[int], None]
"""Is told, now and then, how many rows are done with."""


class Carried(NamedTuple):
    """Rows that the store has now, rows that it has rejected, lines that could not be read."""

    rows: int = 0
    rejected: int = 0
    corrupt: int = 0

    def __add__(self, other: object) -> Carried:
        if not isinstance(other, Carried):
            return NotImplemented
        return Carried(self.rows + other.rows, self.rejected + other.rejected, self.corrupt + other.corrupt)


class Store(Protocol):
    """What takes the rows."""

    def write(self, entries: Sequence[Entry], /) -> Awaitable[None]:
        """Commit `entries`, idempotent by task_id; raises StoreError, or RejectedRecordError."""


async def replay(spool: Spool, store: Store, on_progress: Progress) -> Carried:
    """Carry everything that waits in the spool; raise StoreError or SpoolError, what is done stays done."""
    carried = Carried()
    while spool.rows:
        batch = spool.read(_BATCH)
        rejected = await _carry(store, batch.records, lambda row, why: spool.set_aside(encode(row, why)))
        spool.forget()
        carried += Carried(len(batch.records) - rejected, rejected, batch.corrupt)
        on_progress(sum(carried))
    return carried


async def replay_rejected(directory: Path, store: Store, on_progress: Progress) -> Carried:
    """Offer the rows in `rejected.jsonl` to the store again; what it rejects again goes back there.

    Works beside a relay that runs, which goes on with a new file. Raises StoreError or SpoolError; what was
    not done then is done by the next call.
    """
    rejected, taken = directory / REJECTED, directory / REPLAYED
    carried = Carried()
    try:
        if taken.exists():  # an earlier call was cut short
            carried += await _replay_file(taken, directory, store, on_progress)
        if take_away(rejected, taken):
            carried += await _replay_file(
                taken, directory, store, lambda done: on_progress(sum(carried) + done)
            )
    except OSError as error:
        raise SpoolError(f"spool {directory}: {error.strerror or error}") from error
    return carried


async def _replay_file(taken: Path, directory: Path, store: Store, on_progress: Progress) -> Carried:
    def put_back(row: Entry, why: str) -> None:
        append_line(directory / REJECTED, encode(row, why))

    carried = Carried()
    with taken.open("r+b") as file:
        try:
            # Another kind of lock than that of a moment, which a relay may be waiting for.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolError(f"spool {directory}: another command is replaying the rejected rows") from None
        while chunk := list(islice(file, _BATCH)):
            rows = []
            for line in chunk:
                whole = line if line.endswith(b"\n") else line + b"\n"
                try:
                    rows.append(decode(line))
                except UnknownRowError:
                    append_line(directory / REJECTED, whole)
                    carried += Carried(rejected=1)
                except CorruptLineError:
                    append_line(directory / CORRUPT, whole)
                    carried += Carried(corrupt=1)
            refused = await _carry(store, rows, put_back)
            carried += Carried(len(rows) - refused, refused)
            on_progress(sum(carried))
        taken.unlink()  # noqa: ASYNC240 - a command, in whose loop nothing else runs
    sync_directory(directory)
    return carried


async def _carry(store: Store, rows: Sequence[Entry], put_by: Callable[[Entry, str], None]) -> int:
    """Write the rows; halve a batch that holds a rejected one until that is alone. Return how many were."""
    rejected = 0
    batches = [rows] if rows else []
    while batches:
        batch = batches.pop()
        try:
            await store.write(batch)
        except RejectedRecordError as error:
            if len(batch) == 1:
                put_by(batch[0], str(error))
                rejected += 1
            else:
                half = len(batch) // 2
                batches += [batch[half:], batch[:half]]
    return rejected
