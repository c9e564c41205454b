"""How commands read the records: what their options ask for, and the reading itself."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import UTC, datetime, tzinfo
from typing import TYPE_CHECKING, TypeVar

import typer

from relay.cli.configuration import configured_to_read
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from relay.records.queries import Queries
    from relay.records.sends import SendFilter
    from relay.settings import Settings

__all__ = ["asked", "bounded", "mistake", "reading"]

T = TypeVar("T")

_TAKES = {
    "sender": "an address, @domain or a pattern, or <>",
    "recipient": "an address or @domain, or a pattern",
    "type": "a task type",
    "client": "a user name or an IP address",
    "upstream": "the name of an upstream",
    "message_id": "a Message-ID",
}


def asked(
    given: dict[str, str | None], zone: str | None, config: Path | None
) -> tuple[SendFilter, tzinfo | None, Settings]:
    """Return the filter that the values of options make, the zone of times, and the settings."""
    from relay.asking import AskedError, filter_of, zone_of

    try:
        for field, takes in _TAKES.items():
            value = given.get(field)
            if value is not None and value.strip() in ("", "@", *(["<>"] if field == "recipient" else [])):
                raise AskedError(field, takes)
        place = zone_of(zone)
        wanted = filter_of(given, datetime.now(UTC), place)
    except AskedError as error:
        raise mistake(f"--{error.field.replace('_', '-')}", f"takes {error.takes}") from None
    if wanted.since is not None and wanted.until is not None and wanted.since >= wanted.until:
        raise mistake("--until", "takes a time after that of --since")
    settings = configured_to_read(config, os.environ)
    if wanted.recipient is not None:
        from relay import parts

        wanted = replace(wanted, aliases=parts.aliases(settings, wanted.recipient))
    return wanted, place, settings


def bounded(limit: int) -> int | None:
    """Return how many rows or counts are wanted, None: all, as for a number that no database can count to."""
    return limit if 0 < limit <= sys.maxsize else None


def reading(settings: Settings, work: Callable[[Queries], Awaitable[T]]) -> T:
    """Run `work` on the records that the settings name; raise CommandError if they cannot be read."""
    import asyncio

    from relay.records.errors import StoreError
    from relay.records.queries import open_queries

    async def run() -> T:
        queries = await open_queries(settings.records.connect_url)
        try:
            return await work(queries)
        finally:
            await queries.close()

    try:
        return asyncio.run(run())
    except StoreError as error:
        raise CommandError([f"relay: {error}"]) from None
    except BrokenPipeError:
        raise  # whoever read has seen enough; typer ends quietly
    except OSError as error:
        raise CommandError([f"relay: cannot write what was found: {error.strerror}"]) from None


def mistake(option: str, takes: str) -> typer.BadParameter:
    """Return the error of an option that was given what it does not take."""
    return typer.BadParameter(takes, param_hint=f"'{option}'")
