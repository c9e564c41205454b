"""The process that is one relay: its event loop, its signals, the built-in upstream, its exit status.

SIGTERM or SIGINT ends it, a second one hurries the end; SIGHUP reads the configuration again. No decisions
about the relay's parts are made here: `app.py` starts and stops them, `reload.py` exchanges them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from typing import TYPE_CHECKING, Final

from relay import descriptors, maillog, systemd
from relay.app import Relay, StartError
from relay.reload import reload

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Coroutine

    from relay.settings import Settings

__all__ = ["run", "unless"]

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(settings: Settings, load: Callable[[], Settings], dev_upstream: socket.socket | None = None) -> int:
    """Run the relay until SIGTERM or SIGINT; return the exit status. `load` reads the settings again.

    `dev_upstream` is where the built-in upstream serves, a socket that listens; None: there is none.
    """
    maillog.configure(settings.log.format, settings.log.level)
    maillog.settings(settings.effective())
    for warning in settings.warnings:
        maillog.warning(warning)
    if (short := descriptors.shortage(settings, descriptors.raise_limit())) is not None:
        maillog.warning(short)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(settings, load, dev_upstream))


async def _serve(settings: Settings, load: Callable[[], Settings], dev_upstream: socket.socket | None) -> int:
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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # those that came while all was loaded, too
    async with _built_in_upstream(dev_upstream):
        if await unless(ended, relay.start(passed)):
            try:
                await unless(ended, _work(relay, load, wanted))
            finally:
                await relay.stop()
        else:
            maillog.stopped()
    _ignore_signals(loop)
    return 0


def _ignore_signals(loop: asyncio.AbstractEventLoop) -> None:
    """All is done: one more signal must not turn the exit status 0 into a death by signal.

    Ended handlers give way to the default, which kills; they are blocked until they can be ignored for good.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


async def _work(relay: Relay, load: Callable[[], Settings], wanted: asyncio.Event) -> None:
    """Have the relay as it is to be for long, then reload whenever it is wanted."""
    try:
        await relay.answering()
    except Exception as error:  # ends the relay, which may fail by the same: the log should have the cause
        maillog.unforeseen("http", None, error)
        raise
    gc.freeze()  # what was loaded stays: there is nothing to be found among it
    gc.enable()
    await _reloads(relay, load, wanted)


async def _reloads(relay: Relay, load: Callable[[], Settings], wanted: asyncio.Event) -> None:
    """Reload whenever it is wanted, one after the other: what is asked for during one is done behind it."""
    while True:
        await wanted.wait()
        wanted.clear()
        await reload(relay, load)


async def unless(ended: asyncio.Event, work: Coroutine[None, None, None]) -> bool:
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
async def _built_in_upstream(listening: socket.socket | None) -> AsyncIterator[None]:
    if listening is not None:
        from relay.dev import DevUpstream

        async with DevUpstream(listening):
            yield
    else:
        yield


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
