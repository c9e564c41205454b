"""aiosmtpd's own Proxy handler as a relay: PORT UPSTREAM_PORT. Runs in the peers' environment."""

from __future__ import annotations

import asyncio
import signal
import sys

from aiosmtpd.handlers import Proxy
from aiosmtpd.smtp import SMTP


async def serve(port: int, upstream_port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    handler = Proxy("127.0.0.1", upstream_port)
    server = await loop.create_server(
        lambda: SMTP(handler, hostname="relay.bench", data_size_limit=64 << 20),
        "127.0.0.1",
        port,
        backlog=1024,
    )
    await stop.wait()
    server.close()


asyncio.run(serve(*map(int, sys.argv[1:])))
