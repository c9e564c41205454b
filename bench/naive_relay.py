"""The relay that one would write in an hour: aiosmtpd in, aiosmtplib out, a row in SQLite.

It is the yardstick from below: the message is collected in memory, each one goes up over a connection of its
own, each row is committed alone with SQLite's defaults (rollback journal, synchronous FULL), and the client
waits for all of it. Runs until SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiosmtplib
import aiosqlite
from aiosmtpd import smtp

from bench.yardstick import arguments

TABLE = """
CREATE TABLE IF NOT EXISTS task_done (
    id INTEGER PRIMARY KEY,
    sender TEXT,
    recipients TEXT,
    sent_at TEXT DEFAULT CURRENT_TIMESTAMP,
    upstream_reply TEXT
)
"""


class Handler:
    """Sends on what aiosmtpd has collected, then writes the row."""

    def __init__(self, upstream_port: int, database: aiosqlite.Connection) -> None:
        self._upstream_port = upstream_port
        self._database = database

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self,
        server: smtp.SMTP,  # noqa: ARG002 - aiosmtpd passes it
        session: smtp.Session,  # noqa: ARG002 - likewise
        envelope: smtp.Envelope,
    ) -> str:
        assert envelope.mail_from is not None
        assert envelope.content is not None
        _, reply = await aiosmtplib.send(
            envelope.content,
            sender=envelope.mail_from,
            recipients=envelope.rcpt_tos,
            hostname="127.0.0.1",
            port=self._upstream_port,
            start_tls=False,
        )
        await self._database.execute(
            "INSERT INTO task_done (sender, recipients, upstream_reply) VALUES (?, ?, ?)",
            (envelope.mail_from, ",".join(envelope.rcpt_tos), reply),
        )
        await self._database.commit()
        return f"250 {reply}"


async def serve(port: int, upstream_port: int, path: Path) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with aiosqlite.connect(path) as database:
        await database.execute(TABLE)
        await database.commit()
        handler = Handler(upstream_port, database)
        server = await loop.create_server(
            lambda: smtp.SMTP(handler, hostname="naive.bench"), "127.0.0.1", port, backlog=1024
        )
        await stop.wait()
        server.close()


def main() -> None:
    """Read the arguments and serve."""
    given = arguments(__doc__)
    asyncio.run(serve(given.port, given.upstream_port, given.database))


if __name__ == "__main__":
    main()
