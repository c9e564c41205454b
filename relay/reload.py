"""A configuration that is read again while the relay runs: sessions stay, what they may do is another.

Rules: everything that can fail is read, made and opened first, beside what runs; only when nothing has failed
are parts exchanged. What differs at all `settings.changes` tells.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from relay import maillog, parts
from relay.auth import userfile
from relay.auth.userfile import UsersError
from relay.auth.users import Users
from relay.session.tls import Certificate, CertificateError
from relay.settings import SettingsError, compare
from relay.settings.address import Address

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from relay.app import Relay
    from relay.session.reception import Bound
    from relay.settings import Changes, Settings
    from relay.web import Web

__all__ = ["reload"]

REFUSALS: Final = (SettingsError, UsersError, CertificateError, OSError)
"""What says that a configuration cannot be used, here and now."""


async def reload(relay: Relay, load: Callable[[], Settings]) -> None:
    """Read the configuration again by `load`, and take into force what can be; sessions stay.

    A mistake, here or in a file that is named, or an address that is taken, changes nothing.
    """
    relay.supervisor.reloading()
    try:
        changes = compare(relay.settings, await asyncio.to_thread(load))
        fresh = await _prepare(relay, changes)
        await _exchange(relay, changes, fresh)
    except REFUSALS as error:
        for reason in _reasons(error):
            maillog.reload_refused(reason)
        relay.metrics.config_read(None)
    except Exception as error:
        maillog.unforeseen("reload", None, error)
        relay.metrics.config_read(None)
    else:
        relay.metrics.config_read(time.time())
    finally:
        relay.supervisor.ready(relay.status)


def _reasons(error: BaseException) -> list[str]:
    """Return one line for each mistake that one of REFUSALS tells of."""
    return error.problems if isinstance(error, SettingsError | UsersError) else [str(error)]


# First what can fail


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files that the configuration names hold, read and found good."""

    certificate: Certificate | None
    users: Users | None
    """Of a file that was not in use; None: the file that is will be read again, or there is none."""


def _read_files(settings: Settings, users_in_use: Path | None) -> _Files:
    """Read the files that `settings` name (it blocks); raises one of REFUSALS."""
    certificate, users = parts.certificate(settings), None
    if (path := settings.clients.users_file) is not None:
        if path == users_in_use:
            userfile.read(path)  # a mistake refuses the whole; without one the users take it at `refresh`
        else:
            users = Users(path)
    return _Files(certificate, users)


@dataclass(slots=True)
class _Fresh:
    """The parts that are ready to be exchanged."""

    files: _Files
    web: Web | None = None
    """Answers already, where the address of the HTTP side changes."""
    bound: Bound | None = None

    async def discard(self) -> None:
        """Close what was opened: the old parts stay."""
        if self.files.users is not None:
            self.files.users.close()
        if self.bound is not None:
            self.bound.discard()
        if self.web is not None:
            await self.web.stop()


async def _prepare(relay: Relay, changes: Changes) -> _Fresh:
    """Make ready what the settings ask for, all of it or, raising one of REFUSALS, nothing."""
    settings = changes.settings
    in_use = None if relay.users is None else relay.users.path
    fresh = _Fresh(await asyncio.to_thread(_read_files, settings, in_use))
    try:
        if changes.touch("http.address"):
            fresh.web = relay.make_web(settings)
            await fresh.web.start(settings.http.host, settings.http.port)
        await relay.limits.prepare(settings)
        fresh.bound = relay.reception.bind(settings)
        relay.upstreams.apply(settings)  # the last that can fail, and then nothing has changed
    except BaseException:
        await fresh.discard()
        raise
    return fresh


# Then the exchange


async def _exchange(relay: Relay, changes: Changes, fresh: _Fresh) -> None:
    """Put the settings into force. Nothing here fails for what they are."""
    settings = relay.settings = changes.settings
    maillog.configure(settings.log.format, settings.log.level)
    for warning in settings.warnings:
        maillog.warning(warning)
    relay.metrics.add_listeners(listener.address for listener in settings.listeners)
    relay.metrics.add_task_types(parts.task_types(settings))
    relay.records.follow(settings)
    _exchange_users(relay, settings, fresh.files)
    relay.use_certificate(fresh.files.certificate)
    services = relay.reception.services.renewed(
        classifier=parts.classifier(settings),
        normalize=settings.server.bare_newlines == "normalize",
        max_message_size=settings.server.max_message_size,
        limits=relay.limits.use(settings),
    )
    relay.reception.apply(settings, services, relay.certificate)
    if fresh.bound is not None:
        await relay.reception.listen(fresh.bound)
    if changes.touch("retention", "expiry"):
        await relay.records.keep_house_by(settings)
    relay.web.follow(settings)
    if fresh.web is not None:
        before, relay.web = relay.web, fresh.web
        maillog.listening(str(Address(settings.http.host, relay.web.port)))
        await before.stop()
    if changes.restart:
        maillog.reload_takes_restart(changes.restart)
    maillog.reloaded(changes.names)


def _exchange_users(relay: Relay, settings: Settings, files: _Files) -> None:
    if relay.users is not None and (files.users is not None or settings.clients.users_file is None):
        relay.users.retire()
        relay.users = None
    if files.users is not None:
        relay.users = files.users
    elif relay.users is not None:
        relay.users.refresh()
    relay.doorkeeper.authenticator = relay.authenticator(settings)
