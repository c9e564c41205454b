"""One client connection: what goes over the wire, and when it is cut. What is said is the dialogue's.

A connection begins as its listener asks: with the PROXY header that says who the client is, with TLS from
the first octet, and then with the greeting. Rules: what is written is bounded, since nothing is read from
a client that does not take its replies; a client that takes neither them nor our close is cut off. The last
octets from a client that has gone are not acted on. A client that sends much at a time is read in blocks.
To close while a client sends is a reset, which takes the replies away that it has not read: what it sends is
thrown away first, for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from aiosmtpd import smtp

from relay import maillog
from relay.account import Sender
from relay.policy import LOCAL, Address, client_address, may_relay, trusted_proxy
from relay.session.blocks import BLOCK, Blocks
from relay.session.dialogue import Dialogue
from relay.session.proxy import Header, ProxyError
from relay.session.tls import shake_hands

if TYPE_CHECKING:
    from relay.session.reception import Reception
    from relay.session.tls import Certificate
    from relay.settings import ListenerSettings

__all__ = ["Session"]

HEADER_TIMEOUT = 10.0
"""Seconds that a proxy gets for its header; it is the first thing that it sends."""
LINGER = 10.0
"""Seconds that a client gets to take the last reply and leave."""
WRITE_TIMEOUT = 60.0
"""Seconds after which a client that does not read its replies is cut off."""


@lru_cache(maxsize=1024)
def _address_of(host: str) -> tuple[Address, str]:
    """Return a peer's address, and how it is written; to find out takes as long as two commands."""
    address = client_address(host) or LOCAL
    return address, str(address)


