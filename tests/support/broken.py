"""Relays that are broken on purpose, each in one way: for the proof that the ledgers' checker finds it.

`BREAK=NAME python -m tests.support.broken serve --config FILE`; the names are the keys of `BREAKS`. A relay
that answers before it has recorded is `early_answer`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from relay.cli import main
from relay.records.model import Doubt, Entry
from relay.records.recorder import Recorder
from relay.records.spool import Batch, Spool
from relay.reply import Reply
from relay.transaction import Transaction
from relay.upstream.connection import Connection, Failure

__all__ = ["BREAKS", "VARIABLE"]

VARIABLE = "BREAK"

_tasks: set[asyncio.Task[None]] = set()


def records_before_the_verdict() -> None:
    """The row is made when the end of data has gone up."""
    finish = Transaction.finish

    def wrapped(transaction: Transaction, answer: Callable[[Reply], None]) -> None:
        finish(transaction, answer)
        account = transaction._account
        if transaction._settlement is not None and account.found is not None:
            entry = account.record(account.found, Reply.own(250, "0.0", "surely"), doubted=False)
            transaction._services.recorder.record(entry)

    Transaction.finish = wrapped  # type: ignore[method-assign]


def drops_rows_of_a_failed_commit() -> None:
    """What the store does not take is forgotten, and whoever waits for it is told that all is well."""

    async def dropped(_recorder: Recorder, _rows: Sequence[Entry]) -> None:
        pass

    Recorder._spool_rows = dropped  # type: ignore[method-assign]


def sends_again_after_a_lost_verdict() -> None:
    """A connection that ends without a verdict has its message sent once more, on another connection."""
    send, write, end = Connection.send, Connection.write, Connection._end

    def said(connection: Any) -> list[bytes]:
        return connection.__dict__.setdefault("said", [])  # type: ignore[no-any-return]

    def sent(
        connection: Connection,
        line: bytes,
        command: str,
        answered: Callable[[Reply], None],
        *,
        more: bool = False,
    ) -> None:
        if command == "mail":
            said(connection).clear()
        said(connection).append(line)
        send(connection, line, command, answered, more=more)

    def written(connection: Connection, *content: bytes) -> None:
        said(connection).append(b"".join(content))
        write(connection, *content)

    def ended(connection: Connection, failure: Failure) -> None:
        transport = connection._transport
        if transport is not None and connection._awaits_verdict:
            peer = transport.get_extra_info("peername")
            task = asyncio.get_running_loop().create_task(again(peer, tuple(said(connection))))
            _tasks.add(task)
            task.add_done_callback(_tasks.discard)
        end(connection, failure)

    async def again(peer: tuple[str, int], pieces: Sequence[bytes]) -> None:
        reader, writer = await asyncio.open_connection(*peer)
        await reader.readline()
        for piece in (b"HELO again.test\r\n", *pieces):
            writer.write(piece)
            await reader.readline()
        writer.close()

    Connection.send = sent  # type: ignore[method-assign]
    Connection.write = written  # type: ignore[method-assign]
    Connection._end = ended  # type: ignore[method-assign]


def forgets_the_journal() -> None:
    """What a process that was killed has left in the journal is not looked at."""
    from relay.records.journal import Journal

    Journal._read = lambda journal, slots: journal._free.extend(range(slots)) or []  # type: ignore[method-assign]


def forgets_doubts() -> None:
    """A verdict that does not come is told to the client, and nothing is kept of it."""
    record = Recorder.record

    def wrapped(recorder: Recorder, entry: Entry) -> asyncio.Future[None]:
        if not isinstance(entry, Doubt):
            return record(recorder, entry)
        kept = asyncio.get_running_loop().create_future()
        kept.set_result(None)
        return kept

    Recorder.record = wrapped  # type: ignore[method-assign]


def forgets_what_it_spooled() -> None:
    """The spool reads back nothing."""
    read = Spool.read
    Spool.read = lambda spool, limit: Batch([], read(spool, limit).corrupt)  # type: ignore[method-assign]


def doubts_what_it_knows() -> None:
    """The slot in the journal is never freed."""
    from relay.records.journal import Journal

    Journal.free = lambda journal, slot: None  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "records before the verdict": records_before_the_verdict,
    "drops rows of a failed commit": drops_rows_of_a_failed_commit,
    "sends again after a lost verdict": sends_again_after_a_lost_verdict,
    "forgets the journal": forgets_the_journal,
    "forgets doubts": forgets_doubts,
    "forgets what it spooled": forgets_what_it_spooled,
    "doubts what it knows": doubts_what_it_knows,
}


if __name__ == "__main__":
    BREAKS[os.environ[VARIABLE]]()
    sys.exit(main())
