"""Where clients are received: who is in, how many may be, what EHLO offers, and their leaving.

Rules: what is counted in `enter` and `admit` is taken back in `leave`, once for each session. When all places
are taken, those who sit idle longest make room. All waits of all sessions are looked at by one `sweep`; no
session sets a timer for its commands.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from relay import maillog
from relay.limited import LimitedTransaction
from relay.reply import Reply
from relay.session import answers
from relay.session.blocks import BLOCK
from relay.session.listeners import Listener, address_of
from relay.session.offers import Offers
from relay.session.session import Session
from relay.transaction import Transaction

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from relay.account import Sender
    from relay.services import Services
    from relay.session.doorkeeper import Doorkeeper
    from relay.session.tls import Certificate
    from relay.settings import ListenerSettings, Settings
    from relay.upstream.capabilities import Capabilities
    from relay.upstream.upstreams import Upstreams
    from relay.upstream.xforward import Client

__all__ = ["Bound", "Reception"]

CROWDED_IDLE: Final = 10.0
"""Seconds without a transaction after which a session makes room for another when all places are taken."""
COMMIT_TIMEOUT: Final = 5.0
"""Seconds that rows of the last messages get to become durable before the sessions are cut."""


class Reception:
    """All client sessions of this relay."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        upstreams: Upstreams,
        *,
        token: str,
        doorkeeper: Doorkeeper,
        certificate: Certificate | None = None,
    ) -> None:
        """`token` marks our greeting, so that a relay that is its own upstream notices.

        `certificate` is there if a listener has TLS.
        """
        self.loop = asyncio.get_running_loop()
        self.upstreams = upstreams
        self.metrics = services.metrics
        self.doorkeeper = doorkeeper
        self.certificate = certificate
        self.block = bytearray(BLOCK)
        """Where sessions that send much at a time read into."""
        self.draining = False
        self.addresses: list[str] = []
        """Where it listens, with the ports that were really bound."""
        self._token = token
        self._sessions: set[Session] = set()
        self._clients: Counter[str] = Counter()
        self._listeners: list[Listener] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._crowded = False
        self._left = asyncio.Event()
        self._hurried = asyncio.Event()
        self._use(settings, services)

    def _use(self, settings: Settings, services: Services) -> None:
        server, clients = settings.server, settings.clients
        self._settings = settings
        self.services = services
        self.allow = clients.allow
        self.auth_without_tls = clients.auth_without_tls
        self.trusted_proxies = clients.trusted_proxies
        self.max_message_size = server.max_message_size
        self.max_recipients = server.max_recipients
        self.min_data_rate = server.min_data_rate
        self.idle_timeout = server.idle_timeout
        self.lease_idle_timeout = server.lease_idle_timeout
        self.greeting = Reply.plain(220, f"{server.hostname} ESMTP {self._token}")
        self.helo = Reply.plain(250, server.hostname)
        self._offers = Offers(
            server.hostname,
            max_message_size=server.max_message_size,
            max_recipients=server.max_recipients,
        )

    def apply(self, settings: Settings, services: Services, certificate: Certificate | None) -> None:
        """Go on with other settings; they hold for open sessions from their next command on.

        Without a new certificate the one before stays, for sessions that were offered TLS.
        """
        self._use(settings, services)
        self.certificate = certificate or self.certificate
        for session in tuple(self._sessions):
            session.reconsider()

    # Listening

    async def open(self, passed: Sequence[socket.socket] = ()) -> None:
        """Listen on every configured address; raises OSError whose text names the address.

        `passed` are listening sockets that a supervisor has opened for some of them.
        """
        await self.listen(self.bind(self._settings, passed))

    def bind(self, settings: Settings, passed: Sequence[socket.socket] = ()) -> Bound:
        """Open the addresses of `settings` that are not open yet, all or, with OSError, none of them."""
        free, given = list(self._listeners), {address_of(each): each for each in passed}
        kept: list[tuple[Listener, ListenerSettings]] = []
        opened: list[Listener] = []
        unnamed = given.keys() - {name for each in settings.listeners for name in _names(each)}
        if unnamed:
            for unused in passed:
                unused.close()
            raise OSError(f"no listener is configured for the socket that was passed: {min(unnamed)}")
        for wanted in settings.listeners:
            listener = next((each for each in free if each.settings.address == wanted.address), None)
            if listener is not None:
                free.remove(listener)
            else:
                name = next((name for name in _names(wanted) if name in given), "")
                try:
                    listener = Listener(
                        wanted, reuse_port=settings.server.reuse_port, passed=given.pop(name, None)
                    )
                except OSError as error:
                    for each in opened:
                        each.close()
                    reason = f"cannot listen on {wanted.address}: {error.strerror or error}"
                    if any(wanted.collides(each.settings) for each in free):
                        reason += " by a listener that goes: takes a restart"
                    raise OSError(reason) from error
                opened.append(listener)
            kept.append((listener, wanted))
        return Bound(kept, opened, free)

    async def listen(self, bound: Bound) -> None:
        """Serve what `bind` has opened, and listen no more where nobody wants it."""
        for listener, wanted in bound.wanted:
            listener.settings = wanted
        self._listeners = [listener for listener, _ in bound.wanted]
        self.addresses[:] = [listener.address for listener in self._listeners]
        for listener in bound.opened:
            await listener.serve(partial(Session, self))
            maillog.listening(listener.address)
        for listener in bound.unwanted:
            self._close(listener)

    async def close(self) -> None:
        """Listen no more; the sessions that are in stay in."""
        for listener in self._listeners:
            self._close(listener)
        self._listeners.clear()
        if self._accepting:
            await asyncio.wait(self._accepting)

    def _close(self, listener: Listener) -> None:
        """Close it, and let those in who had been connected by the kernel."""
        for connection in listener.close():
            accepting = self.loop.create_task(self._accept(connection, listener.settings))
            self._accepting.add(accepting)
            accepting.add_done_callback(self._accepting.discard)

    async def _accept(self, connection: socket.socket, listener: ListenerSettings) -> None:
        try:
            await self.loop.connect_accepted_socket(partial(Session, self, listener), connection)
        except OSError:
            connection.close()  # it has gone meanwhile

    # Coming and going

    def enter(self, session: Session, listener: str) -> None:
        """Count a connection in, before it is known whose it is."""
        self._sessions.add(session)
        self.metrics.session_opened(listener)

    def admit(self, sender: Sender) -> Reply | None:
        """Count a session for its client; return the refusal if there are too many."""
        self._clients[sender.client] += 1
        server = self._settings.server
        if self.draining:
            reply, reason = answers.DRAINING, "draining"
        elif len(self._sessions) > server.max_connections:
            self._crowded = True
            reply, reason = answers.TOO_MANY_CONNECTIONS, "too_many_connections"
        elif self._clients[sender.client] > server.max_connections_per_client:
            reply, reason = answers.TOO_MANY_FROM_CLIENT, "too_many_client_connections"
        else:
            return None
        self.metrics.rejected(reason)
        maillog.session_refused(sender.client, sender.listener, reason)
        return reply

    def leave(self, session: Session, client: str | None) -> None:
        """Count a session out; `client` if it was counted for one."""
        self._sessions.discard(session)
        if client is not None:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
        self.metrics.session_closed()
        if not self._sessions:
            self._left.set()

    def ehlo(self, carried: Capabilities, *, starttls: bool, mechanisms: tuple[str, ...]) -> Reply:
        """Return the EHLO reply: what the upstreams carry, and the session's own STARTTLS and AUTH."""
        return self._offers.reply(carried, starttls=starttls, mechanisms=mechanisms)

    def carried(self, sender: Sender, *, may_relay: bool, may_log_in: bool) -> Capabilities:
        """Return what the relay and every upstream can do that this sender's messages may go to."""
        found = self.upstreams.capabilities(sender, may_relay=may_relay, may_log_in=may_log_in)
        limits = self.services.limits
        if limits is not None and limits.withhold_chunking:  # the header section decides before DATA is up
            return found.without("CHUNKING", "BINARYMIME")
        return found

    def transaction(
        self, sender: Sender, reverse_path: bytes, size: int | None, client: Client | None
    ) -> Transaction:
        """Begin a transaction; `client` is who an upstream is told about, `size` what MAIL said."""
        services = self.services
        route = self.upstreams.route(sender, reverse_path, services.classifier.at_mail)
        if services.limits is None:
            return Transaction(services, route, sender, reverse_path, client)
        return LimitedTransaction(
            services, route, sender, reverse_path, client, limits=services.limits, size=size
        )

    # Time and the end

    def sweep(self, now: float, elapsed: float) -> None:
        """Look at the waits of every session, and at verdicts that are overdue."""
        for session in tuple(self._sessions):
            session.check(now, elapsed)
        for message in tuple(self.services.settling):
            message.check(now)
        if self._crowded:
            self._crowded = False
            self._make_room(now)

    def _make_room(self, now: float) -> None:
        """Somebody was turned away for want of a place: end what has been idle longest, a tenth at a time."""
        idle = [
            (since, session)
            for session in self._sessions
            if (since := session.idle_since) is not None and now - since > CROWDED_IDLE
        ]
        idle.sort(key=itemgetter(0))
        for _, session in idle[: max(1, self._settings.server.max_connections // 10)]:
            session.make_room()

    async def drain(self, timeout_s: float) -> None:
        """Take no new transaction, let those under way finish for `timeout_s` seconds, then end them all.

        A message whose end of data went up unanswered is in doubt when the time is over. `hurry` ends it.
        """
        self.draining = True
        await self.close()
        maillog.draining(len(self._sessions), timeout_s)
        for session in tuple(self._sessions):
            session.drain()
        finished = self.loop.create_task(self._finished())
        hurried = self.loop.create_task(self._hurried.wait())
        await asyncio.wait((finished, hurried), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        hurried.cancel()
        for message in tuple(self.services.settling):
            message.give_up()
        for session in tuple(self._sessions):
            session.drop_unfinished()
        settled = self.loop.create_task(self._all_settled())
        await asyncio.wait((settled,), timeout=COMMIT_TIMEOUT)
        settled.cancel()
        for session in tuple(self._sessions):
            session.cut()

    def hurry(self) -> None:
        """Let the drain, or the one that comes, wait for nothing more."""
        self._hurried.set()

    async def _finished(self) -> None:
        """Return when all sessions have left, and the messages of those whose client has gone are settled."""
        while self._sessions:
            self._left.clear()
            await self._left.wait()
        await self._all_settled()

    async def _all_settled(self) -> None:
        services = self.services
        while services.settling or services.running:
            if services.running:
                await asyncio.wait(tuple(services.running))
            else:
                services.settled.clear()
                await services.settled.wait()

    def __repr__(self) -> str:
        return f"<Reception: {len(self._sessions)} sessions, {len(self.services.settling)} settling>"


@dataclass(frozen=True, slots=True)
class Bound:
    """Addresses that are open, as some settings want them; not in force before `Reception.listen`."""

    wanted: list[tuple[Listener, ListenerSettings]]
    opened: list[Listener]
    """Those of them that are new."""
    unwanted: list[Listener]

    def discard(self) -> None:
        """Close what was opened: the settings did not come into force."""
        for listener in self.opened:
            for connection in listener.close():
                connection.close()


def _names(listener: ListenerSettings) -> tuple[str, ...]:
    """What a socket that somebody else has bound for this listener may be bound to."""
    if listener.host == "localhost":
        return tuple(f"{host}:{listener.port}" for host in ("127.0.0.1", "[::1]"))
    return (listener.address,)
