"""An SMTP server that accepts everything, counts it and forgets it: the upstream of the benchmark.

Rules: fast, so that it is not what is measured; strict about the end of data (CRLF.CRLF), so that what it
counts are messages. With a certificate it wants STARTTLS and AUTH before MAIL, and takes any password.
It prints its port on the first line of standard output and runs until SIGTERM.
`XCOUNT` asks for the counts: "250 MESSAGES OCTETS CONNECTIONS".
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import ssl
from pathlib import Path
from typing import cast

import uvloop

END = b"\r\n.\r\n"
EHLO = (
    b"250-sink.bench\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n"
    b"250-SIZE 104857600\r\n250-DSN\r\n250-CHUNKING\r\n%b250 ENHANCEDSTATUSCODES\r\n"
)
ACCEPTED = b"250 2.0.0 accepted\r\n"
REPLIES = {
    b"EHLO": EHLO % b"",
    b"HELO": b"250 sink.bench\r\n",
    b"MAIL": b"250 2.1.0 ok\r\n",
    b"RCPT": b"250 2.1.5 ok\r\n",
    b"RSET": b"250 2.0.0 ok\r\n",
    b"NOOP": b"250 2.0.0 ok\r\n",
    b"DATA": b"354 go ahead\r\n",
    b"AUTH": b"235 2.7.0 welcome\r\n",
}


class Counts:
    """What has arrived."""

    def __init__(self) -> None:
        self.messages = 0
        self.octets = 0
        self.connections = 0


class Session(asyncio.Protocol):
    """One client. `delay`: seconds that the reply to the end of data takes. `tls`: what STARTTLS begins."""

    def __init__(self, counts: Counts, delay: float, tls: ssl.SSLContext | None) -> None:
        self._counts = counts
        self._delay = delay
        self._tls = tls
        self._may_send = tls is None
        self._chunk = 0
        self._last = False
        self._securing: asyncio.Task[None] | None = None
        self._rest = b""
        self._in_data = False
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._counts.connections += 1
        self._transport.write(b"220 sink.bench ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self._rest = self._rest + data if self._rest else data
        if not self._waiting:
            self._work()

    def _work(self) -> None:
        replies: list[bytes] = []
        while self._rest and not self._waiting:
            if self._in_data:
                done = self._content(replies)
            elif self._chunk:
                done = self._part(replies)
            else:
                done = self._command(replies)
            if not done:
                break
        if replies:
            self._transport.write(b"".join(replies))

    def _content(self, replies: list[bytes]) -> bool:
        # `_rest` begins with the CRLF that came before it, that of the DATA command at first.
        end = self._rest.find(END)
        if end < 0:
            keep = len(END) - 1
            self._counts.octets += max(0, len(self._rest) - keep)
            self._rest = self._rest[-keep:]
            return False
        self._counts.octets += end
        self._rest = self._rest[end + len(END) :]
        self._in_data = False
        self._accept(replies)
        return True

    def _part(self, replies: list[bytes]) -> bool:
        """Take what has come of a chunk."""
        taken = min(self._chunk, len(self._rest))
        self._rest = self._rest[taken:]
        self._counts.octets += taken
        self._chunk -= taken
        if not self._chunk:
            self._chunk_done(replies)
        return True

    def _chunk_done(self, replies: list[bytes]) -> None:
        if self._last:
            self._accept(replies)
        else:
            replies.append(b"250 2.0.0 chunk\r\n")

    def _accept(self, replies: list[bytes]) -> None:
        self._counts.messages += 1
        if self._delay:
            self._waiting = True
            asyncio.get_running_loop().call_later(self._delay, self._late)
        else:
            replies.append(ACCEPTED)

    def _before_login(self, verb: bytes) -> bytes:
        if verb == b"EHLO":
            return EHLO % (b"250-STARTTLS\r\n" if self._tls else b"250-AUTH PLAIN\r\n")
        if verb == b"MAIL" or self._tls:
            return b"530 5.7.0 log in first\r\n"
        self._may_send = True
        return REPLIES[verb]

    async def _secure(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._tls is not None
        try:
            secured = await loop.start_tls(self._transport, self, self._tls, server_side=True)
        except OSError:
            self._transport.abort()
            return
        self._tls = None
        self._transport = cast("asyncio.Transport", secured)

    def _late(self) -> None:
        self._waiting = False
        if not self._transport.is_closing():
            self._transport.write(ACCEPTED)
            self._work()

    def _command(self, replies: list[bytes]) -> bool:
        line, separator, rest = self._rest.partition(b"\r\n")
        if not separator:
            return False
        self._rest = rest
        verb = line[:4].upper()
        if verb == b"DATA":
            self._in_data = True
            self._rest = b"\r\n" + rest
        elif verb == b"QUIT":
            self._transport.write(b"".join([*replies, b"221 2.0.0 bye\r\n"]))
            replies.clear()
            self._transport.close()
            return False
        elif verb == b"STAR" and self._tls is not None:
            self._transport.write(b"220 2.0.0 go ahead\r\n")
            self._securing = asyncio.get_running_loop().create_task(self._secure())
            return False
        elif not self._may_send and verb in (b"EHLO", b"MAIL", b"AUTH"):
            replies.append(self._before_login(verb))
            return True
        elif verb == b"BDAT":
            size, *last = line[5:].split()
            self._chunk, self._last = int(size), bool(last)
            if not self._chunk:
                self._chunk_done(replies)
            return True
        elif line == b"XCOUNT":
            counts = self._counts
            replies.append(b"250 %d %d %d\r\n" % (counts.messages, counts.octets, counts.connections))
            return True
        replies.append(REPLIES.get(verb, b"500 5.5.1 unknown command\r\n"))
        return True


async def serve(port: int, delay: float, tls: ssl.SSLContext | None) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    counts = Counts()
    server = await loop.create_server(lambda: Session(counts, delay, tls), "127.0.0.1", port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    server.close()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0, help="0: the system's choice")
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds before the reply to the end of data"
    )
    parser.add_argument("--certificate", type=Path, help="PEM with the key: clients have to log in, over TLS")
    arguments = parser.parse_args()
    tls = None
    if arguments.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments.certificate)
    uvloop.run(serve(arguments.port, arguments.delay, tls))


if __name__ == "__main__":
    main()
