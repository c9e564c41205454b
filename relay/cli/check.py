"""`relay check`: whether the configuration is valid, what it means, and whether what it names is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import ConfigOption, configured, find
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from relay.settings import HttpSettings, ListenerSettings, Settings, UpstreamSettings

__all__ = ["check"]


def check(
    config: ConfigOption = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Try the upstreams, the store and the spool too.")
    ] = False,
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


# What it means


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

        for rule in rules_of(settings.limits, lambda _: ()):
            yield "limit", f"{rule.name}: {rule.scope}, {rule}, {rule.action}"
    yield "http", f"{settings.http.address} ({_served(settings.http)})"
    yield "log", f"{settings.log.format}, {settings.log.level}"


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


def _served(http: HttpSettings) -> str:
    """What the HTTP side answers, and to whom."""
    if http.token is not None:
        return "metrics, health; page and API with the token"
    return "metrics, health, page, API" if http.loopback else "metrics, health; no page and API: no token"
