"""The composition root: builds the parts, starts them, looks after their time, drains and stops them.

Start: store, spool and recorder (nothing is accepted that could not be recorded), upstream, HTTP, then the
listeners. Reload: everything that can fail is made ready first (`reload.py`), then parts are exchanged. Stop,
in the opposite order of the start: listeners and sessions drain, settled messages are recorded, everything
closes. No decisions about mail are made here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from relay import __version__, descriptors, maillog, parts, systemd
from relay.auth.guard import Guard
from relay.auth.passthrough import Passthrough
from relay.auth.userfile import UsersError
from relay.auth.users import Users
from relay.limits.configured import rules_of
from relay.limits.limits import Limits
from relay.limits.now import LimitState, limits_now
from relay.limits.presence import Presence, name_in
from relay.metrics import Metrics
from relay.records.agreement import AGAIN_S, Agreement
from relay.records.counts import StoredCounts, counts_of
from relay.records.expiry import ExpiryLoop
from relay.records.inspection import entries_waiting
from relay.records.journal import Journal
from relay.records.model import Doubt, Record
from relay.records.recorder import USUAL_PLACE, Recorder
from relay.records.spool import RESERVE, Spool, SpoolError
from relay.records.store import Store, StoreError, open_store, utc_now
from relay.reload import REFUSALS, Files, Fresh, read_files, reasons
from relay.session.doorkeeper import Doorkeeper
from relay.session.reception import Reception
from relay.session.tls import Certificate, CertificateError
from relay.settings import Changes, Settings, compare
from relay.transaction import Services
from relay.upstream.upstreams import Upstreams
from relay.web import Access, Api, Overview, Page, Reading, Site, Web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from relay.records.retention import Retention
    from relay.session.doorkeeper import Authenticator

__all__ = ["Relay", "StartError", "run"]

SWEEP_INTERVAL = 1.0
"""Seconds between two looks at all waits; finer where a configured wait is shorter."""
CLOSE_TIMEOUT = 10.0
"""Seconds that the recorder gets to make the last rows durable."""


class StartError(Exception):
    """The relay cannot start; the text is one line that names what to change."""


class Relay:
    """One relay: all its parts, running between `start` and `stop`."""

    def __init__(self, settings: Settings, supervisor: systemd.Supervisor | None = None) -> None:
        """`supervisor` is whom the service manager wants told of what happens."""
        self.settings = settings
        """Those in force."""
        self._supervisor = supervisor or systemd.Supervisor()
        self.metrics = Metrics(
            upstreams=[upstream.name for upstream in settings.upstreams],
            listeners=[listener.address for listener in settings.listeners],
            task_types=parts.task_types(settings),
        )
        self._token = secrets.token_hex(6)
        self._tasks: set[asyncio.Task[None]] = set()
        self._house: asyncio.Task[None] | None = None
        self._agreement: Agreement
        self._retention: Retention | None = None  # that holds, of all relays on the store
        self._hurried = False
        self._store: Store
        self._spool: Spool
        self._journal: Journal
        self._expiry: ExpiryLoop
        self._limits: Limits | None = None
        self._counts: StoredCounts
        self._presence: Presence
        self._left_over: list[Record | Doubt] = []  # by the process before, and not in the store yet
        self._taken_over: set[asyncio.Future[None]] = set()
        self.certificate: Certificate | None = None
        self.users: Users | None = None
        self.doorkeeper: Doorkeeper
        self.recorder: Recorder
        self.upstreams: Upstreams
        self.reception: Reception
        self._overview = Overview(self.metrics, self.readiness)
        names = parts.pseudonyms(settings)
        self._reading = Reading(
            settings.records.connect_url, aliases=None if names is None else names.aliases
        )
        self.web: Web

    async def start(self, passed: Sequence[systemd.Inherited] = ()) -> None:
        """Start everything, listeners last; raises StartError, with nothing left running.

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
        self._spawn(self._sweep()).set_name("sweep")
        maillog.started(
            __version__,
            self.reception.addresses,
            [f"{upstream.name} {upstream.address}" for upstream in self.settings.upstreams],
            self.settings.records.shown_url,
            f"{self.settings.http.host}:{self.web.port}",
        )
        self._supervisor.ready(self._status)

    async def _start_parts(self, passed: Sequence[systemd.Inherited]) -> None:
        settings = self.settings
        await self._start_records()
        self.upstreams = Upstreams(settings, self.metrics, token=self._token)
        services = Services(
            recorder=self.recorder,
            journal=self._journal,
            classifier=parts.classifier(settings),
            metrics=self.metrics,
            normalize=settings.server.bare_newlines == "normalize",
            max_message_size=settings.server.max_message_size,
            settling=set(),
            running=set(),
            names=parts.pseudonyms(settings),
        )
        if settings.clients.users_file is not None:
            self.users = Users(settings.clients.users_file)
        self.doorkeeper = Doorkeeper(self._authenticator(settings), Guard(), self.metrics)
        self.certificate = parts.certificate(settings)
        if self.certificate is not None:
            self.metrics.certificate(self.certificate.not_after)
        await self._make_limits(settings)
        services = replace(services, limits=self._limits_of(settings))
        if services.limits is not None:
            services.limits.adopt(self._left_over)
        self._left_over.clear()
        self.reception = Reception(
            settings,
            services,
            self.upstreams,
            token=self._token,
            doorkeeper=self.doorkeeper,
            certificate=self.certificate,
        )
        self.web = self._web(settings)
        await self.web.start(settings.http.host, settings.http.port)
        # Mail is refused with 451 while they are away; what they can do should be known before an EHLO.
        await self.upstreams.probe()
        await self.reception.open([each.socket for each in passed])

    async def _make_limits(self, settings: Settings) -> None:
        """Have limits ready if there are to be any; once made they go on with what they have counted."""
        if self._limits is None and settings.limits:
            name = await asyncio.to_thread(name_in, self._spool.directory)
            self._counts = counts_of(settings.records.connect_url)
            self._limits = Limits(
                self._counts, self.metrics, clock=time.time, spooling=self._rows_are_on_their_way
            )
            self._presence = Presence(self._store, self._counts, self._limits, name)
            await self._presence.start()

    def _limits_of(self, settings: Settings) -> Limits | None:
        """Put the limits of the settings into force, and return them if there are any."""
        rules = rules_of(settings.limits)
        self.metrics.add_limits((rule.name, rule.action) for rule in rules)
        if self._limits is not None:
            self._limits.use(rules)
        return self._limits if rules else None

    async def limits_now(self) -> list[LimitState]:
        """Return each limit, and who is near it or over it; raises StoreError."""
        if self._limits is None or not self._limits.rules:
            return []
        return await limits_now(self._counts, self._limits.rules, self._limits.clock())

    async def _limits_shown(self) -> list[dict[str, Any]]:
        return [limit.plain() for limit in await self.limits_now()]

    def _rows_are_on_their_way(self) -> bool:
        """Whether there may be rows of this relay that are durable and not in the store."""
        return bool(self._taken_over) or self.recorder.away() is not None

    def _web(self, settings: Settings) -> Web:
        """Return the HTTP side; what it tells of goes on where its address changes."""
        page = Page(
            self._reading,
            self._overview,
            hostname=lambda: self.settings.server.hostname,
            listens=lambda: self.reception.addresses,
            limits=self._limits_shown,
        )
        api = Api(self._reading, self._overview, self._limits_shown)
        site = Site(Access(settings), self._overview, [api, page])
        return Web(self.metrics, self.readiness, site)

    async def _start_records(self) -> None:
        records = self.settings.records
        self._store = await open_store(
            records.connect_url,
            parts.retention(self.settings),
            later=True,
            relay=self.settings.relay_name,
        )
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
        if self.settings.limits:
            self._left_over += await asyncio.to_thread(entries_waiting, self._spool.directory)
        self.recorder.start()
        self._take_over_doubts()
        name = await asyncio.to_thread(name_in, self._spool.directory)
        self._agreement = Agreement(
            self._store,
            f"{self.settings.relay_name}/{name.partition(':')[2][:8]}",
            parts.retention(self.settings),
            clock=utc_now,
            on_differ=maillog.retention_differs,
        )
        await self._agree()
        self._begin_housekeeping()

    def _begin_housekeeping(self) -> None:
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
        self._house = self._spawn(self._keep_house())

    async def _end_housekeeping(self) -> None:
        if self._house is not None:
            self._house.cancel()
            await asyncio.wait((self._house,))
            await self._expiry.stop()

    def _take_over_doubts(self) -> None:
        """Keep what a process before this one has left in the journal; a slot is free once that is durable.

        What has its row in the store, or is in the spool before it, makes no entry: the store sees to that.
        """
        for slot, doubt in self._journal.found:
            maillog.found_in_journal(doubt)
            kept = self.recorder.record(doubt)
            kept.add_done_callback(partial(self._free_slot, slot))
            self._left_over.append(doubt)
            self._taken_over.add(kept)
            kept.add_done_callback(self._taken_over.discard)

    def _free_slot(self, slot: int, kept: asyncio.Future[None]) -> None:
        if not kept.cancelled():
            self._journal.free(slot)

    async def _keep_house(self) -> None:
        """Delete what expires, for ever; make existing rows follow the retention whenever it changes."""
        followed = await self._follow()
        self._expiry.start()
        while True:
            await asyncio.sleep(AGAIN_S)
            if await self._agree() or not followed:
                followed = await self._follow()

    async def _agree(self) -> bool:
        """See which retention holds, ours or the longer one of another relay; return whether it changed."""
        try:
            found = await self._agreement.reach()
        except StoreError:
            return False  # while the store is away the last one holds
        before, self._retention = self._retention, found
        if before is not None and before.canonical() == found.canonical():
            return False
        self._store.use_retention(found)
        return True

    async def _follow(self) -> bool:
        """Return whether the rows that exist follow the retention that holds."""
        try:
            changed = await self._store.follow_retention(on_due=maillog.retention_shortened)
        except StoreError as error:
            self.metrics.record_error()
            maillog.expiry_failed(f"rows do not follow the changed retention yet: {error}")
            return False
        if changed:
            maillog.retention_changed(changed)
        return True

    def _authenticator(self, settings: Settings) -> Authenticator | None:
        """Return what decides about logins, if there are any."""
        if self.upstreams.passthrough is not None:
            return Passthrough(self.upstreams.passthrough)
        return self.users if settings.clients.auth == "users" else None

    # Files that change

    def reread(self) -> None:
        """Read the certificate and the users again if they have changed.

        What cannot be used is reported and changes nothing.
        """
        if self.users is not None:
            self.users.refresh()
        if self.certificate is not None:
            try:
                if self.certificate.refresh():
                    self._certificate_read(self.certificate)
            except CertificateError as error:
                maillog.certificate_refused(str(error))

    def _certificate_read(self, certificate: Certificate) -> None:
        self.metrics.certificate(certificate.not_after)
        maillog.certificate_read(_date(certificate.not_after))

    # Reload

    async def reload(self, load: Callable[[], Settings]) -> None:
        """Read the configuration again by `load`, and take into force what can be; sessions stay.

        A mistake, here or in a file that is named, or an address that is taken, changes nothing.
        """
        self._supervisor.reloading()
        try:
            changes = compare(self.settings, await asyncio.to_thread(load))
            fresh = await self._prepare(changes)
            await self._exchange(changes, fresh)
        except REFUSALS as error:
            for reason in reasons(error):
                maillog.reload_refused(reason)
            self.metrics.config_read(None)
        except Exception as error:
            maillog.unforeseen("reload", None, error)
            self.metrics.config_read(None)
        else:
            self.metrics.config_read(time.time())
        finally:
            self._supervisor.ready(self._status)

    async def _prepare(self, changes: Changes) -> Fresh:
        """Make ready what the settings ask for, all of it or, raising one of REFUSALS, nothing."""
        settings = changes.settings
        in_use = None if self.users is None else self.users.path
        fresh = Fresh(await asyncio.to_thread(read_files, settings, in_use))
        try:
            if changes.touch("http.address"):
                fresh.web = self._web(settings)
                await fresh.web.start(settings.http.host, settings.http.port)
            await self._make_limits(settings)
            fresh.bound = self.reception.bind(settings)
            self.upstreams.apply(settings)  # the last that can fail, and then nothing has changed
        except BaseException:
            await fresh.discard()
            raise
        return fresh

    async def _exchange(self, changes: Changes, fresh: Fresh) -> None:
        """Put the settings into force. Nothing here fails for what they are."""
        settings = self.settings = changes.settings
        maillog.configure(settings.log.format, settings.log.level)
        for warning in settings.warnings:
            maillog.warning(warning)
        self.metrics.add_listeners(listener.address for listener in settings.listeners)
        self.metrics.add_task_types(parts.task_types(settings))
        self.recorder.follow(
            commit_timeout=settings.records.commit_timeout,
            refuse_while_away=settings.records.when_unavailable == "refuse",
        )
        self._exchange_users(settings, fresh.files)
        if fresh.files.certificate is not None:
            self.certificate = fresh.files.certificate
            self._certificate_read(self.certificate)
        services = replace(
            self.reception.services,
            classifier=parts.classifier(settings),
            normalize=settings.server.bare_newlines == "normalize",
            max_message_size=settings.server.max_message_size,
            limits=self._limits_of(settings),
        )
        self.reception.apply(settings, services, self.certificate)
        if fresh.bound is not None:
            await self.reception.listen(fresh.bound)
        if changes.touch("retention", "expiry"):
            await self._end_housekeeping()
            self._agreement.own = parts.retention(settings)
            self._store.use_retention(self._agreement.own)
            self._retention = None
            await self._agree()
            self._begin_housekeeping()
        self.web.follow(settings)
        if fresh.web is not None:
            before, self.web = self.web, fresh.web
            maillog.listening(f"{settings.http.host}:{self.web.port}")
            await before.stop()
        if changes.restart:
            maillog.reload_takes_restart(changes.restart)
        maillog.reloaded(changes.names)

    def _exchange_users(self, settings: Settings, files: Files) -> None:
        if self.users is not None and (files.users is not None or settings.clients.users_file is None):
            self.users.retire()
            self.users = None
        if files.users is not None:
            self.users = files.users
        elif self.users is not None:
            self.users.refresh()
        self.doorkeeper.authenticator = self._authenticator(settings)

    @property
    def _status(self) -> str:
        return f"listening on {', '.join(self.reception.addresses)}"

    # Stop

    async def stop(self) -> None:
        """Drain the sessions, record what was settled, close everything."""
        self._supervisor.stopping()
        await self.reception.drain(self.settings.server.drain_timeout)
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
        await self._reading.close()
        self._supervisor.close()

    async def _stop_records(self) -> None:
        if hasattr(self, "_expiry"):
            await self._expiry.stop()
        if self._limits is not None:
            await self._presence.stop()
            await self._limits.close()
            await self._counts.close()
        if hasattr(self, "recorder"):
            await self.recorder.close(CLOSE_TIMEOUT)
        if hasattr(self, "_journal"):
            self._journal.close()
        if hasattr(self, "_spool"):
            self._spool.close()
        if hasattr(self, "_agreement"):
            with contextlib.suppress(StoreError):  # it runs out
                await self._agreement.leave()
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
        looked = loop.time()
        while True:
            await asyncio.sleep(min(SWEEP_INTERVAL, *(wait / 4 for wait in self._waits())))
            now = loop.time()
            try:
                self._supervisor.alive(now)
                self.metrics.settle()
                self.reception.sweep(now, now - looked)
                self.upstreams.sweep(now)
                self.reread()
            except Exception as error:
                maillog.unforeseen("sweep", None, error)
            looked = now

    def _waits(self) -> Sequence[float]:
        server = self.settings.server
        waits = [server.idle_timeout, server.lease_idle_timeout]
        for upstream in self.settings.upstreams:
            waits += [upstream.reply_timeout, upstream.end_of_data_timeout, upstream.idle_timeout]
        if self._supervisor.watchdog_s:
            waits.append(self._supervisor.watchdog_s)
        return waits

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def run(settings: Settings, load: Callable[[], Settings]) -> int:
    """Run the relay until SIGTERM or SIGINT; return the exit status. `load` reads the settings again."""
    maillog.configure(settings.log.format, settings.log.level)
    maillog.settings(settings.effective())
    for warning in settings.warnings:
        maillog.warning(warning)
    if (short := descriptors.shortage(settings, descriptors.raise_limit())) is not None:
        maillog.warning(short)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings, load))


