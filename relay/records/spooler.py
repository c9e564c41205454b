"""The spool as the event loop sees it: its calls in a thread of their own, and disk space taken ahead.

Rules:
- The spool's calls block, so they run in one thread, in order. A disk that does not answer in time has
  failed.
- Before the end of data of a message goes up its row is promised a place in the reserve of the spool, disk
  space taken ahead, so that a full disk cannot come between an acceptance and its row. More is taken as
  soon as half of it is promised, and where that fails it is tried again every second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

from relay.records.model import Entry
from relay.records.spool import BATCH_SIZE, Batch, Spool, SpoolError
from relay.records.spool_line import encode

__all__ = ["USUAL_PLACE", "Spooler", "SpoolerMetrics"]

USUAL_PLACE: Final = 16 * 1024
"""Octets of the reserve for a usual message; when there is less to give, new mail is refused."""

_ANSWER_TIMEOUT_S: Final = 30.0  # a disk that does not answer for so long has failed
_LARGEST_RESERVE: Final = 256 * 1024 * 1024  # octets; no promises beyond it, however much disk there is
_RESERVE_PAUSE_S: Final = 1.0  # between two attempts to take disk space

_log: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class SpoolerMetrics(Protocol):
    """What is counted here."""

    def records_spooled(self, rows: int, /) -> None:
        """Set the number of rows in the spool."""

    def records_reserve(self, octets: int, /) -> None:
        """Set the disk space that is taken ahead for rows and not written yet, in octets."""


class Spooler:
    """The spool and its thread, between `start` and `close`; the caller closes the spool itself."""

    def __init__(self, spool: Spool, metrics: SpoolerMetrics) -> None:
        self._spool = spool
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(1, "spool")
        self._stuck: asyncio.Future[Any] | None = None  # a call that the disk has not answered in time
        self._short: str | None = None  # why the reserve is not as large as it should be
        self._wanted = 0  # octets that the reserve should have; 0: its usual size
        self._provider: asyncio.Task[None] | None = None
        self._closing = False
        self.failure: str | None = None
        """Why rows could not be appended the last time; None: they could."""

    def start(self) -> None:
        """Show what there is, and see to the reserve. Needs a running loop.

        The thread begins now, not with the first row: it may be that there are no more threads then.
        """
        asyncio.get_running_loop().run_in_executor(self._executor, _idle)
        self._metrics.records_spooled(self._spool.rows)
        self._metrics.records_reserve(self._spool.reserve.free)
        if self._spool.shortage is not None:
            self._fall_short(self._spool.shortage)
            self._see_to_reserve()

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the bound is the promise
        """Wait for at most `timeout` seconds until the thread has done what it was asked for.

        To be called behind `provide_no_more`.
        """
        try:
            idle = asyncio.get_running_loop().run_in_executor(self._executor, _idle)
            await asyncio.wait((idle,), timeout=timeout)
        finally:
            self._executor.shutdown(wait=False)

    # ---- rows

    @property
    def rows(self) -> int:
        """Rows in the spool."""
        return self._spool.rows

    def fits(self, rows: int) -> bool:
        """Whether a `read` of so many rows finds all that there are."""
        return self._spool.rows <= rows and self._spool.size <= BATCH_SIZE

    async def append(self, rows: Sequence[Entry]) -> list[Entry]:
        """Make rows durable; return those that are, which is all but those that cannot be written as JSON.

        Raises SpoolError, of which `failure` has the text until rows are appended again.
        """
        try:
            spooled = await self._in_thread(self._append, rows)
        except SpoolError as error:
            self.failure = str(error)
            self._top_up()
            raise
        if self.failure is not None:
            _log.warning("the spool takes rows again")
        self.failure = None
        self._metrics.records_spooled(self._spool.rows)
        self._top_up()
        return spooled

    def _append(self, rows: Sequence[Entry]) -> list[Entry]:
        lines, spooled = [], []
        for row in rows:
            try:
                lines.append(encode(row))
            except (ValueError, TypeError, RecursionError) as error:
                _log.error("row %s does not fit into the spool: %s", row.task_id, error)
            else:
                spooled.append(row)
        if lines:
            self._spool.append(lines)
        return spooled

    async def read(self, rows: int) -> Batch:
        """Read the oldest rows, at most so many; raises SpoolError."""
        return await self._in_thread(self._spool.read, rows)

    async def forget(self) -> None:
        """Remove what was read last: it is kept elsewhere, also where that raises SpoolError."""
        try:
            await self._in_thread(self._spool.forget)
        finally:
            self._metrics.records_spooled(self._spool.rows)
            self._top_up()

    async def set_aside(self, row: Entry, reason: str) -> Path:
        """Keep a row that the store rejects in a file for people to look at, and return that.

        Raises SpoolError, or ValueError, TypeError or RecursionError for what JSON cannot carry.
        """
        await self._in_thread(self._spool.set_aside, encode(row, reason))
        return self._spool.rejected_file

    async def _in_thread(self, call: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Run a call of the spool in its thread; raise SpoolError also when the disk does not answer."""
        if self._stuck is not None and not self._stuck.done():
            raise SpoolError(f"spool {self._spool.directory}: the disk does not answer")
        future = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        try:
            await asyncio.wait((future,), timeout=_ANSWER_TIMEOUT_S)
        except asyncio.CancelledError:
            future.add_done_callback(_retrieve)
            raise
        if not future.done():
            self._stuck = future
            future.add_done_callback(_retrieve)
            raise SpoolError(f"spool {self._spool.directory}: no answer within {_ANSWER_TIMEOUT_S:g} s")
        return future.result()

    # ---- the reserve

    def promise(self, octets: int) -> bool:
        """Keep a place of so many octets for a row to come; return False where there is none now.

        Whoever was promised one gives it back with `release`, once its rows are durable or there are none.
        """
        reserve = self._spool.reserve
        granted = reserve.promise(octets)
        wanted = reserve.promised if granted else reserve.promised + octets
        if 2 * wanted > reserve.free:
            self._see_to_reserve(min(4 * wanted, _LARGEST_RESERVE))
        return granted

    def release(self, octets: int) -> None:
        """Give a promised place back."""
        self._spool.reserve.release(octets)

    @property
    def shortage(self) -> str | None:
        """Why no usual message can be promised a place now; None: one can."""
        reserve = self._spool.reserve
        if self._short is not None and reserve.free - reserve.promised < USUAL_PLACE:
            return f"no disk space to take ahead: {self._short}"
        return None

    def provide_no_more(self) -> None:
        """Take no more disk space from now on: the relay ends."""
        self._closing = True
        if self._provider is not None:
            self._provider.cancel()

    def _top_up(self) -> None:
        """Rows were written, or a segment has gone: have the reserve made up for it."""
        self._metrics.records_reserve(self._spool.reserve.free)
        if not self._spool.complete:
            self._see_to_reserve()

    def _see_to_reserve(self, octets: int = 0) -> None:
        """Have disk space taken ahead, in the spool's thread, and again and again until it is had."""
        self._wanted = max(self._wanted, octets)
        if not self._closing and (self._provider is None or self._provider.done()):
            self._provider = asyncio.get_running_loop().create_task(self._provide(), name="spool reserve")

    async def _provide(self) -> None:
        while True:
            wanted, self._wanted = self._wanted, 0
            try:
                await self._in_thread(self._spool.provide, wanted)
            except SpoolError as error:
                self._fall_short(str(error))
            else:
                if self._short is not None:
                    _log.warning("the reserve is whole again")
                self._short = None
            self._metrics.records_reserve(self._spool.reserve.free)
            if self._short is not None:
                await asyncio.sleep(_RESERVE_PAUSE_S)
            elif not self._wanted:
                return

    def _fall_short(self, reason: str) -> None:
        if self._short is None:
            _log.error("no disk space to take ahead for rows: %s", reason)
        self._short = reason


def _idle() -> None:
    """Show that the thread has come so far."""


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take the exception of a call that nobody waits for any longer."""
    future.exception()
