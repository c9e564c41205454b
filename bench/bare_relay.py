"""The least that can be called a relay that records: SMTP through, a row in SQLite, and nothing else.

It is the yardstick from above, for what this machine and Python allow: uvloop, kept connections, content that
streams, one commit for all rows that wait (write-ahead log, synchronous FULL), the 250 after the commit. One
table without an index beside its key. No look at what a command or the content says, no limit, no timeout, no
TLS, no metrics, no log; what fails breaks the session. Not for mail. Runs until SIGTERM.
"""

from __future__ import annotations

import asyncio
import queue
import re
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import cast

import uvloop

from bench.yardstick import arguments

TABLE = """
CREATE TABLE IF NOT EXISTS task_done (
    id INTEGER PRIMARY KEY,
    task_id TEXT,
    sender TEXT,
    recipients TEXT,
    sent_at TEXT,
    upstream_reply TEXT,
    size INTEGER
)
"""
INSERT = """
INSERT INTO task_done (task_id, sender, recipients, sent_at, upstream_reply, size) VALUES (?, ?, ?, ?, ?, ?)
"""
END_OF_DATA = b"\r\n.\r\n"
REPLY = re.compile(rb"(?:\d{3}-[^\n]*\n)*\d{3}(?!-)[^\n]*\n")

Row = tuple[str, str, str, str, str, int]
Kept = Callable[[], None]


class Store:
    """Commits rows on a thread of its own: while one commit is under way, the next batch collects."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._loop = loop
        self._rows: list[Row] = []
        self._waiting: list[Kept] = []
        self._busy = False
        self._batches: queue.SimpleQueue[tuple[list[Row], list[Kept]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def add(self, row: Row, kept: Kept) -> None:
        """Keep a row; `kept` is called when it is durable."""
        self._rows.append(row)
        self._waiting.append(kept)
        if not self._busy:
            self._next()

    def close(self) -> None:
        """Commit what was given, then end the thread."""
        self._batches.put(None)
        self._thread.join()

    def _next(self) -> None:
        self._busy = bool(self._rows)
        if self._busy:
            self._batches.put((self._rows, self._waiting))
            self._rows, self._waiting = [], []

    def _committed(self, waiting: list[Kept]) -> None:
        for kept in waiting:
            kept()
        self._next()

    def _run(self) -> None:
        raw = sqlite3.connect(self._path, isolation_level=None)
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA synchronous = FULL")
        raw.execute(TABLE)
        while (batch := self._batches.get()) is not None:
            rows, waiting = batch
            raw.execute("BEGIN IMMEDIATE")
            raw.executemany(INSERT, rows)
            raw.execute("COMMIT")
            self._loop.call_soon_threadsafe(self._committed, waiting)
        raw.close()


class Upstream(asyncio.Protocol):
    """A connection to the upstream; gives each whole reply to `on_reply`."""

    def __init__(self) -> None:
        self.on_reply: Callable[[bytes], None]
        self.ready: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self.client: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.on_reply = self.ready.set_result

    def data_received(self, octets: bytes) -> None:
        self._received += octets
        while (found := REPLY.match(self._received)) is not None:
            self._received = self._received[found.end() :]
            self.on_reply(found[0])

    def pause_writing(self) -> None:
        if self.client is not None:
            self.client.pause_reading()

    def resume_writing(self) -> None:
        if self.client is not None:
            self.client.resume_reading()


class Client(asyncio.Protocol):
    """A session: one command after the other to the upstream, whose reply is the client's."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._transport: asyncio.Transport
        self._received = b""
        self._busy = False
        self._content = False
        self._last = b""
        self._size = 0
        self._sender = ""
        self._recipients: list[str] = []
        self._upstream: Upstream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"220 bare.bench ESMTP\r\n")

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio passes it
        if self._upstream is not None:
            self._upstream.transport.close()

    def data_received(self, octets: bytes) -> None:
        if self._content:
            self._take_content(octets)
        else:
            self._received += octets
            self._go_on()

    def _go_on(self) -> None:
        while not self._busy and (end := self._received.find(b"\n") + 1) > 0:
            line, self._received = self._received[:end], self._received[end:]
            self._take(line)
        if self._content and self._received:
            content, self._received = self._received, b""
            self._take_content(content)

    def _take(self, line: bytes) -> None:
        verb = line[:4].upper()
        if verb == b"MAIL":
            self._sender = line[10:-2].decode()
            self._recipients = []
            self._busy = True
            self._relay.lend(lambda upstream: self._set_out(upstream, line))
        elif verb == b"RCPT":
            self._recipients.append(line[8:-2].decode())
            self._ask(line, self._answered)
        elif verb == b"DATA":
            self._ask(line, self._begin_content)
        elif verb in {b"EHLO", b"HELO"}:
            self._transport.write(b"250-bare.bench\r\n250-PIPELINING\r\n250 8BITMIME\r\n")
        elif verb == b"QUIT":
            self._transport.write(b"221 bye\r\n")
            self._transport.close()
        else:
            self._transport.write(b"250 ok\r\n")

    def _set_out(self, upstream: Upstream, line: bytes) -> None:
        self._upstream = upstream
        upstream.client = self._transport
        self._ask(line, self._answered)

    def _ask(self, line: bytes, on_reply: Callable[[bytes], None]) -> None:
        assert self._upstream is not None
        self._busy = True
        self._upstream.on_reply = on_reply
        self._upstream.transport.write(line)

    def _answered(self, reply: bytes) -> None:
        self._busy = False
        self._transport.write(reply)
        self._go_on()

    def _begin_content(self, reply: bytes) -> None:
        self._content = True
        self._last = b"\r\n"
        self._size = 0
        self._answered(reply)

    def _take_content(self, octets: bytes) -> None:
        assert self._upstream is not None
        # Where clients wait for the verdict, nothing comes behind the end of data.
        self._size += len(octets)
        self._last = octets[-5:] if len(octets) >= len(END_OF_DATA) else (self._last + octets)[-5:]
        if self._last == END_OF_DATA:
            self._content = False
            self._busy = True
            self._upstream.on_reply = self._accepted
        self._upstream.transport.write(octets)

    def _accepted(self, reply: bytes) -> None:
        assert self._upstream is not None
        self._relay.give_back(self._upstream)
        self._upstream = None
        row = (
            str(uuid.uuid4()),
            self._sender,
            ",".join(self._recipients),
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            reply.decode(),
            self._size,
        )
        self._relay.store.add(row, lambda: self._answered(reply))


