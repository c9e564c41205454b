"""An SMTP client that sends many messages as fast as the server takes them, and counts the replies.

Rules: a session has one message on its way at a time, as an application has; sessions run side by side.
Each message carries an `X-Task-ID` of its own. Prints one JSON object: `sent`, `codes` (the reply that
settled each message, by code), `seconds`, `p50_ms` and `p99_ms` of one message (with its connection, where
each has one), `cpu_ms` of this process for each message.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections import Counter
from typing import cast

import uvloop

ENVELOPE = (b"MAIL FROM:<sender@bench.test>\r\n", b"RCPT TO:<recipient@example.test>\r\n", b"DATA\r\n")
HEADERS = (
    b"From: <sender@bench.test>\r\nTo: <recipient@example.test>\r\nSubject: load\r\n"
    b"X-Task-Type: bench\r\n\r\n"
)


class Work:
    """The messages that are still to be sent, and what became of the others."""

    def __init__(self, messages: int, size: int) -> None:
        self.left = messages
        self.codes: Counter[int] = Counter()
        self.seconds: list[float] = []
        line = b"x" * 70 + b"\r\n"
        body = line * max(1, (size - len(HEADERS)) // len(line))
        self._rest = HEADERS + body + b".\r\n"
        self._name = time.time_ns()

    def take(self) -> bytes | None:
        """Return the next message as it goes over the wire, None when there is no more."""
        if not self.left:
            return None
        self.left -= 1
        return b"X-Task-ID: bench-%d-%d\r\n" % (self._name, self.left) + self._rest


class Session(asyncio.Protocol):
    """One connection, from the greeting to QUIT. `done` is resolved when it is over."""

    def __init__(self, work: Work, *, keep: bool, pipelined: bool) -> None:
        self._work = work
        self._keep = keep
        self._pipelined = pipelined
        self._rest = b""
        self._message: bytes | None = None
        self._used = False
        self._began = time.perf_counter()
        self._expects: list[int] = [220]
        self._queue: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            if line[3:4] != b"-":
                self._reply(int(line[:3]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._message is not None:
            self._work.codes[0] += 1
        if self.done.done():
            return
        if self._used:
            self.done.set_result(None)
        else:
            self.done.set_exception(ConnectionError(f"the server closed before the first message: {exc}"))

    def _reply(self, code: int) -> None:
        expected = self._expects.pop(0)
        if code != expected:
            if self._message is not None:
                self._settle(code)
                self._message = None
            self._transport.close()
        elif code == 220:
            self._say(b"EHLO load.bench\r\n", 250)
        elif code == 354:
            assert self._message is not None
            self._say(self._message, 250)
        elif code == 221:
            self._transport.close()
        elif self._queue:
            command = self._queue.pop(0)
            self._say(command, 354 if command == b"DATA\r\n" else 250)
        elif not self._expects:
            if self._message is not None:
                self._settle(code)
            self._next()

    def _next(self) -> None:
        self._message = self._work.take() if self._keep or not self._used else None
        self._used = True
        if self._message is None:
            self._say(b"QUIT\r\n", 221)
            return
        if self._keep:
            self._began = time.perf_counter()
        if self._pipelined:
            self._expects += [250, 250, 354]
            self._transport.write(b"".join(ENVELOPE))
        else:
            self._queue = list(ENVELOPE[1:])
            self._say(ENVELOPE[0], 250)

    def _settle(self, code: int) -> None:
        self._work.codes[code] += 1
        self._work.seconds.append(time.perf_counter() - self._began)

    def _say(self, octets: bytes, expected: int) -> None:
        self._expects.append(expected)
        self._transport.write(octets)


async def run(port: int, work: Work, sessions: int, *, keep: bool, pipelined: bool) -> float:
    """Send all of `work` and return the seconds that it took."""
    loop = asyncio.get_running_loop()

    async def one() -> None:
        while work.left:
            _, session = await loop.create_connection(
                lambda: Session(work, keep=keep, pipelined=pipelined), "127.0.0.1", port
            )
            await session.done

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(sessions)))
    return time.perf_counter() - began


def main() -> None:
    """Read the arguments, send, print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--size", type=int, default=4096, help="octets of a message, about")
    parser.add_argument("--keep", action="store_true", help="keep connections open (default: one a message)")
    parser.add_argument("--pipelined", action="store_true", help="send MAIL, RCPT and DATA in one segment")
    arguments = parser.parse_args()
    work = Work(arguments.messages, arguments.size)
    seconds = uvloop.run(
        run(arguments.port, work, arguments.sessions, keep=arguments.keep, pipelined=arguments.pipelined)
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ordered = sorted(work.seconds)
    result = {
        "sent": sum(work.codes.values()),
        "codes": {str(code): count for code, count in sorted(work.codes.items())},
        "seconds": seconds,
        "p50_ms": ordered[len(ordered) // 2] * 1e3 if ordered else None,
        "p99_ms": ordered[len(ordered) * 99 // 100] * 1e3 if ordered else None,
        "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1e3 / max(1, arguments.messages),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
