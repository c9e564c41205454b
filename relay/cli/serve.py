"""`relay serve`: a relay in the foreground."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import ConfigOption, find, loaded, loader
from relay.cli.failure import CommandError
from relay.cli.streams import let_go
from relay.exhausted import exhausted

if TYPE_CHECKING:
    import socket

__all__ = ["serve"]


def serve(
    config: ConfigOption = None,
    dev: Annotated[
        bool,
        typer.Option("--dev", help="Relay to a built-in upstream that accepts everything and sends nothing."),
    ] = False,
) -> int:
    """Run the relay in the foreground, until SIGTERM or SIGINT."""
    path = find(config, os.environ, dev=dev)
    gc.disable()  # until all is loaded
    with _signals_held():
        if not dev:
            return _serve(path)
        from relay.dev import listen_usually

        try:
            upstream = listen_usually()
        except OSError as error:
            raise CommandError([f"relay: cannot start: the built-in upstream: {error.strerror}"]) from None
        with upstream:
            return _serve(path, upstream)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Have signals wait while all is loaded, which is most of a start, until `process.py` hears them.

    By themselves SIGHUP would end the process, SIGINT with a traceback, and SIGTERM would be lost on
    process 1 of a container. Where a start fails there is nobody to hear them: it ends, and says why.
    """
    held = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        while held & signal.sigpending():
            signal.sigwait(held)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(path: Path | None, upstream: socket.socket | None = None) -> int:
    """Run the relay, with a built-in upstream where there is a socket for one."""
    address = None if upstream is None else "{}:{}".format(*upstream.getsockname())
    load = loader(path, dev_upstream=address)
    settings = loaded(load)
    from relay.app import StartError
    from relay.process import run

    try:
        return run(settings, load, upstream)
    except (StartError, OSError) as error:
        raise CommandError([f"relay: cannot start: {exhausted(error) or error}"]) from None
    finally:
        let_go()  # lines of the log that could not be written are no failure of the command
