"""One client connection: what goes over the wire, and when it is cut. What is said is the dialogue's.

Rules: what is written is bounded, since nothing is read from a client that does not take its replies; a
client that takes neither them nor our close is cut off. The last octets from a client that has gone are
not acted on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from aiosmtpd import smtp

from relay.account import Sender
from relay.policy import client_address, may_relay
from relay.session.dialogue import Dialogue

if TYPE_CHECKING:
    from relay.session.reception import Reception

__all__ = ["Session"]

LINGER = 10.0
"""Seconds that a client gets to take the last reply and leave."""
WRITE_TIMEOUT = 60.0
"""Seconds after which a client that does not read its replies is cut off."""


class Session(smtp.SMTP):
    """One client session.

    The protocol class is aiosmtpd's; the command loop, the parsing, DATA and the replies are ours. Its
    constructor is not called: it inspects itself anew for each connection, which costs more than a message.
    """

    def __init__(self, reception: Reception, listener: str) -> None:
        self.loop = reception.loop
        self.transport: asyncio.BaseTransport | None = None
        self.choked = False
        self._reception = reception
        self._listener = listener
        self._dialogue: Dialogue
        self._client = ""
        self._since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client, or turn it away."""
        self.transport = transport
        peername = transport.get_extra_info("peername")
        address = client_address(peername[0]) if peername else None
        self._client = str(address) if address is not None else "unix"
        sender = Sender(self._client, self._listener)
        self._dialogue = Dialogue(
            self, self._reception, sender, may_relay=may_relay(address, self._reception.allow)
        )
        self._dialogue.begin(self._reception.admit(self, sender))

    def data_received(self, data: bytes) -> None:
        """Give what the client sent to the dialogue."""
        self._dialogue.take(data)

    def eof_received(self) -> bool:
        """Keep a half-closed connection open: the client may still wait for its replies."""
        self._dialogue.end_of_input()
        return self.transport is not None and self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        del error
        self.transport = None
        self._dialogue.client_gone()
        self._reception.leave(self, self._client)

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self.choked = True
        self._since = self.loop.time()

    def resume_writing(self) -> None:
        """The client reads again."""
        self.choked = False
        self._dialogue.advance()

    # What the dialogue asks for

    def write(self, octets: bytes) -> None:
        """Send to the client."""
        if self.transport is not None:
            cast("asyncio.Transport", self.transport).write(octets)

    def hold(self, pause: bool) -> None:
        """Stop reading from the client, or go on."""
        if self.transport is None:
            return
        transport = cast("asyncio.Transport", self.transport)
        if pause:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def close(self) -> None:
        """Close after what has been written."""
        if self.transport is not None and not self.transport.is_closing():
            self._since = self.loop.time()
            self.transport.close()

    def cut(self) -> None:
        """Drop the connection; what has not gone out is not sent any more."""
        if self.transport is not None:
            cast("asyncio.Transport", self.transport).abort()

    # What the reception asks for

    def check(self, now: float, elapsed: float) -> None:
        """Look at the waits for this client; called every `elapsed` seconds."""
        if self.transport is None:
            return
        if self.transport.is_closing():
            if now - self._since > LINGER:
                self.cut()
        elif self.choked and now - self._since > WRITE_TIMEOUT:
            self._reception.metrics.rejected("timeout")
            self.cut()
        else:
            self._dialogue.check(now, elapsed)

    def drain(self) -> None:
        """Say goodbye if nothing is under way; what is under way is finished first."""
        self._dialogue.drain()
