"""The composition root: builds the parts, starts them, looks after their time, drains and stops them.

Start: store, spool and recorder (nothing is accepted that could not be recorded), upstream, HTTP, then the
listeners. Stop, in the opposite order: listeners and sessions drain, settled messages are recorded, then
everything closes. No decisions about mail are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from relay import __version__, maillog
from relay.auth.guard import Guard
from relay.auth.passthrough import Passthrough
from relay.auth.userfile import UsersError
from relay.auth.users import Users
from relay.classify import Classifier
from relay.metrics import Metrics
from relay.records.expiry import ExpiryLoop
from relay.records.journal import Journal
from relay.records.recorder import USUAL_PLACE, Recorder
from relay.records.retention import Retention
from relay.records.spool import RESERVE, Spool, SpoolError
from relay.records.store import Store, StoreError, utc_now
from relay.session.doorkeeper import Doorkeeper
from relay.session.reception import Reception
from relay.session.tls import Certificate, CertificateError
from relay.transaction import Services
from relay.upstream.upstreams import Upstreams
from relay.web import Web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from relay.session.doorkeeper import Authenticator
    from relay.settings import Settings

__all__ = ["Relay", "StartError", "run"]

SWEEP_INTERVAL = 1.0
"""Seconds between two looks at all waits; finer where a configured wait is shorter."""
CLOSE_TIMEOUT = 10.0
"""Seconds that the recorder gets to make the last rows durable."""


class StartError(Exception):
    """The relay cannot start; the text is one line that names what to change."""


class Relay:
    """One relay: all its parts, running between `start` and `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(
            upstreams=[upstream.name for upstream in settings.upstreams],
            listeners=[listener.address for listener in settings.listeners],
            task_types=_named_types(settings),
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], object]] = []
        self._store: Store
        self._spool: Spool
        self._journal: Journal
        self._expiry: ExpiryLoop
        self.certificate: Certificate | None = None
        self.users: Users | None = None
        self.doorkeeper: Doorkeeper | None = None
        self.recorder: Recorder
        self.upstreams: Upstreams
        self.reception: Reception
        self.web: Web

    async def start(self) -> None:
        """Start everything, listeners last; raises StartError, with nothing left running."""
        settings = self.settings
        token = secrets.token_hex(6)
        try:
            await self._start_records()
            self.upstreams = Upstreams(settings, self.metrics, token=token)
            services = Services(
                recorder=self.recorder,
                journal=self._journal,
                classifier=_classifier(settings),
                metrics=self.metrics,
                normalize=settings.server.bare_newlines == "normalize",
                max_message_size=settings.server.max_message_size,
                settling=set(),
                running=set(),
            )
            self.doorkeeper = self._let_in()
            self.certificate = _certificate(settings)
            if self.certificate is not None:
                self.metrics.certificate(self.certificate.not_after)
            self.reception = Reception(
                settings,
                services,
                self.upstreams,
                token=token,
                certificate=self.certificate,
                doorkeeper=self.doorkeeper,
            )
            self.web = Web(self.metrics, self.readiness)
            await self.web.start(settings.http.host, settings.http.port)
            # Mail is refused with 451 while they are away; what they can do should be known before an EHLO.
            await self.upstreams.probe()
            await self.reception.open()
        except (StoreError, SpoolError, CertificateError, UsersError, OSError) as error:
            await self._stop_parts()
            raise StartError(str(error)) from error
        self._spawn(self._sweep())
        maillog.started(
            __version__,
            self.reception.addresses,
            [f"{upstream.name} {upstream.address}" for upstream in settings.upstreams],
            settings.records.url,
            f"{settings.http.host}:{self.web.port}",
        )

    async def _start_records(self) -> None:
        records, kept = self.settings.records, self.settings.retention
        self._store = await Store.open(records.url, Retention.of_seconds(kept.default, kept.by_type))
        connections = sum(upstream.max_connections for upstream in self.settings.upstreams)
        self._spool = Spool(records.spool, max(RESERVE, connections * USUAL_PLACE))
        self._journal = Journal(self._spool.directory, connections)
        self.recorder = Recorder(
            self._store,
            self._spool,
            self.metrics,
            commit_timeout=records.commit_timeout,
            log_lost=lambda entry: maillog.row_lost(entry, "neither store nor spool took it"),
            refuse_while_away=records.when_unavailable == "refuse",
        )
        self.recorder.start()
        self._take_over_doubts()
        self._expiry = ExpiryLoop(
            self._store,
            self.metrics,
            interval=self.settings.expiry.interval,
            batch_size=self.settings.expiry.batch_size,
            clock=utc_now,
            on_run=maillog.expiry_done,
            on_error=lambda error: maillog.expiry_failed(str(error)),
            on_progress=maillog.expiry_progress,
            on_behind=maillog.expiry_behind,
        )
        self._spawn(self._keep_house())

    def _take_over_doubts(self) -> None:
        """Keep what a process before this one has left in the journal; a slot is free once that is durable.

        What has its row in the store, or is in the spool before it, makes no entry: the store sees to that.
        """
        for slot, doubt in self._journal.found:
            maillog.found_in_journal(doubt)
            self.recorder.record(doubt).add_done_callback(partial(self._free_slot, slot))

    def _free_slot(self, slot: int, kept: asyncio.Future[None]) -> None:
        if not kept.cancelled():
            self._journal.free(slot)

    def _let_in(self) -> Doorkeeper | None:
        """Build what decides about logins, if there are any; raises UsersError."""
        clients = self.settings.clients
        authenticator: Authenticator
        if self.upstreams.passthrough is not None:
            authenticator = Passthrough(self.upstreams.passthrough)
        elif clients.users_file is not None:
            authenticator = self.users = Users(clients.users_file)
        else:
            return None
        return Doorkeeper(authenticator, Guard(), self.metrics)

    async def _keep_house(self) -> None:
        """Make existing rows follow changed retention settings, then delete what expires, for ever."""
        try:
            changed = await self._store.follow_retention(on_due=maillog.retention_shortened)
            if changed:
                maillog.retention_changed(changed)
        except StoreError as error:
            self.metrics.record_error()
            maillog.expiry_failed(f"rows do not follow the changed retention yet: {error}")
        self._expiry.start()

    def reread(self, *, force: bool = True) -> None:
        """Read the certificate and the users again, those that have changed or, with `force`, all of them.

        What cannot be used is reported and changes nothing.
        """
        if self.users is not None:
            self.users.refresh()
        if self.certificate is not None:
            try:
                changed = self.certificate.refresh(force=force)
            except CertificateError as error:
                maillog.certificate_refused(str(error))
            else:
                if changed:
                    self.metrics.certificate(self.certificate.not_after)
                    maillog.certificate_read(_date(self.certificate.not_after))

    async def stop(self) -> None:
        """Drain the sessions, record what was settled, close everything."""
        await self.reception.drain(self.settings.server.drain_timeout)
        await self._stop_parts()
        maillog.stopped()

    async def _stop_parts(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "reception"):
            await self.reception.close()
        if self.users is not None:
            self.users.close()
        if hasattr(self, "upstreams"):
            await self.upstreams.close()
        await self._stop_records()
        if hasattr(self, "web"):
            await self.web.stop()

    async def _stop_records(self) -> None:
        if hasattr(self, "_expiry"):
            await self._expiry.stop()
        if hasattr(self, "recorder"):
            await self.recorder.close(CLOSE_TIMEOUT)
        if hasattr(self, "_journal"):
            self._journal.close()
        if hasattr(self, "_spool"):
            self._spool.close()
        if hasattr(self, "_store"):
            await self._store.close()

    def readiness(self) -> tuple[bool, Sequence[str]]:
        """Whether the relay takes mail and can record it; lines that say why not, and how the upstream is."""
        lines = []
        if not hasattr(self, "reception") or not self.reception.addresses:
            lines.append("not listening yet")
        elif self.reception.draining:
            lines.append("draining")
        if (reason := self.recorder.refusal() or self._journal.refusal()) is not None:
            lines.append(f"records cannot be kept: {reason}")
        ready = not lines
        if ready and (reason := self.recorder.away()) is not None:
            lines.append(f"rows go to the spool: {reason}")
        for name, state in self.upstreams.states(asyncio.get_running_loop().time()):
            lines.append(f"upstream {name}: {state}")
        return ready, lines

    # Time

    async def _sweep(self) -> None:
        """Look at all waits of sessions and connections, again and again."""
        loop = asyncio.get_running_loop()
        interval = min(SWEEP_INTERVAL, *(wait / 4 for wait in self._waits()))
        looked = loop.time()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            try:
                self.reception.sweep(now, now - looked)
                self.upstreams.sweep(now)
                self.reread(force=False)
            except Exception as error:
                maillog.unforeseen("sweep", None, error)
            looked = now

    def _waits(self) -> Sequence[float]:
        server = self.settings.server
        waits = [server.idle_timeout, server.lease_idle_timeout]
        for upstream in self.settings.upstreams:
            waits += [upstream.reply_timeout, upstream.end_of_data_timeout, upstream.idle_timeout]
        return waits

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run(settings: Settings) -> int:
    """Run the relay until SIGTERM or SIGINT; return the exit status."""
    maillog.configure(settings.log.format, settings.log.level)
    maillog.settings(settings.effective())
    for warning in settings.warnings:
        maillog.warning(warning)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unhandled)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    relay = Relay(settings)
    async with _built_in_upstream(settings):
        await relay.start()
        loop.add_signal_handler(signal.SIGHUP, relay.reread)
        await ended.wait()
        await relay.stop()
    return 0


@contextlib.asynccontextmanager
async def _built_in_upstream(settings: Settings) -> AsyncIterator[None]:
    if settings.dev:
        from relay.dev import DevUpstream

        async with DevUpstream(settings.upstreams[0].host, settings.upstreams[0].port):
            yield
    else:
        yield


def _certificate(settings: Settings) -> Certificate | None:
    tls = settings.tls
    if tls.cert is None or tls.key is None or all(each.tls == "none" for each in settings.listeners):
        return None
    return Certificate(tls.cert, tls.key)


def _date(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat()


def _classifier(settings: Settings) -> Classifier:
    found = settings.task_type
    return Classifier(
        headers=found.headers,
        default=found.default,
        id_header=found.id_header,
        rules=[(rule.sender or "<>", rule.type) for rule in found.rules],
        keep=settings.records.headers,
    )


def _named_types(settings: Settings) -> Sequence[str]:
    named = [settings.task_type.default, *settings.retention.by_type]
    named += [rule.type for rule in settings.task_type.rules]
    return list(dict.fromkeys(named))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loop where it installs: much less CPU for many small reads and writes."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _unhandled(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    error = context.get("exception")
    known = error if isinstance(error, BaseException) else RuntimeError(str(context.get("message")))
    maillog.unforeseen("event loop", None, known)
