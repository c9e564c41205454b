"""The recorder: makes rows durable before anyone is told that their message was accepted.

What it keeps are entries: rows of accepted messages, doubts, and the ends of doubts, all on the same way and
in the order in which they were given; "row" below stands for each of them.

Group commit: while one commit is in flight the next batch collects. No timer, no artificial delay; alone, a
row is committed at once.

Rules:
- A row goes to the store; when the store fails or does not answer in time, to the spool; when that fails too,
  in full to the log, and new mail is refused until rows can be kept again. Whoever waits for a row is
  released in each case: its message was accepted, and an error now would make a duplicate.
- Once a row went to the spool all that follow go there, and the spool is replayed in order. The replay runs
  beside the message path; only the last, short step holds it, for as long as a commit.
- There is at most one `write` in the store at any time. One that is late is left to finish (the store is
  idempotent by `task_id`), and nothing else is asked of the store until it has.
- The spool's calls block, so they run in one thread of their own, in order.
- Before the end of data of a message goes up its row is promised a place in the reserve of the spool, disk
  space taken ahead, so that a full disk cannot come between an acceptance and its row. More is taken as
  soon as half of it is promised, and where that fails it is tried again every second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

from relay.records.errors import RejectedRecordError, StoreError
from relay.records.model import Entry, Record, Settled
from relay.records.spool import Spool, SpoolError, encode

__all__ = ["MAX_BATCH", "USUAL_PLACE", "RecordWriter", "Recorder", "RecorderMetrics"]

MAX_BATCH: Final = 500
"""Rows in one commit, and in one step of a replay."""

USUAL_PLACE: Final = 16 * 1024
"""Octets of the reserve for a usual message; when there is less to give, new mail is refused."""

_REPLAY_TIMEOUT_S: Final = 60.0  # nobody waits for a replay: a slow store may take its time
_SPOOL_TIMEOUT_S: Final = 30.0  # a disk that does not answer for so long has failed
_LONGEST_PAUSE: Final = 50  # times the first pause between two probes of a store that is away
_HELD_ROWS: Final = 1000  # lost rows that are tried again, beside the log
_LARGEST_RESERVE: Final = 256 * 1024 * 1024  # octets; no promises beyond it, however much disk there is
_RESERVE_PAUSE_S: Final = 1.0  # between two attempts to take disk space

_log: Final = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class RecordWriter(Protocol):
    """What the recorder needs of a store."""

    async def write(self, entries: Sequence[Entry], /) -> None:
        """Commit `entries` in one durable transaction, idempotent by task_id."""


class RecorderMetrics(Protocol):
    """What the recorder counts."""

    def row_recorded(self, task_type: str, /) -> None:
        """Count a row that is durable, in the store or the spool, once."""

    def committed(self, rows: int, seconds: float, /) -> None:
        """Observe one commit of the store."""

    def record_error(self) -> None:
        """Count a row that the store rejected, that only the log has, or that could not be read back."""

    def records_pending(self, rows: int, /) -> None:
        """Set the number of rows that are not durable yet."""

    def records_spooled(self, rows: int, /) -> None:
        """Set the number of rows in the spool."""

    def records_reserve(self, octets: int, /) -> None:
        """Set the disk space that is taken ahead for rows and not written yet, in octets."""


class Recorder:
    """Keeps rows: `store` first, `spool` when the store is away.

    `commit_timeout` is in seconds, for a whole batch. `probe_pause` is the time in seconds until a store that
    is away is tried again; it doubles with each try, up to fifty times that. `log_lost` writes a full row to
    the log: it is called for each row that neither takes. With `refuse_while_away` new mail is refused while
    the store is away, although the spool could keep its rows. The caller closes store and spool, after
    `close`.
    """

    def __init__(
        self,
        store: RecordWriter,
        spool: Spool,
        metrics: RecorderMetrics,
        *,
        commit_timeout: float,
        log_lost: Callable[[Entry], None],
        refuse_while_away: bool = False,
        probe_pause: float = 0.1,
    ) -> None:
        self._store = store
        self._spool = spool
        self._metrics = metrics
        self._commit_timeout = commit_timeout
        self._log_lost = log_lost
        self._refuse_while_away = refuse_while_away
        self._probe_pause = probe_pause
        # The batch that collects: rows, and those who wait for them, in the same order.
        self._rows: list[Entry] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._wake = asyncio.Event()
        self._turn = asyncio.Lock()  # held for each batch, and for the step that goes back to the store
        self._closing = False
        self._hurry: asyncio.Future[None]  # done: do not wait for the store any longer; made by `start`
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer: asyncio.Task[None] | None = None
        self._replayer: asyncio.Task[None] | None = None
        # The store's side.
        self._away: str | None = None  # why rows go to the spool
        self._in_store: asyncio.Task[StoreError | None] | None = None  # in flight, or late
        self._commit_seconds = 0.0  # how long the last one took
        self._carried: list[Entry] = []  # read from the spool, not yet taken by the store
        # The spool's side.
        self._spooling = ThreadPoolExecutor(1, "spool")
        self._stuck: asyncio.Future[Any] | None = None  # a call that the disk has not answered in time
        self._spool_failure: str | None = None
        self._held: list[Entry] = []  # in the log only; tried again
        self._short: str | None = None  # why the reserve is not as large as it should be
        self._wanted = 0  # octets that the reserve should have; 0: its usual size
        self._provider: asyncio.Task[None] | None = None

    def follow(self, *, commit_timeout: float, refuse_while_away: bool) -> None:
        """Go on with other values, from the next batch on."""
        self._commit_timeout = commit_timeout
        self._refuse_while_away = refuse_while_away

    def start(self) -> None:
        """Begin to keep rows, and replay what an earlier process left in the spool. Needs a running loop."""
        self._hurry = asyncio.get_running_loop().create_future()
        self._metrics.records_spooled(self._spool.rows)
        self._metrics.records_reserve(self._spool.reserve.free)
        if self._spool.shortage is not None:
            self._fall_short(self._spool.shortage)
            self._see_to_reserve()
        if self._spool.rows:
            self._go_away(f"{self._spool.rows} rows wait in the spool", pause=0.0)
        self._writer = asyncio.create_task(self._write_batches(), name="recorder")

    def record(self, entry: Entry) -> asyncio.Future[None]:
        """Take the entry at once, so that entries are kept in the order of the calls.

        What is returned is done once the entry is durable, or is in the log because neither store nor spool
        took it. It never raises; to cancel it does not take the entry back.
        """
        if self._loop is None:  # asked for once: it costs a system call (CPython 3.11)
            self._loop = asyncio.get_running_loop()
        kept: asyncio.Future[None] = self._loop.create_future()
        if self._writer is None or self._writer.done():
            self._lose([entry])
            kept.set_result(None)
            return kept
        self._rows.append(entry)
        self._waiting.append(kept)
        self._wake.set()
        return kept

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

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, or None while rows can be kept."""
        if self._away is not None and self._spool_failure is not None:
            return f"{self._away}; {self._spool_failure}"
        if self._away is not None and self._refuse_while_away:
            return self._away
        reserve = self._spool.reserve
        if self._short is not None and reserve.free - reserve.promised < USUAL_PLACE:
            return f"no disk space to take ahead: {self._short}"
        return None

    def away(self) -> str | None:
        """Return why rows go to the spool, or None while the store takes them."""
        return self._away

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - the bound is the promise
        """Make everything pending durable within `timeout` seconds: in the store, else in the spool.

        The store has the first half of the time; rows that nothing took in the whole of it go to the log.
        Rows that come later go to the log, too. A second call does nothing.
        """
        if self._closing:
            return
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        self._closing = True
        self._wake.set()
        for task in (self._replayer, self._provider):
            if task is not None:
                task.cancel()
        if self._writer is not None:
            await asyncio.wait((self._writer,), timeout=timeout / 2)
            if not self._writer.done():
                self._hurry.set_result(None)
                await asyncio.wait((self._writer,), timeout=max(0.0, end - loop.time()))
                self._writer.cancel()
                await asyncio.wait((self._writer,))  # a cancelled writer waits for nothing more
        if self._in_store is not None:
            self._in_store.cancel()
            await asyncio.wait((self._in_store,), timeout=max(0.0, end - loop.time()))
        idle = loop.run_in_executor(self._spooling, _idle)  # behind what the spool still has to do
        await asyncio.wait((idle,), timeout=max(0.0, end - loop.time()))
        self._spooling.shutdown(wait=False)

    # ---- the message path

    async def _write_batches(self) -> None:
        rows: list[Entry] = []
        waiting: list[asyncio.Future[None]] = []
        try:
            while True:
                while not self._rows:
                    if self._closing:
                        return
                    self._wake.clear()
                    await self._wake.wait()
                async with self._turn:
                    rows, waiting = self._take_batch()
                    self._metrics.records_pending(len(rows) + len(self._rows))
                    try:
                        await self._keep(rows)
                    except Exception:
                        _log.exception("unforeseen error: %d rows go to the log", len(rows))
                        self._lose(rows)
                    _release(waiting)
                    rows, waiting = [], []
                    self._metrics.records_pending(len(self._rows))
        finally:  # cancelled: what is left has had its time
            self._lose(rows + self._rows)
            _release(waiting + self._waiting)
            self._rows, self._waiting = [], []

    def _take_batch(self) -> tuple[list[Entry], list[asyncio.Future[None]]]:
        rows, waiting = self._rows, self._waiting
        self._rows, self._waiting = rows[MAX_BATCH:], waiting[MAX_BATCH:]
        return rows[:MAX_BATCH], waiting[:MAX_BATCH]

    async def _keep(self, rows: list[Entry]) -> None:
        if self._away is None:
            rows = await self._commit(rows, self._commit_timeout, first_time=True)
        if rows:
            await self._spool_rows(rows)

    async def _spool_rows(self, rows: Sequence[Entry]) -> None:
        try:
            spooled = await self._in_thread(self._append, rows)
        except SpoolError as error:
            if self._spool_failure is None:
                _log.error("rows can not be kept, new mail is refused: %s; %s", self._away, error)
            self._spool_failure = str(error)
            self._top_up()
            self._lose(rows)
            self._held += rows[: max(0, _HELD_ROWS - len(self._held))]
            return
        self._spool_works()
        self._top_up()
        self._count(spooled)
        if self._held:  # a doubt that would come behind its own end, and stay
            ended = {row.task_id for row in spooled if isinstance(row, Settled)}
            self._held = [row for row in self._held if row.task_id not in ended]
        if len(spooled) < len(rows):
            kept = {id(row) for row in spooled}
            self._lose([row for row in rows if id(row) not in kept])

    def _append(self, rows: Sequence[Entry]) -> list[Entry]:
        """Return the rows that are in the spool: all but those that cannot be written as JSON."""
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

    def _count(self, rows: Sequence[Entry]) -> None:
        """Count rows that have become durable for the first time; a message in doubt has none."""
        for row in rows:
            if isinstance(row, Record):
                self._metrics.row_recorded(row.task_type)

    def _lose(self, rows: Sequence[Entry]) -> None:
        for row in rows:
            self._metrics.record_error()
            try:
                self._log_lost(row)
            except Exception:  # whoever waits must be released all the same
                _log.exception("row %s could not even be logged", row.task_id)

    # ---- the store

    async def _commit(self, rows: list[Entry], seconds: float, *, first_time: bool) -> list[Entry]:
        """Return the rows that the store did not take, in order; what it rejects is set aside.

        `seconds` bounds the whole. A batch that holds a rejected row is halved until that row is alone.
        """
        end = asyncio.get_running_loop().time() + seconds
        batches = [rows]  # the next one last
        while batches:
            batch = batches.pop()
            try:
                await self._write(batch, end)
            except RejectedRecordError as error:
                if len(batch) == 1:
                    await self._set_aside(batch[0], error)
                else:
                    half = len(batch) // 2
                    batches += [batch[half:], batch[:half]]
            except StoreError as error:
                self._go_away(str(error), pause=self._probe_pause)
                return [row for left in (batch, *reversed(batches)) for row in left]
            else:
                if first_time:
                    self._count(batch)
        return []

    async def _write(self, rows: list[Entry], end: float) -> None:
        """Write within the time left until `end` (the loop's clock); raise StoreError."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        write = self._in_store = loop.create_task(self._written(rows), name="store write")
        waits = (write, self._hurry)
        await asyncio.wait(waits, timeout=max(0.0, end - start), return_when=asyncio.FIRST_COMPLETED)
        if not write.done():
            raise StoreError("the store did not answer in time")
        self._in_store = None
        self._commit_seconds = loop.time() - start
        failure = write.result()
        if failure is not None:
            raise failure
        self._metrics.committed(len(rows), self._commit_seconds)

    async def _written(self, rows: list[Entry]) -> StoreError | None:
        """Return the failure: a late write has nobody who would catch it."""
        try:
            await self._store.write(rows)
        except StoreError as error:
            return error
        except Exception as error:
            _log.exception("unforeseen error of the store")
            return StoreError(f"unforeseen error: {error!r}")
        return None

    async def _set_aside(self, row: Entry, error: RejectedRecordError) -> None:
        try:
            line = encode(row, str(error))
            await self._in_thread(self._spool.set_aside, line)
        except (SpoolError, ValueError, TypeError, RecursionError) as failure:
            _log.error("the store rejects row %s (%s), not set aside: %s", row.task_id, error, failure)
            self._lose([row])
            return
        self._metrics.record_error()
        _log.error("the store rejects row %s (%s): see %s", row.task_id, error, self._spool.rejected_file)

    def _go_away(self, reason: str, *, pause: float) -> None:
        """From now on rows go to the spool; see to the way back."""
        if self._away is None:
            _log.warning("rows go to the spool: %s", reason)
        self._away = reason
        if not self._closing and (self._replayer is None or self._replayer.done()):
            self._replayer = asyncio.create_task(self._bring_back(pause), name="spool replay")

    # ---- the way back

    async def _bring_back(self, pause: float) -> None:
        """Replay the spool until the store has everything and rows go there again."""
        while True:
            await asyncio.sleep(pause)
            try:
                if await self._catch_up():
                    _log.warning("rows go to the store again")
                    return
            except SpoolError as error:
                _log.error("replay: %s", error)
            except Exception:
                _log.exception("unforeseen error in the replay")
            pause = min(max(pause * 2, self._probe_pause), self._probe_pause * _LONGEST_PAUSE)

    async def _catch_up(self) -> bool:
        """Return whether the store has all that waited and takes rows again."""
        if self._held and self._spool_failure is not None:
            await self._try_spool_again()
        if not await self._late_write_ended():
            return False
        probed = False
        while self._rows_wait():
            if not await self._replay_batch(_REPLAY_TIMEOUT_S):
                return False
            probed = True
            if self._spool.rows <= MAX_BATCH and not self._held:
                break
        if self._commit_seconds >= self._commit_timeout:
            return False  # it works, but too slowly for those who wait; rows that come show when it is quick
        async with self._turn:
            while self._rows_wait():  # those that came meanwhile: no more than two batches
                if not probed or not await self._replay_batch(self._commit_timeout):
                    return False
            self._away = self._spool_failure = None
        return True

    def _rows_wait(self) -> bool:
        return bool(self._carried or self._spool.rows or self._held)

    async def _try_spool_again(self) -> None:
        """Rows that are only in the log are the probe: lifts the refusal when the spool takes them."""
        async with self._turn:
            held, self._held = self._held, []
            try:
                spooled = await self._in_thread(self._append, held)
            except SpoolError as error:
                self._spool_failure = str(error)
                self._held = held
                return
            self._spool_works()
            self._count(spooled)

    async def _replay_batch(self, seconds: float) -> bool:
        """Carry the oldest rows to the store; return whether it took them."""
        if not self._carried and not self._spool.rows:
            held, self._held = self._held, []
            self._held = await self._commit(held, seconds, first_time=True) + self._held
            return not self._held
        if not self._carried:
            batch = await self._in_thread(self._spool.read, MAX_BATCH)
            for _ in range(batch.corrupt):
                self._metrics.record_error()
            self._carried = batch.records
        self._carried = await self._commit(self._carried, seconds, first_time=False)
        if self._carried:
            return False
        try:
            await self._in_thread(self._spool.forget)
        finally:  # the rows are done with, even if their file could not be removed
            self._metrics.records_spooled(self._spool.rows)
            self._top_up()
        return True

    async def _late_write_ended(self) -> bool:
        if self._in_store is None:
            return True
        await asyncio.wait((self._in_store,), timeout=_REPLAY_TIMEOUT_S)
        if not self._in_store.done():
            self._in_store.cancel()  # seen to end, or not, by the next probe
            return False
        self._in_store = None
        return True

    # ---- the reserve

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

    # ---- the spool's thread

    def _spool_works(self) -> None:
        if self._spool_failure is not None:
            _log.warning("the spool takes rows again")
        self._spool_failure = None
        self._metrics.records_spooled(self._spool.rows)

    async def _in_thread(self, call: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Run a call of the spool in its thread; raise SpoolError also when the disk does not answer."""
        if self._stuck is not None and not self._stuck.done():
            raise SpoolError(f"spool {self._spool.directory}: the disk does not answer")
        future = asyncio.get_running_loop().run_in_executor(self._spooling, call, *arguments)
        try:
            await asyncio.wait((future,), timeout=_SPOOL_TIMEOUT_S)
        except asyncio.CancelledError:
            future.add_done_callback(_retrieve)
            raise
        if not future.done():
            self._stuck = future
            future.add_done_callback(_retrieve)
            raise SpoolError(f"spool {self._spool.directory}: no answer within {_SPOOL_TIMEOUT_S:g} s")
        return future.result()


def _release(waiting: Sequence[asyncio.Future[None]]) -> None:
    for kept in waiting:
        if not kept.done():  # else its caller was cancelled
            kept.set_result(None)


def _idle() -> None:
    """Show that the thread has come so far."""


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take the exception of a call that nobody waits for any longer."""
    future.exception()