class Session(smtp.SMTP):
    """One client session.

    The protocol class is aiosmtpd's; the command loop, the parsing, DATA and the replies are ours. Its
    constructor is not called: it inspects itself anew for each connection, which costs more than a message.
    """

    def __init__(self, reception: Reception, listener: ListenerSettings) -> None:
        self.loop = reception.loop
        self.transport: asyncio.Transport | None = None
        self.choked = False
        self._reception = reception
        self._listener = listener
        self._header: Header | None = None
        self._dialogue: Dialogue | None = None
        self._securing: asyncio.Task[None] | None = None
        self._handshake: bytes | None = None
        self._client = ""
        self._proxy: Address | None = None
        self._address: Address | None = None
        self._since = self.loop.time()
        self._lingers = False
        self._heard = False  # since the last look

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Find out who it is, then greet the client or turn it away."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        peername = transport.get_extra_info("peername")
        # A unix socket has no name; nor, with uvloop, has a peer that has reset the connection already.
        gone = not peername and not self._listener.path
        peer, self._client = _address_of(peername[0]) if peername else (LOCAL, "unix")
        self._reception.enter(self, self._listener.address)
        if gone:  # what it sent can still be read, and nobody can say who it was
            self.cut()
        elif not self._listener.proxy_protocol:
            self._admit(peer, peername[1] if peername else None)
        elif trusted_proxy(peer, self._reception.trusted_proxies):
            self._proxy = peer
            self._header = Header()
        else:
            self._turn_away("proxy", "not one of clients.trusted_proxies")

    def _admit(self, client: Address | None, port: int | None, received: bytes = b"") -> None:
        """Begin with a client whose address is known now; `received` came behind the PROXY header.

        A client of a proxy that does not say who it is may do nothing without AUTH.
        """
        self._address = client
        sender = Sender(self._client, self._listener.address, port=port)
        self._dialogue = dialogue = Dialogue(
            self,
            self._reception,
            self._listener,
            sender,
            may_relay=self._may_relay(),
            local=client is not None and client.is_loopback,
        )
        refusal = self._reception.admit(sender)
        if self._listener.tls != "implicit":
            dialogue.begin(refusal)
            if received:
                dialogue.take(received)
        elif refusal is None:
            self.secure(received)
        else:  # no handshake for somebody who is turned away
            self.cut()

    def _may_relay(self) -> bool:
        """Whether the policy lets this client relay without AUTH; a proxy is believed while it is trusted."""
        reception = self._reception
        if self._proxy is not None and not trusted_proxy(self._proxy, reception.trusted_proxies):
            return False
        return may_relay(self._address, reception.allow)

    def reconsider(self) -> None:
        """Decide anew what the settings decide about this client: they have changed."""
        if self._dialogue is not None:
            self._dialogue.may_relay = self._may_relay()

    def _turn_away(self, reason: str, detail: str) -> None:
        """Drop a connection that never came to a dialogue."""
        self._reception.metrics.rejected(reason)
        maillog.session_refused(self._client, self._listener.address, reason, detail)
        self.cut()

    # What comes in

    def data_received(self, data: bytes) -> None:
        """Give what the client sent to the dialogue; before that, to the PROXY header."""
        if len(data) > BLOCK:
            self._read_in_blocks()
        if self._lingers:
            self._heard = True
            return
        if self._dialogue is not None and self._handshake is None:
            self._dialogue.take(data)
        elif self._handshake is not None:
            self._handshake += data
        elif self._header is not None:
            self._take_header(self._header, data)

    def _read_in_blocks(self) -> None:
        """Have no more than a block read at once from now on; TLS has a buffer of its own, and stays."""
        transport = self.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return
        transport.pause_reading()  # how uvloop reads is settled when it begins to
        transport.set_protocol(Blocks(self, self._reception.block))
        transport.resume_reading()

    def _take_header(self, header: Header, data: bytes) -> None:
        try:
            found = header.feed(data)
        except ProxyError as error:
            self._header = None
            self._turn_away("proxy", str(error))
            return
        if found is None:
            return
        self._header = None
        if found.source is None:  # a health check, as a rule
            self._admit(None, None, found.rest)
            return
        address, port = found.source
        self._client = str(address)
        self._admit(address, port, found.rest)

    def eof_received(self) -> bool:
        """Keep a half-closed connection open: the client may still wait for its replies."""
        if self._dialogue is None or self._lingers:
            return False
        self._dialogue.end_of_input()
        return self._securing is None and self.transport is not None  # TLS has no half-closed connections

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone; called once or, where TLS failed, twice."""
        del error
        if self.transport is None:
            return
        self.transport = None
        if self._dialogue is not None:
            self._dialogue.client_gone()
        self._reception.leave(self, self._client if self._dialogue is not None else None)

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self.choked = True
        self._since = self.loop.time()

    def resume_writing(self) -> None:
        """The client reads again."""
        self.choked = False
        if self._dialogue is not None:
            self._dialogue.advance()

    # TLS

    def secure(self, received: bytes = b"") -> None:
        """Begin TLS; `received` are octets of the client's handshake that have been read already.

        What still comes in clear until TLS has the transport is the handshake too, and nothing else: uvloop
        begins to read behind `connection_made`, whatever was asked for in it.
        """
        self._handshake = received
        self._securing = self.loop.create_task(self._secure(cast("asyncio.Transport", self.transport)))

    def _take_handshake(self) -> bytes | None:
        received, self._handshake = self._handshake or b"", None
        return None if self.transport is None else received

    async def _secure(self, transport: asyncio.Transport) -> None:
        context = cast("Certificate", self._reception.certificate).context
        try:
            secured = await shake_hands(transport, self, context, self._take_handshake)
        except OSError as error:  # also ssl.SSLError
            self._turn_away("tls", str(error) or type(error).__name__)
            self.connection_lost(error)  # asyncio does not always say so itself
            return
        if self.transport is None:
            secured.abort()
            return
        self.transport = secured
        cast("Dialogue", self._dialogue).secured()

    # What the dialogue asks for

    def write(self, octets: bytes) -> None:
        """Send to the client."""
        if self.transport is not None:
            self.transport.write(octets)

    def hold(self, pause: bool) -> None:
        """Stop reading from the client, or go on."""
        if self.transport is None:
            return
        if pause:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def close(self) -> None:
        """Close after what has been written."""
        if self.transport is not None and not self.transport.is_closing():
            self._since = self.loop.time()
            self.transport.close()

    def linger(self) -> None:
        """Close once the client sends no more, or has had its time; it hears at once that no more comes."""
        if self.transport is None or self.transport.is_closing():
            return
        self._since = self.loop.time()
        self._lingers = self._heard = True
        if self.transport.can_write_eof():  # not within TLS
            with contextlib.suppress(OSError):  # it was closed before the last word, which met a reset
                self.transport.write_eof()

    def cut(self) -> None:
        """Drop the connection; what has not gone out is not sent any more."""
        if self.transport is not None:
            self.transport.abort()

    # What the reception asks for

    def check(self, now: float, elapsed: float) -> None:
        """Look at the waits for this client; called every `elapsed` seconds."""
        if self.transport is None:
            return
        if self.transport.is_closing():
            if now - self._since > LINGER:
                self.cut()
        elif self._lingers:
            if now - self._since > LINGER:
                self.cut()
            elif not self._heard and not self.choked:
                self.transport.close()
            self._heard = False
        elif self.choked and now - self._since > WRITE_TIMEOUT:
            self._reception.metrics.rejected("timeout")
            self.cut()
        elif self._dialogue is not None:
            self._dialogue.check(now, elapsed)
        elif now - self._since > HEADER_TIMEOUT:
            self._header = None
            self._turn_away("proxy", "no PROXY header in time")

    def drain(self) -> None:
        """Say goodbye if nothing is under way; what is under way is finished first."""
        if self._dialogue is not None:
            self._dialogue.drain()
        else:
            self.cut()

    def drop_unfinished(self) -> None:
        """Cut the session unless its client is about to hear what became of a message, or the last word."""
        if self._dialogue is None or self._dialogue.unfinished:
            self.cut()

    def make_room(self) -> None:
        """End the session: it is idle, and others have no place."""
        if self._dialogue is not None:
            self._dialogue.make_room()

    @property
    def idle_since(self) -> float | None:
        """Since when the client has nothing under way, in the loop's time; None while it has."""
        return self._dialogue.idle_since if self._dialogue is not None else None
