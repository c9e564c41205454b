"""The recorder: makes rows durable before anyone is told that their message was accepted.

What it keeps are entries: rows of accepted messages, doubts, and the ends of doubts, all on the same way and
in the order in which they were given; "row" below stands for each of them.

A row's way, top to bottom: `record` takes it; `_next` makes a batch of all that have come; `_begin_write`
gives that to the store, and `_written` hears what came of it, and releases those who wait. What the store
does not take goes the long way, in a task (`_keep_elsewhere`).

Where rows go is said by `_away`: None, to the store; a reason, to the spool. `_go_away` alone turns to the
spool, and begins the way back (`_bring_back`), which alone turns to the store again, when that has all that
waited (`_catch_up`). Who has the turn, a batch or the last step of the way back, is said by `_turn_taken`:
`record` and `_take_turn` take it, `_next` passes it on.

Group commit: while one commit is in flight the next batch collects. No artificial delay; alone, a row is
committed at once. A commit is begun and ended by callbacks: with a task, a wait and a timer for it a lone
message costs an eighth more, in three turns of the event loop more (docs/benchmarks.md).

Rules:
- A row goes to the store; when the store fails or does not answer in time, to the spool; when that fails too,
  in full to the log, and new mail is refused until rows can be kept again. Whoever waits for a row is
  released in each case: its message was accepted, and an error now would make a duplicate.
- Once a row went to the spool all that follow go there, and the spool is replayed in order. The replay runs
  beside the message path; only the last, short step holds it, for as long as a commit.
- One batch, or that step, has the turn at any time. There is at most one `write` in the store: one that is
  late is left to finish (the store is idempotent by `task_id`), and nothing else is asked of the store until
  it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from relay.exhausted import exhausted
from relay.records.errors import RejectedRecordError, StoreError
from relay.records.model import Entry, Record, Settled
from relay.records.spool import Spool, SpoolError
from relay.records.spooler import Spooler, SpoolerMetrics

__all__ = ["MAX_BATCH", "RecordWriter", "Recorder", "RecorderMetrics"]

MAX_BATCH: Final = 500
"""Rows in one commit, and in one step of a replay."""

_REPLAY_TIMEOUT_S: Final = 60.0  # nobody waits for a replay: a slow store may take its time
_LONGEST_PAUSE: Final = 50  # times the first pause between two probes of a store that is away
_HELD_ROWS: Final = 1000  # lost rows that are tried again, beside the log

_log: Final = logging.getLogger(__name__)


class RecordWriter(Protocol):
    """What the recorder needs of a store."""

    def write(self, entries: Sequence[Entry], /) -> Awaitable[None]:
        """Commit `entries` in one durable transaction, idempotent by task_id."""


class RecorderMetrics(SpoolerMetrics, Protocol):
    """What the recorder counts."""

    def row_recorded(self, task_type: str, /) -> None:
        """Count a row that is durable, in the store or the spool, once."""

    def committed(self, rows: int, seconds: float, /) -> None:
        """Observe one commit of the store."""

    def record_error(self) -> None:
        """Count a row that the store rejected, that only the log has, or that could not be read back."""

    def records_pending(self, rows: int, /) -> None:
        """Set the number of rows that are not durable yet."""


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
        self._spooler = Spooler(spool, metrics)
        self._metrics = metrics
        self._commit_timeout = commit_timeout
        self._log_lost = log_lost
        self._refuse_while_away = refuse_while_away
        self._probe_pause = probe_pause
        self._loop: asyncio.AbstractEventLoop
        self._open = False  # between `start` and the end of `close`
        self._closing = False
        # The batch that collects: rows, and those who wait for them, in the same order.
        self._rows: list[Entry] = []
        self._waiting: list[asyncio.Future[None]] = []
        # The batch that has the turn.
        self._turn_taken = False
        self._turn_awaited: asyncio.Future[None] | None = None  # by the step that goes back to the store
        self._batch: list[Entry] = []
        self._batch_waiting: list[asyncio.Future[None]] = []
        self._long_way: asyncio.Task[None] | None = None
        self._drained: asyncio.Future[None]  # closing, and the turn is nobody's; made by `start`
        # The store's side.
        self._away: str | None = None  # why rows go to the spool
        self._in_store: asyncio.Future[None] | None = None  # in flight, or late
        self._awaited = False  # whether the batch waits for it
        self._begun = 0.0
        self._commit_seconds = 0.0  # how long the last one took
        self._limit: asyncio.TimerHandle | None = None
        self._hurry: asyncio.Future[None]  # done: do not wait for the store any longer; made by `start`
        # The way back.
        self._replayer: asyncio.Task[None] | None = None
        self._carried: list[Entry] = []  # read from the spool, not yet taken by the store
        self._held: list[Entry] = []  # in the log only; tried again

    def follow(self, *, commit_timeout: float, refuse_while_away: bool) -> None:
        """Go on with other values."""
        self._commit_timeout = commit_timeout
        self._refuse_while_away = refuse_while_away
        if self._limit is not None:
            self._limit.cancel()
            self._look_at_write()

    def start(self) -> None:
        """Begin to keep rows, and replay what an earlier process left in the spool. Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._hurry = self._loop.create_future()
        self._drained = self._loop.create_future()
        self._spooler.start()
        self._open = True
        if self._spooler.rows:
            self._go_away(f"{self._spooler.rows} rows wait in the spool", pause=0.0)

    def record(self, entry: Entry) -> asyncio.Future[None]:
        """Take the entry at once, so that entries are kept in the order of the calls.

        What is returned is done once the entry is durable, or is in the log because neither store nor spool
        took it. It never raises; to cancel it does not take the entry back.
        """
        if not self._open:
            self._lose([entry])
            lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            lost.set_result(None)
            return lost
        kept: asyncio.Future[None] = self._loop.create_future()
        self._rows.append(entry)
        self._waiting.append(kept)
        if not self._turn_taken:
            self._turn_taken = True
            self._loop.call_soon(self._next)  # not at once: others may come with what is read just now
        return kept

    def promise(self, octets: int) -> bool:
        """Keep a place of so many octets in the spool for a row to come; return False: there is none now.

        Whoever was promised one gives it back with `release`, once its rows are durable or there are none.
        """
        return self._spooler.promise(octets)

    def release(self, octets: int) -> None:
        """Give a promised place back."""
        self._spooler.release(octets)

    def refusal(self) -> str | None:
        """Return why new mail must be refused now, or None while rows can be kept."""
        if self._away is not None and self._spooler.failure is not None:
            return f"{self._away}; {self._spooler.failure}"
        if self._away is not None and self._refuse_while_away:
            return self._away
        return self._spooler.shortage

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
        if self._replayer is not None:
            self._replayer.cancel()
        self._spooler.provide_no_more()
        if self._turn_taken:
            await asyncio.wait((self._drained,), timeout=timeout / 2)
            if not self._drained.done():
                self._hurry.set_result(None)
                self._give_up_write()
                await asyncio.wait((self._drained,), timeout=max(0.0, end - loop.time()))
        self._open = self._awaited = False
        if self._long_way is not None and not self._long_way.done():
            self._long_way.cancel()
            await asyncio.wait((self._long_way,))  # cancelled, it waits for nothing more
        self._lose(self._batch + self._rows)  # they have had their time
        _release(self._batch_waiting + self._waiting)
        self._batch, self._batch_waiting, self._rows, self._waiting = [], [], [], []
        if self._limit is not None:
            self._limit.cancel()
        if self._in_store is not None:
            self._in_store.cancel()
            await asyncio.wait((self._in_store,), timeout=max(0.0, end - loop.time()))
        await self._spooler.close(max(0.0, end - loop.time()))

    # ---- the message path

    def _next(self) -> None:
        """Pass the turn on: to the step that goes back to the store, to the next batch, or to nobody."""
        awaited, self._turn_awaited = self._turn_awaited, None
        if awaited is not None and not awaited.done():
            awaited.set_result(None)
            return
        if not self._rows or not self._open:
            self._turn_taken = False
            if self._closing and not self._drained.done():
                self._drained.set_result(None)
            return
        self._take_batch()
        self._metrics.records_pending(len(self._batch) + len(self._rows))
        if self._away is None:
            self._begin_write()
        else:
            self._keep_otherwise(None)

    def _take_batch(self) -> None:
        rows, waiting = self._rows, self._waiting
        self._batch, self._batch_waiting = rows[:MAX_BATCH], waiting[:MAX_BATCH]
        self._rows, self._waiting = rows[MAX_BATCH:], waiting[MAX_BATCH:]

    def _begin_write(self) -> None:
        """Give the batch to the store; `_written` or `_give_up_write` follows."""
        self._begun = self._loop.time()
        try:
            write = asyncio.ensure_future(self._store.write(self._batch))
        except Exception as error:
            self._keep_otherwise(_failure(error))
            return
        self._in_store = write
        self._awaited = True
        write.add_done_callback(self._written)
        if self._limit is None:
            self._limit = self._loop.call_later(self._commit_timeout, self._look_at_write)

    def _written(self, write: asyncio.Future[None]) -> None:
        """The store has answered."""
        error = None if write.cancelled() else write.exception()
        if not self._awaited or write is not self._in_store:
            return  # it was late, and the batch has gone elsewhere
        self._awaited = False
        self._in_store = None
        self._commit_seconds = self._loop.time() - self._begun
        if error is not None or write.cancelled():
            self._keep_otherwise(_failure(error))
            return
        try:
            self._metrics.committed(len(self._batch), self._commit_seconds)
            self._count(self._batch)
        except Exception:
            self._unforeseen()
        self._end_batch()

    def _look_at_write(self) -> None:
        """See whether the write in flight is late: one timer does for all that are begun meanwhile."""
        self._limit = None
        if not self._awaited:
            return
        left = self._begun + self._commit_timeout - self._loop.time()
        if left > 0:
            self._limit = self._loop.call_later(left, self._look_at_write)
        else:
            self._give_up_write()

    def _give_up_write(self) -> None:
        """Have the batch wait for the store no longer."""
        if self._awaited:
            self._awaited = False
            self._keep_otherwise(StoreError(_LATE))

    def _end_batch(self) -> None:
        """Release those who wait, and pass the turn on."""
        _release(self._batch_waiting)
        self._batch, self._batch_waiting = [], []
        self._metrics.records_pending(len(self._rows))
        # Behind those who waited: a doubt has left the journal before its end can be durable.
        self._loop.call_soon(self._next)

    def _keep_otherwise(self, failure: StoreError | None) -> None:
        self._long_way = self._loop.create_task(self._keep_elsewhere(failure), name="recorder")

    async def _keep_elsewhere(self, failure: StoreError | None) -> None:
        """Keep the batch, which the store has failed to take; None: it was not asked, since it is away.

        Cancelled by `close` alone, which sees to what is left then.
        """
        rows = self._batch
        try:
            if isinstance(failure, RejectedRecordError):
                rows = await self._commit(rows, self._commit_timeout, first_time=True)
            elif failure is not None:
                self._go_away(str(failure), pause=self._probe_pause)
            if rows:
                await self._spool_rows(rows)
        except Exception:
            self._unforeseen()
        self._end_batch()

    def _unforeseen(self) -> None:
        _log.exception("unforeseen error: %d rows go to the log", len(self._batch))
        self._lose(self._batch)

    async def _spool_rows(self, rows: Sequence[Entry]) -> None:
        worked = self._spooler.failure is None
        try:
            spooled = await self._spooler.append(rows)
        except SpoolError as error:
            if worked:
                _log.error("rows can not be kept, new mail is refused: %s; %s", self._away, error)
            self._lose(rows)
            self._held += rows[: max(0, _HELD_ROWS - len(self._held))]
            return
        self._count(spooled)
        if self._held:  # a doubt that would come behind its own end, and stay
            ended = {row.task_id for row in spooled if isinstance(row, Settled)}
            self._held = [row for row in self._held if row.task_id not in ended]
        if len(spooled) < len(rows):
            kept = {id(row) for row in spooled}
            self._lose([row for row in rows if id(row) not in kept])

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

    # ---- the store, the long way

    async def _commit(self, rows: list[Entry], seconds: float, *, first_time: bool) -> list[Entry]:
        """Return the rows that the store did not take, in order; what it rejects is set aside.

        `seconds` bounds the whole. A batch that holds a rejected row is halved until that row is alone.
        """
        end = self._loop.time() + seconds
        batches = [rows]  # the next one last
        while batches:
            batch = batches.pop()
            try:
                await self._write(batch, end)
            except RejectedRecordError as error:
                rejected = error
            except StoreError as error:
                self._go_away(str(error), pause=self._probe_pause)
                return [row for left in (batch, *reversed(batches)) for row in left]
            else:
                if first_time:
                    self._count(batch)
                continue
            if len(batch) == 1:
                await self._set_aside(batch[0], rejected)
            else:
                half = len(batch) // 2
                batches += [batch[half:], batch[:half]]
        return []

    async def _write(self, rows: list[Entry], end: float) -> None:
        """Write within the time left until `end` (the loop's clock); raise StoreError."""
        start = self._loop.time()
        write = self._in_store = asyncio.ensure_future(self._store.write(rows))
        write.add_done_callback(_retrieve)  # a late one has nobody who would
        waits = (write, self._hurry)
        await asyncio.wait(waits, timeout=max(0.0, end - start), return_when=asyncio.FIRST_COMPLETED)
        if not write.done():
            raise StoreError(_LATE)
        self._in_store = None
        self._commit_seconds = self._loop.time() - start
        error = None if write.cancelled() else write.exception()
        if error is not None or write.cancelled():
            raise _failure(error)
        self._metrics.committed(len(rows), self._commit_seconds)

    async def _set_aside(self, row: Entry, error: RejectedRecordError) -> None:
        try:
            file = await self._spooler.set_aside(row, str(error))
        except (SpoolError, ValueError, TypeError, RecursionError) as failure:
            _log.error("the store rejects row %s (%s), not set aside: %s", row.task_id, error, failure)
            self._lose([row])
            return
        self._metrics.record_error()
        _log.error("the store rejects row %s (%s): see %s", row.task_id, error, file)

    def _go_away(self, reason: str, *, pause: float) -> None:
        """From now on rows go to the spool; see to the way back."""
        if self._away is None:
            _log.warning("rows go to the spool: %s", reason)
        self._away = reason
        if not self._closing and (self._replayer is None or self._replayer.done()):
            self._replayer = self._loop.create_task(self._bring_back(pause), name="spool replay")

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
        if self._held and self._spooler.failure is not None:
            await self._try_spool_again()
        if not await self._late_write_ended():
            return False
        probed = False
        while self._rows_wait():
            if not await self._replay_batch(_REPLAY_TIMEOUT_S):
                return False
            probed = True
            if self._spooler.fits(MAX_BATCH) and not self._held:
                break
        if self._commit_seconds >= self._commit_timeout and (probed or not self._refuse_while_away):
            # It works, but too slowly for those who wait; rows that come show when it is quick. Where mail is
            # refused meanwhile none come: then the next message shows it.
            return False
        await self._take_turn()
        try:
            while self._rows_wait():  # those that came meanwhile: no more than two batches
                if not probed or not await self._replay_batch(self._commit_timeout):
                    return False
            self._away = self._spooler.failure = None
        finally:
            self._next()
        return True

    async def _take_turn(self) -> None:
        """Wait until no batch has the turn; `_next` passes it on."""
        if not self._turn_taken:
            self._turn_taken = True
            return
        awaited = self._turn_awaited = self._loop.create_future()
        try:
            await awaited
        except asyncio.CancelledError:
            if awaited.done() and not awaited.cancelled():
                self._next()
            raise

    def _rows_wait(self) -> bool:
        return bool(self._carried or self._spooler.rows or self._held)

    async def _try_spool_again(self) -> None:
        """Rows that are only in the log are the probe: lifts the refusal when the spool takes them."""
        await self._take_turn()
        try:
            held, self._held = self._held, []
            try:
                spooled = await self._spooler.append(held)
            except SpoolError:
                self._held = held
                return
            self._count(spooled)
        finally:
            self._next()

    async def _replay_batch(self, seconds: float) -> bool:
        """Carry the oldest rows to the store; return whether it took them."""
        if not self._carried and not self._spooler.rows:
            held = self._held[:MAX_BATCH]
            left = await self._commit(held, seconds, first_time=True)
            # Those whose end the spool has taken meanwhile are held no more.
            done = {id(row) for row in held} - {id(row) for row in left}
            self._held = [row for row in self._held if id(row) not in done]
            return not left
        if not self._carried:
            batch = await self._spooler.read(MAX_BATCH)
            for _ in range(batch.corrupt):
                self._metrics.record_error()
            self._carried = batch.records
        self._carried = await self._commit(self._carried, seconds, first_time=False)
        if self._carried:
            return False
        await self._spooler.forget()
        return True

    async def _late_write_ended(self) -> bool:
        late = self._in_store
        if late is None:
            return True
        await asyncio.wait((late,), timeout=_REPLAY_TIMEOUT_S)
        if not late.done():
            late.cancel()  # seen to end, or not, by the next probe
            return False
        self._in_store = None
        return True


_LATE: Final = "the store did not answer in time"


def _failure(error: BaseException | None) -> StoreError:
    """Return what the store said, or what stands for an error of another kind; None: a cancellation."""
    if isinstance(error, StoreError):
        return error
    if error is not None and (limit := exhausted(error)) is not None:
        return StoreError(limit)
    _log.error("unforeseen error of the store", exc_info=error)
    return StoreError(f"unforeseen error: {error!r}")


def _release(waiting: Sequence[asyncio.Future[None]]) -> None:
    for kept in waiting:
        if not kept.done():  # else its caller was cancelled
            kept.set_result(None)


def _retrieve(write: asyncio.Future[None]) -> None:
    """Take the exception of a write that nobody waits for any longer."""
    if not write.cancelled():
        write.exception()