class Relay:
    """What the sessions share: the store, and connections to the upstream that are free."""

    def __init__(self, store: Store, upstream_port: int) -> None:
        self.store = store
        self._upstream_port = upstream_port
        self._free: list[Upstream] = []
        self._connecting: set[asyncio.Task[None]] = set()

    def lend(self, use: Callable[[Upstream], None]) -> None:
        """Give `use` a connection."""
        if self._free:
            use(self._free.pop())
            return
        task = asyncio.get_running_loop().create_task(self._connect(use))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def give_back(self, upstream: Upstream) -> None:
        """Keep the connection for the next message."""
        upstream.client = None
        self._free.append(upstream)

    async def _connect(self, use: Callable[[Upstream], None]) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(Upstream, "127.0.0.1", self._upstream_port)
        await upstream.ready
        greeted = loop.create_future()
        upstream.on_reply = greeted.set_result
        upstream.transport.write(b"EHLO bare.bench\r\n")
        await greeted
        use(upstream)


async def serve(port: int, upstream_port: int, path: Path) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    store = Store(path, loop)
    relay = Relay(store, upstream_port)
    server = await loop.create_server(lambda: Client(relay), "127.0.0.1", port, backlog=1024)
    await stop.wait()
    server.close()
    store.close()


def main() -> None:
    """Read the arguments and serve."""
    given = arguments(__doc__)
    uvloop.run(serve(given.port, given.upstream_port, given.database))


if __name__ == "__main__":
    main()
