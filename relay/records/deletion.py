"""The run that deletes expired rows, step by step, whichever database it is.

Rules. What is due is looked up in order, and deleted in steps with rests between them, at the pace of the
commits beside it. A run goes on only as long as its lease is its own; it ends when nothing more is due, with
the messages in doubt last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from relay.records.pacing import Commits, Pace

__all__ = ["Due", "Expired", "Lease", "delete_expired"]

Due = tuple[int, int]
"""A row that is due: its id, and the rows of all tables that go with it."""


class Expired(Protocol):
    """What has expired in one database by one moment. A step returns how many rows went, and its seconds."""

    async def next_due(self) -> Sequence[Due]:
        """Return the next rows to delete, some of them; only when those before are done with."""

    async def delete(self, keys: Sequence[int], /) -> tuple[int, float]:
        """Delete these rows, as long as the lease holds."""

    async def delete_doubts(self, rows: int, /) -> tuple[int, float]:
        """Delete messages in doubt, at most so many, as long as the lease holds."""


class Lease(Protocol):
    """What lets one run, of all processes on the database, delete."""

    async def kept(self, *, in_doubt: bool = False) -> bool:
        """Show life, now and then or if `in_doubt`; False: we were silent for so long that another did."""


async def delete_expired(
    expired: Expired,
    lease: Lease,
    commits: Commits,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
) -> int:
    """Delete it all, at most `batch_size` rows in a step; return how many messages went."""

    def went(rows: int) -> int:
        if rows and on_batch is not None:
            on_batch(rows)
        return rows

    pace = Pace()
    deleted = 0
    due: Sequence[Due] = []
    while True:
        if not due:
            due = await expired.next_due()
            if not due:
                break
        count = min(batch_size, pace.first([work for _, work in due]))
        keys = [key for key, _ in due[:count]]
        due = due[count:]
        rows, seconds = await expired.delete(keys)
        deleted += went(rows)
        if not await lease.kept(in_doubt=rows < len(keys)):
            return deleted  # the rest is the work of the one who has it
        await commits.rest(pace, seconds)
    pace = Pace()
    while True:  # the messages in doubt, which are few
        wanted = min(batch_size, pace.work)
        rows, seconds = await expired.delete_doubts(wanted)
        deleted += went(rows)
        if rows < wanted or not await lease.kept():
            return deleted
        await commits.rest(pace, seconds)
