"""An SMTP client that sends many messages as fast as the server takes them, and counts the replies.

Rules: a session has one message on its way at a time, as an application has; sessions run side by side.
Each message carries an `X-Task-ID` of its own. With `--ca` a session begins with STARTTLS and AUTH.
Prints one JSON object: `sent`, `codes` (the reply that settled each message, by code), `seconds`, `p50_ms`,
`p99_ms` of one message (with its connection, where each has one), `cpu_ms` of this process a message.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import resource
import ssl
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import uvloop

Group = tuple[bytes, list[int]]
"""What goes out in one write, and the codes that it must bring."""

HEADERS = (
    b"From: <sender@bench.test>\r\nTo: <recipient@example.test>\r\nSubject: load\r\n"
    b"X-Task-Type: bench\r\n\r\n"
)
EHLO = b"EHLO load.bench\r\n"
LOGIN = b"AUTH PLAIN %b\r\n" % base64.b64encode(b"\0bench\0secret")


@dataclass(frozen=True)
class Manner:
    """How sessions behave."""

    keep: bool
    style: str
    recipients: int
    tls: ssl.SSLContext | None

    @cached_property
    def envelope(self) -> list[Group]:
        """What precedes the content: a group for each command, or one for all."""
        commands: list[Group] = [(b"MAIL FROM:<sender@bench.test>\r\n", [250])]
        commands += [(b"RCPT TO:<recipient%d@example.test>\r\n" % n, [250]) for n in range(self.recipients)]
        if self.style != "bdat":
            commands.append((b"DATA\r\n", [354]))
        if self.style == "plain":
            return commands
        return [(b"".join(line for line, _ in commands), [code for _, codes in commands for code in codes])]


class Work:
    """The messages that are still to be sent, and what became of the others."""

    def __init__(self, messages: int, size: int) -> None:
        self.left = messages
        self.codes: Counter[int] = Counter()
        self.seconds: list[float] = []
        line = b"x" * 70 + b"\r\n"
        self._rest = HEADERS + line * max(1, (size - len(HEADERS)) // len(line))
        self._name = time.time_ns()

    def take(self) -> bytes | None:
        """Return the next message, None when there is no more."""
        if not self.left:
            return None
        self.left -= 1
        return b"X-Task-ID: bench-%d-%d\r\n" % (self._name, self.left) + self._rest


class Session(asyncio.Protocol):
    """One connection, from the greeting to QUIT. `done` is resolved when it is over.

    What is to be said is a list of groups, each said when all replies to the one before are there.
    """

    def __init__(self, work: Work, manner: Manner) -> None:
        self._work = work
        self._manner = manner
        self._rest = b""
        self._expects: list[int] = [220]
        self._groups: list[Group] = [(EHLO, [250])]
        if manner.tls:
            self._groups = [(EHLO, [250]), (b"STARTTLS\r\n", [220])]
        self._sending = False
        self._used = False
        self._securing: asyncio.Task[None] | None = None
        self._began = time.perf_counter()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\r\n")
        for line in lines:
            if line[3:4] != b"-":
                self._reply(int(line[:3]))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sending:
            self._work.codes[0] += 1
        if self.done.done():
            return
        if self._used:
            self.done.set_result(None)
        else:
            self.done.set_exception(ConnectionError(f"the server closed before the first message: {exc}"))

    def _reply(self, code: int) -> None:
        expected = self._expects.pop(0) if self._expects else 0
        if code != expected:
            if self._sending:
                self._settle(code)
            self._transport.close()
        elif code == 221:
            self._transport.close()
        elif self._expects:
            return
        elif self._groups:
            self._say(self._groups.pop(0))
        elif code == 220:  # to STARTTLS
            self._securing = asyncio.get_running_loop().create_task(self._secure())
        else:
            if self._sending:
                self._settle(code)
            self._next()

    async def _secure(self) -> None:
        assert self._manner.tls is not None
        loop = asyncio.get_running_loop()
        try:
            secured = await loop.start_tls(
                self._transport, self, self._manner.tls, server_hostname="localhost"
            )
        except OSError as error:
            self.done.set_exception(error)
            return
        self._transport = cast("asyncio.Transport", secured)
        self._groups = [(LOGIN, [235])]
        self._say((EHLO, [250]))

    def _next(self) -> None:
        message = self._work.take() if self._manner.keep or not self._used else None
        self._used = True
        if message is None:
            self._say((b"QUIT\r\n", [221]))
            return
        self._sending = True
        if self._manner.keep:
            self._began = time.perf_counter()
        self._groups = self._message(message)
        self._say(self._groups.pop(0))

    def _say(self, group: Group) -> None:
        octets, codes = group
        self._expects = list(codes)
        self._transport.write(octets)

    def _message(self, message: bytes) -> list[Group]:
        if self._manner.style == "bdat":
            ((commands, codes),) = self._manner.envelope
            return [(b"%bBDAT %d LAST\r\n%b" % (commands, len(message), message), [*codes, 250])]
        return [*self._manner.envelope, (message + b".\r\n", [250])]

    def _settle(self, code: int) -> None:
        self._sending = False
        self._work.codes[code] += 1
        self._work.seconds.append(time.perf_counter() - self._began)


async def run(port: int, work: Work, sessions: int, manner: Manner) -> float:
    """Send all of `work` and return the seconds that it took."""
    loop = asyncio.get_running_loop()

    async def one() -> None:
        while work.left:
            _, session = await loop.create_connection(lambda: Session(work, manner), "127.0.0.1", port)
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
    parser.add_argument("--recipients", type=int, default=1, help="of each message")
    parser.add_argument("--keep", action="store_true", help="keep connections open (default: one a message)")
    parser.add_argument(
        "--style",
        choices=["plain", "pipelined", "bdat"],
        default="plain",
        help="a command at a time; MAIL, RCPT and DATA in one segment; or the whole message at once, by BDAT",
    )
    parser.add_argument("--ca", type=Path, help="STARTTLS, trusting these certificates, and AUTH")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    manner = Manner(
        keep=arguments.keep,
        style=arguments.style,
        recipients=arguments.recipients,
        tls=ssl.create_default_context(cafile=arguments.ca) if arguments.ca else None,
    )
    work = Work(arguments.messages, arguments.size)
    seconds = uvloop.run(run(arguments.port, work, arguments.sessions, manner))
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
