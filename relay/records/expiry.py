"""The loop that deletes expired rows, for as long as the relay runs.

Rules. Nothing that fails in one run ends the loop: it is counted, reported, and tried again after the next
interval. Of several processes on one store one deletes; the others find it busy and try again when its lease
would have ended: it may have died, and it may have been this one before a restart.
Beside the runs somebody looks how far behind they are, and says of a long one how it comes along: after half
a minute, then after twice that each time, so that a backlog of hours makes a few lines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from relay.records.errors import ExpiryBusyError, StoreError
from relay.records.store import LEASE, Store

__all__ = ["ExpiryLoop", "ExpiryMetrics"]

LOOK_EVERY_S = 15.0
FIRST_REPORT_S = 30.0
LONGEST_SILENCE_S = 600.0
"""Seconds between two reports of a long run, at most."""


class ExpiryMetrics(Protocol):
    """What the loop tells the metrics."""

    def expired(self, rows: int) -> None:
        """Count rows that were deleted."""

    def expiry_lag(self, seconds: float) -> None:
        """Set for how long the oldest row that has expired and is still there is due; 0: there is none."""

    def expiry_run(self, finished_at: float, seconds: float) -> None:
        """Keep when the last run that succeeded ended (seconds since the epoch) and how long it took."""

    def record_error(self) -> None:
        """Count a failure of the store."""


class ExpiryLoop:
    """Runs `Store.expire` at once, and then `interval` seconds after each run has ended.

    `clock` gives the time, aware, that rows are compared with. `on_run` is told of each run that was ours:
    rows deleted, seconds; `on_error` of each that failed: why. While a run is long, `on_progress` is told
    the rows deleted so far, the seconds that took and the lag in seconds (see `ExpiryMetrics.expiry_lag`);
    `on_behind` instead, once the run takes longer than `interval`: then rows may expire faster than they go.
    """

    def __init__(
        self,
        store: Store,
        metrics: ExpiryMetrics,
        interval: float,
        batch_size: int,
        clock: Callable[[], datetime],
        *,
        on_run: Callable[[int, float], None],
        on_error: Callable[[Exception], None],
        on_progress: Callable[[int, float, float], None],
        on_behind: Callable[[int, float, float], None],
        look_every: float = LOOK_EVERY_S,
        busy_pause: float = LEASE.total_seconds(),
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._interval = interval
        self._batch_size = batch_size
        self._clock = clock
        self._on_run = on_run
        self._on_error = on_error
        self._on_progress = on_progress
        self._on_behind = on_behind
        self._look_every = look_every
        self._busy_pause = busy_pause
        self._run: _Run | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False

    def start(self) -> None:
        """Start the loop; call it once, in the event loop that the store was opened in."""
        self._tasks = [
            asyncio.create_task(self._run_again_and_again(), name="expiry"),
            asyncio.create_task(self._look_again_and_again(), name="expiry lag"),
        ]

    async def stop(self) -> None:
        """End the loop. A batch that is under way is finished, the rest is left for the next start."""
        if not self._tasks:
            return
        self._ending = True
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._tasks = []

    async def _run_again_and_again(self) -> None:
        while True:
            busy = not await self.run_once()
            if self._ending:  # the store failed as the run was cancelled, and that is what came out of it
                return
            await asyncio.sleep(min(self._interval, self._busy_pause) if busy else self._interval)

    async def run_once(self) -> bool:
        """Delete what has expired by now; False if another is at it. Raises nothing but cancellation."""
        self._run = run = _Run(time.monotonic(), FIRST_REPORT_S)
        try:
            await self._store.expire(self._clock(), self._batch_size, on_batch=self._deleted)
        except ExpiryBusyError:
            return False
        except Exception as error:  # whatever it is, rows must go on expiring
            self._metrics.record_error()
            self._on_error(error)
            return True
        finally:
            self._run = None
        seconds = time.monotonic() - run.begun
        self._metrics.expiry_run(self._clock().timestamp(), seconds)
        await self.look()
        self._on_run(run.rows, seconds)
        return True

    def _deleted(self, rows: int) -> None:
        self._metrics.expired(rows)
        if self._run is not None:
            self._run.rows += rows

    async def _look_again_and_again(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._look_every)

    async def look(self) -> None:
        """See how far behind we are. Raises nothing but cancellation."""
        try:
            lag = await self._store.expiry_lag(self._clock())
        except StoreError:
            return  # the next run says why
        except Exception as error:
            self._on_error(error)
            return
        self._metrics.expiry_lag(lag)
        run = self._run
        if run is None:
            return
        seconds = time.monotonic() - run.begun
        if seconds >= run.next_report:
            run.next_report = min(run.next_report * 2, run.next_report + LONGEST_SILENCE_S)
            tell = self._on_behind if seconds > self._interval else self._on_progress
            tell(run.rows, seconds, lag)


@dataclass(slots=True)
class _Run:
    """The run that is under way."""

    begun: float
    next_report: float
    rows: int = 0
