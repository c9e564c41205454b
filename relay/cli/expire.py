"""`relay expire`: one run of expiry, for cron or another scheduler."""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import OF_THE_RECORDS, ConfigOption, configured, find
from relay.cli.failure import CommandError

if TYPE_CHECKING:
    from relay.settings import Settings

__all__ = ["expire"]


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


async def _expire(settings: Settings, *, dry_run: bool) -> int:
    from relay import parts
    from relay.records.store import open_store

    url = settings.records.connect_url
    store = await open_store(url, parts.retention(settings), create=False, upgrade=not dry_run)
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
