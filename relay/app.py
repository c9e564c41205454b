"""The composition root: builds the parts, starts them, looks after their time, drains and stops them.

Start: records (nothing is accepted that could not be recorded), upstreams, the address of HTTP, then the
listeners; what answers HTTP is loaded beside the first mail. Stop, in the opposite order: listeners and
sessions drain, settled messages are recorded, everything closes. While it runs `reload.py` may exchange
parts. No decisions about mail are made here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from relay import __version__, maillog, parts, systemd, transaction
from relay.auth.guard import Guard
from relay.auth.passthrough import Passthrough
from relay.auth.userfile import UsersError
from relay.auth.users import Users
from relay.bookkeeping import Bookkeeping
from relay.limits.in_force import InForce
from relay.metrics import Metrics
from relay.records.spool import SpoolError
from relay.records.store import StoreError
from relay.services import Services
from relay.session.doorkeeper import Doorkeeper
from relay.session.reception import Reception
from relay.session.tls import Certificate, CertificateError
from relay.settings.address import Address
from relay.upstream.upstreams import Upstreams
from relay.web import Overview, Reading, Web

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.session.doorkeeper import Authenticator
    from relay.settings import Settings
    from relay.web.door import Server

__all__ = ["Relay", "StartError"]

SWEEP_INTERVAL = 1.0
"""Seconds between two looks at all waits; finer where a configured wait is shorter."""


class StartError(Exception):
    """The relay cannot start; the text is one line that names what to change."""


class Relay:
    """One relay: all its parts, running between `start` and `stop`."""

    def __init__(self, settings: Settings, supervisor: systemd.Supervisor | None = None) -> None:
        """`supervisor` is whom the service manager wants told of what happens."""
        self.settings = settings
        """Those in force."""
        self.supervisor = supervisor or systemd.Supervisor()
        self.metrics = Metrics(
            upstreams=[upstream.name for upstream in settings.upstreams],
            listeners=[listener.address for listener in settings.listeners],
            task_types=parts.task_types(settings),
        )
        self._token = secrets.token_hex(6)
        self._answering: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._hurried = False
        self.records = Bookkeeping(self.metrics)
        self.limits: InForce
        self.certificate: Certificate | None = None
        self.users: Users | None = None
        self.doorkeeper: Doorkeeper
        self.upstreams: Upstreams
        self.reception: Reception
        self._overview = Overview(self.metrics, self.readiness)
        self._reading = Reading(settings.records.connect_url, aliases=partial(parts.aliases, settings))
        self.web: Web

    # Start

    async def start(self, passed: Sequence[systemd.Inherited] = ()) -> None:
        """Start everything, listeners last; raises StartError, with nothing left running.

        HTTP is answered a little later, see `answering`.
        `passed` are the sockets of listeners that a supervisor has opened.
        """
        try:
            await self._start_parts(passed)
        except (StoreError, SpoolError, CertificateError, UsersError, OSError) as error:
            await self._stop_parts()
            raise StartError(str(error)) from error
        except BaseException:  # also a signal that ends the start
            await self._stop_parts()
            raise
        self.metrics.config_read(time.time())
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep(), name="sweep")
        maillog.started(
            __version__,
            self.reception.addresses,
            [f"{upstream.name} {upstream.address}" for upstream in self.settings.upstreams],
            self.settings.records.shown_url,
            str(Address(self.settings.http.host, self.web.port)),
            compiled=not str(transaction.__file__).endswith(".py"),
        )
        self.supervisor.ready(self.status)

    async def _start_parts(self, passed: Sequence[systemd.Inherited]) -> None:
        settings, records = self.settings, self.records
        await records.start(settings)
        self.upstreams = Upstreams(settings, self.metrics, token=self._token)
        if settings.clients.users_file is not None:
            self.users = Users(settings.clients.users_file)
        self.doorkeeper = Doorkeeper(self.authenticator(settings), Guard(), self.metrics)
        if (certificate := parts.certificate(settings)) is not None:
            self.certificate = certificate
            self.metrics.certificate(certificate.not_after)
        self.limits = InForce(
            records.store,
            records.spool.directory,
            self.metrics,
            spooling=records.on_their_way,
            aliases=partial(parts.aliases, settings),
        )
        await self.limits.prepare(settings)
        self.reception = Reception(
            settings,
            self._services(settings),
            self.upstreams,
            token=self._token,
            doorkeeper=self.doorkeeper,
            certificate=self.certificate,
        )
        self.web = self.make_web(settings)
        await self.web.listen(settings.http.host, settings.http.port)
        self._answering = asyncio.get_running_loop().create_task(self.web.answer(), name="http")
        # Mail is refused with 451 while they are away; what they can do should be known before an EHLO.
        await self.upstreams.probe()
        await self.reception.open([each.socket for each in passed])

    async def answering(self) -> None:
        """Return once HTTP is answered, which begins while mail is taken; raises what cannot be loaded."""
        if self._answering is not None:
            await asyncio.shield(self._answering)

    def _services(self, settings: Settings) -> Services:
        """Return what transactions need; what was left over counts against the limits from here on."""
        limits = self.limits.use(settings)
        if limits is not None:
            limits.adopt(self.records.left_over)
        self.records.left_over.clear()
        return Services(
            recorder=self.records.recorder,
            journal=self.records.journal,
            classifier=parts.classifier(settings),
            metrics=self.metrics,
            normalize=settings.server.bare_newlines == "normalize",
            max_message_size=settings.server.max_message_size,
            settling=set(),
            running=set(),
            names=parts.pseudonyms(settings),
            limits=limits,
        )

    def authenticator(self, settings: Settings) -> Authenticator | None:
        """Return what decides about logins, if there are any."""
        if self.upstreams.passthrough is not None:
            return Passthrough(self.upstreams.passthrough)
        return self.users if settings.clients.auth == "users" else None

    def make_web(self, settings: Settings) -> Web:
        """Return the HTTP side; what it tells of goes on where its address changes."""

        def make_server() -> Server:
            from relay.web.site import make_server

            return make_server(
                settings,
                self.metrics,
                self._overview,
                self._reading,
                readiness=self.readiness,
                hostname=lambda: self.settings.server.hostname,
                listens=lambda: self.reception.addresses,
                limits=self.limits.shown,
            )

        return Web(make_server)

    # While it runs

    async def _sweep(self) -> None:
        """Look at all waits of sessions and connections, again and again."""
        loop = asyncio.get_running_loop()
        looked = loop.time()
        while True:
            await asyncio.sleep(min(SWEEP_INTERVAL, *(wait / 4 for wait in self._waits())))
            now = loop.time()
            try:
                self.supervisor.alive(now)
                self.metrics.settle()
                self.reception.sweep(now, now - looked)
                self.upstreams.sweep(now)
                self.records.journal.look()
                self.reread()
            except Exception as error:
                maillog.unforeseen("sweep", None, error)
            looked = now

    def _waits(self) -> Sequence[float]:
        server = self.settings.server
        waits = [server.idle_timeout, server.lease_idle_timeout]
        for upstream in self.settings.upstreams:
            waits += [upstream.reply_timeout, upstream.end_of_data_timeout, upstream.idle_timeout]
        if self.supervisor.watchdog_s:
            waits.append(self.supervisor.watchdog_s)
        return waits

    def reread(self) -> None:
        """Read the certificate and the users again if they have changed.

        What cannot be used is reported and changes nothing.
        """
        if self.users is not None:
            self.users.refresh()
        if self.certificate is not None:
            try:
                if self.certificate.refresh():
                    self.use_certificate(self.certificate)
            except CertificateError as error:
                maillog.certificate_refused(str(error))

    def use_certificate(self, certificate: Certificate | None) -> None:
        """Have this certificate, newly read, as the listeners'; None: none of them has TLS."""
        self.certificate = certificate
        self.metrics.certificate(None if certificate is None else certificate.not_after)
        if certificate is not None:
            maillog.certificate_read(datetime.fromtimestamp(certificate.not_after, UTC).isoformat())

    def readiness(self) -> tuple[bool, Sequence[str]]:
        """Whether the relay takes mail and can record it; lines that say why not, and how the upstream is."""
        lines = []
        if not hasattr(self, "reception") or not self.reception.addresses:
            lines.append("not listening yet")
        elif self.reception.draining:
            lines.append("draining")
        if (reason := self.records.refusal()) is not None:
            lines.append(f"records cannot be kept: {reason}")
        ready = not lines
        if ready and (reason := self.records.recorder.away()) is not None:
            lines.append(f"rows go to the spool: {reason}")
        for name, state in self.upstreams.states(asyncio.get_running_loop().time()):
            lines.append(f"upstream {name}: {state}")
        return ready, lines

    @property
    def status(self) -> str:
        """What the service manager shows of it."""
        return f"listening on {', '.join(self.reception.addresses)}"

    # Stop

    async def stop(self) -> None:
        """Drain the sessions, record what was settled, close everything."""
        self.supervisor.stopping()
        try:
            await self.reception.drain(self.settings.server.drain_timeout)
        finally:  # whatever has failed, rows are made durable, and no thread keeps the process
            await self._stop_parts()
        maillog.stopped()

    def hurry(self) -> None:
        """Wait no longer for what is under way; rows are made durable all the same."""
        if not self._hurried:
            self._hurried = True
            maillog.hurrying()
            if hasattr(self, "reception"):
                self.reception.hurry()

    async def _stop_parts(self) -> None:
        """Stop what did start."""
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait((self._answering,))
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
        if hasattr(self, "reception"):
            await self.reception.close()
        if self.users is not None:
            self.users.close()
        if hasattr(self, "upstreams"):
            await self.upstreams.close()
        await self.records.end_housekeeping()
        if hasattr(self, "limits"):
            await self.limits.close()
        try:
            await self.records.close()
        finally:
            if hasattr(self, "web"):
                await self.web.stop()
            await self._reading.close()
            self.supervisor.close()
