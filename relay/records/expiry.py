"""The loop that deletes expired rows, for as long as the relay runs.

Rules. Nothing that fails in one run ends the loop: it is counted, reported, and tried again after the next
interval. Of several processes on one store one deletes; the others find it busy and wait for their next turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from relay.records.errors import ExpiryBusyError
from relay.records.store import Store

__all__ = ["ExpiryLoop", "ExpiryMetrics"]


class ExpiryMetrics(Protocol):
    """What the loop tells the metrics."""

    def expired(self, rows: int) -> None:
        """Count rows that were deleted."""

    def expiry_run(self, finished_at: float, seconds: float) -> None:
        """Keep when the last run that succeeded ended (seconds since the epoch) and how long it took."""

    def record_error(self) -> None:
        """Count a failure of the store."""


class ExpiryLoop:
    """Runs `Store.expire` at once, and then `interval` seconds after each run has ended.

    `clock` gives the time, aware, that rows are compared with. `on_run` is told of each run that was ours:
    rows deleted, seconds; `on_error` of each that failed: why.
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
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._interval = interval
        self._batch_size = batch_size
        self._clock = clock
        self._on_run = on_run
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the loop; call it once, in the event loop that the store was opened in."""
        self._task = asyncio.create_task(self._run(), name="expiry")

    async def stop(self) -> None:
        """End the loop. A batch that is under way is finished, the rest is left for the next start."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None

    async def _run(self) -> None:
        while True:
            await self.run_once()
            await asyncio.sleep(self._interval)

    async def run_once(self) -> None:
        """Delete what has expired by now. Raises nothing but cancellation."""
        begun = time.monotonic()
        try:
            rows = await self._store.expire(self._clock(), self._batch_size, on_batch=self._metrics.expired)
        except ExpiryBusyError:
            return
        except Exception as error:  # whatever it is, rows must go on expiring
            self._metrics.record_error()
            self._on_error(error)
            return
        seconds = time.monotonic() - begun
        self._metrics.expiry_run(self._clock().timestamp(), seconds)
        self._on_run(rows, seconds)
