"""The records of one relay: what keeps them, started and stopped together, and the house that is kept.

Rules. Nothing is accepted before all of this runs: store, spool, journal, recorder. Keeping house is to
delete what expires, and to make existing rows follow the retention that holds, of all relays on the store. A
store that is away stops none of it: it goes on when the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from relay import maillog, parts
from relay.records.agreement import AGAIN_S, Agreement
from relay.records.expiry import ExpiryLoop
from relay.records.inspection import entries_waiting
from relay.records.journal import Journal
from relay.records.recorder import Recorder
from relay.records.relay_id import relay_id
from relay.records.spool import RESERVE, Spool
from relay.records.spooler import USUAL_PLACE
from relay.records.store import Store, StoreError, open_store, utc_now

if TYPE_CHECKING:
    from relay.metrics import Metrics
    from relay.records.model import Doubt, Record
    from relay.records.retention import Retention
    from relay.settings import Settings

__all__ = ["Bookkeeping"]

CLOSE_TIMEOUT = 10.0
"""Seconds that the recorder gets to make the last rows durable."""


class Bookkeeping:
    """Store, spool, journal and recorder of one relay, running between `start` and `close`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._agreement: Agreement
        self._retention: Retention | None = None  # that holds, of all relays on the store
        self._given: Retention  # what new rows get
        self._again = False  # rows were written by another one, perhaps behind those that follow already
        self._house: asyncio.Task[None] | None = None
        self._taken_over: set[asyncio.Future[None]] = set()
        self.left_over: list[Record | Doubt] = []
        """By the process before, and not in the store yet, as far as limits look back."""
        self.store: Store
        self.spool: Spool
        self.journal: Journal
        self.recorder: Recorder
        self.expiry: ExpiryLoop

    async def start(self, settings: Settings) -> None:
        """Have all of it run; raises StoreError, SpoolError or OSError, and `close` ends what did start."""
        records = settings.records
        self._given = parts.retention(settings)
        self.store = await open_store(records.connect_url, self._given, later=True, relay=settings.relay_name)
        connections = sum(upstream.max_connections for upstream in settings.upstreams)
        self.spool = Spool(records.spool, max(RESERVE, connections * USUAL_PLACE))
        self.journal = Journal(self.spool.directory, connections)
        self.recorder = Recorder(
            self.store,
            self.spool,
            self._metrics,
            commit_timeout=records.commit_timeout,
            log_lost=lambda entry: maillog.row_lost(entry, "neither store nor spool took it"),
            refuse_while_away=records.when_unavailable == "refuse",
        )
        if settings.limits:
            since = utc_now() - timedelta(seconds=max(limit.per for limit in settings.limits))
            self.left_over += await asyncio.to_thread(entries_waiting, self.spool.directory, since)
        identity = await asyncio.to_thread(relay_id, self.spool.directory)
        self._agreement = Agreement(
            self.store,
            f"{settings.relay_name}/{identity[:8]}",
            self._given,
            clock=utc_now,
            on_differ=maillog.retention_differs,
        )
        await self._agree()
        self._again = False  # no row has been written yet
        self.recorder.start()
        self._take_over_doubts()
        self._begin_housekeeping(settings)

    def follow(self, settings: Settings) -> None:
        """Record by these settings from now on."""
        self.recorder.follow(
            commit_timeout=settings.records.commit_timeout,
            refuse_while_away=settings.records.when_unavailable == "refuse",
        )

    def refusal(self) -> str | None:
        """Why no row can be kept, if that is so."""
        return self.recorder.refusal() or self.journal.refusal()

    def on_their_way(self) -> bool:
        """Whether there may be rows of this relay that are durable and not in the store."""
        return bool(self._taken_over) or self.recorder.away() is not None

    async def close(self) -> None:
        """Make the last rows durable and close everything that did start, the store last."""
        try:
            if hasattr(self, "recorder"):
                await self.recorder.close(CLOSE_TIMEOUT)
        finally:  # whatever has failed, no thread of the store keeps the process
            try:
                await self._close_files()
            finally:
                if hasattr(self, "store"):
                    await self.store.close()

    async def _close_files(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
        if hasattr(self, "spool"):
            self.spool.close()
        if hasattr(self, "_agreement") and self.recorder.away() is None:
            with contextlib.suppress(StoreError):  # it runs out, as it does where the store is away
                await self._agreement.leave()

    # What a process before this one has left

    def _take_over_doubts(self) -> None:
        """Keep what a process before this one has left in the journal; a slot is free once that is durable.

        What has its row in the store, or is in the spool before it, makes no entry: the store sees to that.
        """
        for slot, doubt in self.journal.found:
            maillog.found_in_journal(doubt)
            kept = self.recorder.record(doubt)
            kept.add_done_callback(partial(self._free_slot, slot))
            self.left_over.append(doubt)
            self._taken_over.add(kept)
            kept.add_done_callback(self._taken_over.discard)

    def _free_slot(self, slot: int, kept: asyncio.Future[None]) -> None:
        if not kept.cancelled():
            self.journal.free(slot)

    # Keeping house

    async def keep_house_by(self, settings: Settings) -> None:
        """Keep house by these settings from now on."""
        await self.end_housekeeping()
        self._agreement.own = parts.retention(settings)
        self._give(self._agreement.own)
        self._retention = None
        await self._agree()
        self._begin_housekeeping(settings)

    def _begin_housekeeping(self, settings: Settings) -> None:
        self.expiry = ExpiryLoop(
            self.store,
            self._metrics,
            interval=settings.expiry.interval,
            batch_size=settings.expiry.batch_size,
            clock=utc_now,
            on_run=maillog.expiry_done,
            on_error=lambda error: maillog.expiry_failed(str(error)),
            on_progress=maillog.expiry_progress,
            on_behind=maillog.expiry_behind,
        )
        self._house = asyncio.get_running_loop().create_task(self._keep_house(), name="housekeeping")

    async def end_housekeeping(self) -> None:
        """Stop it; a batch of expiry that is under way is finished."""
        if self._house is not None:
            self._house.cancel()
            await asyncio.wait((self._house,))
            await self.expiry.stop()

    async def _keep_house(self) -> None:
        """Delete what expires, for ever; make existing rows follow the retention whenever it changes."""
        followed = await self._follow_retention()
        self.expiry.start()
        while True:
            await asyncio.sleep(AGAIN_S)
            if await self._agree() or not followed:
                followed = await self._follow_retention()

    async def _agree(self) -> bool:
        """See which retention holds, ours or the longer one of another relay; return whether it changed."""
        try:
            found = await self._agreement.reach()
        except StoreError:
            return False  # while the store is away the last one holds
        before, self._retention = self._retention, found
        if before is not None and before.canonical() == found.canonical():
            return False
        if found.canonical() != self._given.canonical():
            self._give(found)
            self._again = True
        return True

    def _give(self, retention: Retention) -> None:
        """Have new rows end by this retention."""
        self._given = retention
        self.store.use_retention(retention)

    async def _follow_retention(self) -> bool:
        """Return whether the rows that exist follow the retention that holds."""
        if self._retention is None:
            return False  # others may keep rows longer, and what is deleted meanwhile is gone
        again, self._again = self._again, False
        try:
            changed = await self.store.follow_retention(again=again, on_due=maillog.retention_shortened)
        except StoreError as error:
            self._again = self._again or again
            self._metrics.record_error()
            maillog.expiry_failed(f"rows do not follow the changed retention yet: {error}")
            return False
        if changed:
            maillog.retention_changed(changed)
        return True
