"""`relay spool`: the rows that wait for the store, for people and for scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import OF_THE_RECORDS, ConfigOption, configured, configured_to_read, find
from relay.cli.failure import CommandError
from relay.escaping import escaped

if TYPE_CHECKING:
    from relay.records.inspection import Found, Survey, Waiting
    from relay.records.replay import Carried
    from relay.settings import Settings

__all__ = ["spool"]

spool = typer.Typer(
    help="Look at the rows that wait for the store, and carry them there.",
    rich_markup_mode=None,
    no_args_is_help=False,
)


class Form(StrEnum):
    """How what was found is printed."""

    TABLE = "table"
    JSON = "json"


@spool.command(name="list")
def show(
    rows: Annotated[bool, typer.Option("--rows", help="Print the rows themselves.")] = False,
    output: Annotated[
        Form, typer.Option("--format", help="table: for people; json: for programs.")
    ] = Form.TABLE,
    config: ConfigOption = None,
) -> int:
    """Say what is in the spool, beside a relay that runs or without one."""
    directory = configured_to_read(config, os.environ).records.spool
    from relay.records.inspection import survey, waiting
    from relay.records.spool import SpoolError

    if not directory.exists():
        return _nothing(directory, output, rows=rows)
    try:
        if rows:
            (_rows_as_json if output is Form.JSON else _rows_as_table)(waiting(directory))
        else:
            found = survey(directory)
            (_survey_as_json if output is Form.JSON else _survey_as_table)(directory, found)
    except SpoolError as error:
        raise CommandError([f"relay: {error}"]) from None
    return 0


@spool.command()
def replay(
    rejected: Annotated[
        bool,
        typer.Option(
            "--rejected", help="The rows that the store has rejected; also beside a relay that runs."
        ),
    ] = False,
    config: ConfigOption = None,
) -> int:
    """Carry what waits into the store now, for a relay that does not run."""
    settings = configured(find(config, os.environ), without=OF_THE_RECORDS)
    directory = settings.records.spool
    if not directory.exists():
        typer.echo(f"nothing waits: there is no spool {directory} yet")
        return 0
    import asyncio

    from relay import maillog
    from relay.records.errors import StoreError
    from relay.records.spool import SpoolError, SpoolInUseError

    maillog.configure("console", "critical")  # what was set aside is in what it prints

    try:
        carried = asyncio.run(_replay(settings, rejected=rejected))
    except SpoolInUseError:
        raise CommandError([_in_use(directory)]) from None
    except (StoreError, SpoolError) as error:
        raise CommandError([f"relay: {error}", "relay: what is not in the store waits as before"]) from None
    typer.echo(_told(carried))
    return 1 if carried.rejected or carried.corrupt else 0


async def _replay(settings: Settings, *, rejected: bool) -> Carried:
    from relay import parts
    from relay.records.replay import replay, replay_rejected
    from relay.records.spool import Spool
    from relay.records.store import open_store

    directory = settings.records.spool
    own = None if rejected else Spool(directory, reserve=0)
    try:
        store = await open_store(
            settings.records.connect_url,
            parts.retention(settings),
            relay=settings.relay_name,
        )
        try:
            if own is None:
                return await replay_rejected(directory, store, _progress)
            return await replay(own, store, _progress)
        finally:
            await store.close()
    finally:
        if own is not None:
            own.close()


def _progress(done: int) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{done} rows", nl=False, err=True)


def _told(carried: Carried) -> str:
    text = f"{_count(carried.rows, 'row')} carried into the store"
    if carried.rejected:
        text += f"; {_count(carried.rejected, 'row')} rejected, see rejected.jsonl"
    if carried.corrupt:
        text += f"; {_count(carried.corrupt, 'line')} not readable, see corrupt.jsonl"
    return ("\n" if sys.stderr.isatty() and sum(carried) else "") + text


def _in_use(directory: Path) -> str:
    """Say what the relay that has the spool is doing with it."""
    from relay.records.inspection import survey

    rows = survey(directory).rows
    doing = f"{_wait(rows)}, replayed as soon as the store takes them" if rows else "no rows wait"
    return f"relay: {directory} belongs to a relay that runs; {doing}"


# What is there


def _nothing(directory: Path, output: Form, *, rows: bool) -> int:
    from relay.records.inspection import Survey

    if output is Form.JSON and not rows:
        _survey_as_json(directory, Survey([], [], 0))
    elif output is Form.TABLE:
        typer.echo(f"relay: no spool {directory} yet", err=True)
    return 0


def _survey_as_table(directory: Path, found: Survey) -> None:
    files = [each for each in (*found.segments, *found.rejected) if each.rows or each.corrupt]
    if files:
        _print_table(
            ("FILE", "ROWS", "OLDEST", "NEWEST", "SIZE", "CORRUPT"), [_cells(each) for each in files]
        )
    typer.echo(f"{_wait(found.rows)} for the store in {directory}")
    rejected = sum(each.rows for each in found.rejected)
    if rejected:
        typer.echo(f"{_count(rejected, 'row')} rejected by the store: relay spool list --rows says why")
    if found.corrupt_lines:
        typer.echo(f"{_count(found.corrupt_lines, 'line')} not readable in corrupt.jsonl")
    typer.echo(f"{_size(found.reserve)} of disk space taken ahead")


def _cells(found: Found) -> tuple[str, ...]:
    return (
        found.name,
        str(found.rows),
        _moment(found.oldest),
        _moment(found.newest),
        _size(found.size),
        str(found.corrupt or ""),
    )


def _survey_as_json(directory: Path, found: Survey) -> None:
    import dataclasses
    import json

    shown = {
        "directory": str(directory),
        "rows": found.rows,
        "segments": [dataclasses.asdict(each) for each in found.segments],
        "rejected": [dataclasses.asdict(each) for each in found.rejected],
        "corrupt_lines": found.corrupt_lines,
        "reserve": found.reserve,
    }
    typer.echo(json.dumps(shown))


# The rows themselves


def _rows_as_table(rows: Iterable[Waiting]) -> None:
    cells = []
    for file, kind, row in rows:
        recipients = row.get("recipients")
        first, *more = recipients if isinstance(recipients, list) and recipients else [""]
        cells.append(
            (
                file,
                _moment(row.get("sent_at", row.get("since"))),
                str(row.get("task_id", "")),
                str(row.get("task_type", "")) if kind == "record" else kind,
                str(row.get("sender") or "<>"),
                f"{first} +{len(more)}" if more else str(first),
                str(row.get("rejected" if kind == "doubt" else "reason", "")),
            )
        )
    if cells:
        _print_table(("FILE", "TIME", "TASK ID", "TYPE", "SENDER", "RECIPIENTS", "REASON"), cells)
    else:
        typer.echo("relay: no rows found", err=True)


def _rows_as_json(rows: Iterable[Waiting]) -> None:
    import json

    for file, kind, row in rows:
        typer.echo(json.dumps({"file": file, "kind": kind, **row}))


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = [header, *([escaped(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _moment(value: object) -> str:
    """Return a time of a row in local time, to the second."""
    from datetime import datetime

    if not isinstance(value, str):
        return ""
    try:
        return f"{datetime.fromisoformat(value).astimezone():%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError):
        return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _wait(rows: int) -> str:
    return "1 row waits" if rows == 1 else f"{rows} rows wait"


def _size(octets: int) -> str:
    return f"{octets / 1024:.0f} KiB" if octets >= 1024 or octets == 0 else f"{octets} B"
