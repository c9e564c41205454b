"""The commands: each one finds the settings, calls the part that does the work, and says what came of it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay import __version__
from relay.cli.configuration import OF_THE_RECORDS, ConfigOption, configured, find, loaded, loader
from relay.cli.failure import CommandError
from relay.cli.forget import forget
from relay.cli.health import health
from relay.cli.limits import limits
from relay.cli.migrate import migrate_store
from relay.cli.sends import sends
from relay.cli.spool import spool
from relay.cli.stats import stats
from relay.cli.streams import let_go, not_written
from relay.cli.user import user

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from relay.selftest import Finding
    from relay.settings import HttpSettings, ListenerSettings, Settings, UpstreamSettings

__all__ = ["app"]


class Shape(StrEnum):
    """How findings are written."""

    TEXT = "text"
    JSON = "json"


app = typer.Typer(
    help="SMTP relay proxy that records sends.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes, and quick to print
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"relay {__version__}")
        raise typer.Exit


@app.callback()
def relay(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SMTP relay proxy that records sends."""


@app.command()
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
    process 1 of a container.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
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
        raise CommandError([f"relay: cannot start: {error}"]) from None
    finally:
        let_go()  # lines of the log that could not be written are no failure of the command


@app.command()
def check(
    config: ConfigOption = None,
    connect: Annotated[bool, typer.Option("--connect", help="Try the upstreams and the store too.")] = False,
) -> int:
    """Validate the configuration and say what it means."""
    path = find(config, os.environ)
    settings = configured(path)
    if settings.clients.users_file is not None:
        _check_users(settings.clients.users_file)
    typer.echo(f"{path} is valid.")
    for what, text in _summary(settings):
        typer.echo(f"  {what:<10} {text}")
    for warning in settings.warnings:
        typer.echo(f"relay: warning: {warning}", err=True)
    return _connect(settings) if connect else 0


def _check_users(path: Path) -> None:
    from relay.auth.userfile import UsersError, read

    try:
        read(path)
    except UsersError as error:
        raise CommandError([f"relay: {problem}" for problem in error.problems], status=2) from None


@app.command()
def selftest(
    config: ConfigOption = None,
    shape: Annotated[
        Shape, typer.Option("--format", metavar="text|json", help="How findings are written.")
    ] = Shape.TEXT,
) -> int:
    """Look for an open relay: probe the running listeners as a stranger would. Sends no mail."""
    settings = configured(find(config, os.environ), without=("upstreams",))
    from relay.selftest import selftest as findings

    if shape is Shape.JSON:
        import json

        found = [finding._asdict() for finding in findings(settings)]
        typer.echo(json.dumps(found, indent=2))
        return int(any(finding["level"] == "failed" for finding in found))
    return _tell(findings(settings))


@app.command()
def expire(
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the rows, delete none.")] = False,
) -> int:
    """Delete the expired rows once, for cron or another scheduler."""
    settings = configured(find(config, os.environ), without=OF_THE_RECORDS)
    import asyncio

    from relay.records.store import StoreError

    try:
        rows = asyncio.run(_expire(settings, dry_run=dry_run))
    except StoreError as error:
        raise CommandError([f"relay: {error}"]) from None
    noun = "row" if rows == 1 else "rows"
    typer.echo(f"{rows} expired {noun} would be deleted" if dry_run else f"{rows} expired {noun} deleted")
    return 0


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Where its configuration and records go.")
    ] = Path("demo"),
    within: Annotated[
        str, typer.Option("--within", metavar="DURATION", help="How long the hour takes.")
    ] = "1m",
    leave: Annotated[bool, typer.Option("--exit", help="End when the hour is over.")] = False,
) -> int:
    """Play an hour of a small product's mail through a relay, to have something to look at."""
    from relay.app import StartError
    from relay.demo import configuration
    from relay.demo import demo as play
    from relay.settings import SettingsError
    from relay.settings.units import parse_duration

    try:
        seconds = parse_duration(within)
    except ValueError as error:
        raise CommandError([f"relay: --within: {error}"], 2) from None
    if not seconds:
        raise CommandError(["relay: --within: must be longer than nothing"], 2)
    import asyncio

    try:
        file = configuration(directory)
        asyncio.run(play(file, os.environ, seconds=seconds, leave=leave, tell=typer.echo))
    except SettingsError as error:
        raise CommandError([f"relay: {problem}" for problem in error.problems], 2) from None
    except (StartError, OSError) as error:
        if isinstance(error, BrokenPipeError) or not_written(error):
            raise
        lines = [f"relay: the demonstration cannot start: {error}"]
        if os.strerror(errno.EADDRINUSE) in str(error):
            lines.append(
                f"relay: end the relay that runs here, or change the addresses in {directory}/relay.toml"
            )
        raise CommandError(lines) from None
    return 0


@app.command()
def schema() -> int:
    """Print the JSON Schema of the configuration."""
    import json

    from relay.settings import schema as settings_schema

    typer.echo(json.dumps(settings_schema(), indent=2))
    return 0


app.command()(health)
app.add_typer(sends, name="sends")
app.command()(stats)
app.command()(forget)
app.command()(limits)
app.command(name="migrate-store")(migrate_store)
app.add_typer(user, name="user")
app.add_typer(spool, name="spool")


