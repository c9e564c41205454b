"""`relay forget`: erases a person from the records."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import OF_THE_RECORDS, ConfigOption, configured, find
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.records.forgetting import Forgotten
    from relay.settings import Settings

__all__ = ["forget"]


def forget(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The person's address.")],
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be erased, erase nothing.")
    ] = False,
) -> int:
    """Erase a person from the records: as sender, as recipient, and where else the address stands.

    What was sent by the person, or to nobody else, is deleted; of what went to others too the rest stays.
    """
    import asyncio
    import os

    from relay import parts
    from relay.envelope import text
    from relay.records.errors import StoreError
    from relay.records.spool import SpoolError

    wanted = text(os.fsencode(address.strip().removeprefix("<").removesuffix(">")))
    if not wanted or wanted.startswith("@") or "*" in wanted:
        raise typer.BadParameter("takes one whole address", param_hint="'ADDRESS'")
    settings = configured(find(config, os.environ), without=OF_THE_RECORDS)
    names = [wanted, *parts.aliases(settings, wanted)]
    try:
        # Before and after: a row that gets into the store meanwhile may come behind the look at its place.
        left = _waiting(settings, names)
        done = asyncio.run(_forget(settings, names, dry_run=dry_run))
        left = max(left, _waiting(settings, names))
    except (StoreError, SpoolError) as error:
        raise CommandError([f"relay: {error}"]) from None
    would = "would be " if dry_run else ""
    typer.echo(
        f"{_count(done.deleted, 'send')} {would}deleted, {_count(done.changed, 'other')} {would}changed"
    )
    typer.echo(f"{_count(done.doubts, 'message')} in doubt {would}deleted or changed")
    if left:
        raise CommandError(
            [
                f"relay: {_count(left, 'row')} in the spool {settings.records.spool} name the address",
                "relay: run this again when they are in the store (relay spool list, relay spool replay)",
            ]
        )
    return 0


async def _forget(settings: Settings, names: Sequence[str], *, dry_run: bool) -> Forgotten:
    from relay.records.forgetting import forget as erase
    from relay.records.forgetting import open_eraser

    eraser = await open_eraser(settings.records.connect_url)
    try:
        return await erase(eraser, names, dry_run=dry_run, on_progress=_progress)
    finally:
        await eraser.close()


def _progress(looked: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{looked:,} rows looked through", nl=False, err=True)


def _waiting(settings: Settings, names: Sequence[str]) -> int:
    """Return how many rows that wait for the store name the person."""
    from relay.records.forgetting import mentions
    from relay.records.inspection import waiting

    directory = settings.records.spool
    if not directory.exists():
        return 0
    return sum(mentions(each.row, names) for each in waiting(directory))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