async def _serve(settings: Settings, load: Callable[[], Settings]) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unhandled)
    try:
        passed = systemd.inherited(os.environ)
    except systemd.ActivationError as error:
        raise StartError(str(error)) from None
    relay = Relay(settings, systemd.Supervisor.of(os.environ))
    ended, wanted = asyncio.Event(), asyncio.Event()

    def end() -> None:
        if ended.is_set():
            relay.hurry()
        ended.set()

    def again() -> None:
        if ended.is_set():
            maillog.reload_ignored("the relay is stopping")
        wanted.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, again)
    async with _built_in_upstream(settings):
        if await _unless(ended, relay.start(passed)):
            await _unless(ended, _reloads(relay, load, wanted))
            await relay.stop()
        else:
            maillog.stopped()
    _ignore_signals(loop)
    return 0


def _ignore_signals(loop: asyncio.AbstractEventLoop) -> None:
    """All is done: one more signal must not turn the exit status 0 into a death by signal.

    Ended handlers give way to the default, which kills; they are blocked until they can be ignored for good.
    """
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


async def _reloads(relay: Relay, load: Callable[[], Settings], wanted: asyncio.Event) -> None:
    """Reload whenever it is wanted, one after the other: what is asked for during one is done behind it."""
    while True:
        await wanted.wait()
        wanted.clear()
        await relay.reload(load)


async def _unless(ended: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
    """Do the work, and return True, unless the end comes first: then it is cancelled, and cleans up."""
    doing, ending = asyncio.ensure_future(work), asyncio.ensure_future(ended.wait())
    await asyncio.wait((doing, ending), return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not doing.done():
        doing.cancel()
        await asyncio.wait((doing,))
        if doing.cancelled():
            return False
    doing.result()  # also where it was done before it could be cancelled
    return True


@contextlib.asynccontextmanager
async def _built_in_upstream(settings: Settings) -> AsyncIterator[None]:
    if settings.dev:
        from relay.dev import DevUpstream

        async with DevUpstream(settings.upstreams[0].host, settings.upstreams[0].port):
            yield
    else:
        yield


def _date(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat()


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