def _tell(findings: Iterable[Finding]) -> int:
    """Print findings as they come, those of one place together; return the exit status."""
    from relay.maillog.console import coloured

    colours = {"ok": "green", "note": "yellow", "failed": "red"}
    shows = coloured(sys.stdout)
    counts = dict.fromkeys(colours, 0)
    place = ""
    for where, level, text in findings:
        if where != place:
            typer.echo(where)
            place = where
        counts[level] += 1
        shown = text.replace("\n", " / ")  # a reply of several lines
        level_shown = typer.style(f"{level:<6}", fg=colours[level])
        typer.echo(f"  {level_shown}  {shown}", color=shows)
    typer.echo(", ".join(f"{count} {level}" for level, count in counts.items()))
    return 1 if counts["failed"] else 0


def _connect(settings: Settings) -> int:
    from relay.maillog.console import coloured
    from relay.probe import probe

    shows = coloured(sys.stdout)
    failed = False
    for what, ok, detail in probe(settings):
        failed = failed or not ok
        typer.echo(
            f"  {typer.style('ok', fg='green') if ok else typer.style('failed', fg='red')}  {what}: {detail}",
            color=shows,
        )
    return 1 if failed else 0


async def _expire(settings: Settings, *, dry_run: bool) -> int:
    from relay.records.retention import Retention
    from relay.records.store import open_store

    retention = Retention.of_seconds(settings.retention.default, settings.retention.by_type)
    url = settings.records.connect_url
    store = await open_store(url, retention, create=False, upgrade=not dry_run)
    now = datetime.now(UTC)
    try:
        if dry_run or not sys.stderr.isatty():
            return await store.expire(now, settings.expiry.batch_size, dry_run=dry_run)
        with _Progress(await store.expire(now, settings.expiry.batch_size, dry_run=True)) as progress:
            return await store.expire(now, settings.expiry.batch_size, on_batch=progress.add)
    finally:
        await store.close()


class _Progress:
    """One line on the terminal that says how many rows are deleted, and is gone at the end."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._rows = 0
        self._next = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        typer.echo("\r\x1b[K", nl=False, err=True)

    def add(self, rows: int) -> None:
        """Count rows; show the count, a few times a second."""
        self._rows += rows
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.2
            typer.echo(f"\r{self._rows:,} of {self._total:,} expired rows deleted", nl=False, err=True)


def _routing(upstream: UpstreamSettings, *, alone: bool) -> str:
    """Which mail an upstream gets, as far as that is a question."""
    text = "" if alone else f", priority {upstream.priority}"
    if not upstream.weight:
        text += ", drained"
    elif not alone:
        text += f", weight {upstream.weight}"
    for key, patterns in upstream.match.given.items() if upstream.match is not None else ():
        text += f", {key} {' '.join(patterns)}"
    return text


def _listener(listener: ListenerSettings) -> str:
    """Where clients connect, and what they meet there that is not usual."""
    tls = "" if listener.tls == "none" else f" TLS {listener.tls}"
    return f"{listener.address}{tls}{' behind PROXY' if listener.proxy_protocol else ''}"


def _clients(settings: Settings) -> Iterator[str]:
    """Who may relay."""
    clients = settings.clients
    yield from map(str, clients.allow)
    if clients.auth == "users":
        yield f"users of {clients.users_file}"
    elif clients.auth == "passthrough":
        yield f"who may log in at {clients.passthrough_to or settings.upstreams[0].name}"


def _served(http: HttpSettings) -> str:
    """What the HTTP side answers, and to whom."""
    if http.token is not None:
        return "metrics, health; page and API with the token"
    return "metrics, health, page, API" if http.loopback else "metrics, health; no page and API: no token"


def _summary(settings: Settings) -> Iterator[tuple[str, str]]:
    """What the settings mean, for people, in a few lines."""
    from relay.settings.units import format_duration, format_size

    server, records = settings.server, settings.records
    yield "name", server.hostname
    yield "listens", ", ".join(map(_listener, settings.listeners))
    yield "clients", ", ".join(_clients(settings))
    size = format_size(server.max_message_size) if server.max_message_size else "whatever the upstream allows"
    yield "messages", f"up to {size}, {server.max_recipients} recipients"
    for upstream in settings.upstreams:
        login = f", as {upstream.username}" if upstream.username else ", no AUTH"
        verified = " unverified" if upstream.tls != "none" and not upstream.tls_verify else ""
        where = f"{upstream.name}: {upstream.address}, TLS {upstream.tls}{verified}{login}"
        shared = f"{where}, up to {upstream.max_connections} connections"
        yield "upstream", shared + _routing(upstream, alone=len(settings.upstreams) == 1)
    yield "records", f"{records.shown_url}, spool {records.spool}, when away: {records.when_unavailable}"
    lifetimes = {"": settings.retention.default, **settings.retention.by_type}
    kept = (
        f"{name} {format_duration(time) if time else 'never'}".strip() for name, time in lifetimes.items()
    )
    yield "retention", ", ".join(kept)
    if settings.limits:
        from relay.limits.configured import rules_of

        for rule in rules_of(settings.limits):
            yield "limit", f"{rule.name}: {rule.scope}, {rule}, {rule.action}"
    yield "http", f"{settings.http.address} ({_served(settings.http)})"
    yield "log", f"{settings.log.format}, {settings.log.level}"
