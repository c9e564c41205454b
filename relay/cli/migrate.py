"""`relay migrate-store`: from one store to another, with all that is in it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import OF_THE_RECORDS, ConfigOption, configured, find
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from relay.records.moving import Moved
    from relay.settings import Settings

__all__ = ["migrate_store"]


def migrate_store(
    source: Annotated[str, typer.Option("--from", metavar="URL", help="The store to read.")],
    target: Annotated[str, typer.Option("--to", metavar="URL", help="The store to fill; made if missing.")],
    config: ConfigOption = None,
) -> int:
    """Carry all records into another store. Cut short, it can be run again.

    Stop the relays that write to the old store first, or run it once more when they have stopped.
    """
    if source == target:
        raise typer.BadParameter("takes another store than --from", param_hint="'--to'")
    from relay.settings import check_url

    for option, url in (("--from", source), ("--to", target)):
        try:
            check_url(url)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=f"'{option}'") from None
    settings = configured(find(config, os.environ), without=OF_THE_RECORDS)
    import asyncio

    from relay.records.errors import StoreError

    try:
        moved = asyncio.run(_move(settings, source, target))
    except StoreError as error:
        raise CommandError([f"relay: {error}", "relay: what was carried stays; run it again"]) from None
    typer.echo(
        f"{moved.sends} sends with {moved.recipients} recipients and {moved.in_doubt} messages in doubt "
        "of the old store are in the new one"
    )
    for task_id, reason in moved.rejected:
        typer.echo(f"relay: {task_id} is not taken: {reason}", err=True)
    return 1 if moved.rejected else 0


async def _move(settings: Settings, source: str, target: str) -> Moved:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from relay import parts
    from relay.records.moving import count_all, move
    from relay.records.queries import open_queries
    from relay.records.store import open_store

    old = await open_queries(source)
    try:
        store = await open_store(target, parts.retention(settings))
        try:
            new = await open_queries(target)
            try:
                total = await count_all(old)
                console = Console(stderr=True)
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
                    task = progress.add_task("", total=total)
                    return await move(old, store, new, lambda done: progress.update(task, completed=done))
            finally:
                await new.close()
        finally:
            await store.close()
    finally:
        await old.close()
