"""`relay sends`: searches the records, and prints what was found as `rows.py` writes it.

Rules. What goes to standard output is rows and nothing else, so that it pipes; what is said beside goes to
standard error, and how far a long export is only where somebody looks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import ConfigOption
from relay.cli.failure import CommandError
from relay.cli.format import Format
from relay.cli.reading import asked, bounded, mistake, reading

if TYPE_CHECKING:
    from relay.cli.rows import Row
    from relay.records.queries import Queries
    from relay.records.sends import SendFilter

__all__ = ["sends"]

EPILOG = (
    "A row must pass every filter. ADDRESS is an address, @domain, or a pattern in which * stands for "
    "anything, in quotes; so are names. WHEN is a time ago (90m, 2h, 7d), today, yesterday, or a date or "
    "time (2026-11-23, 2026-11-23T07:46), in the machine's zone or that of --tz unless it ends in Z or an "
    "offset. "
    "CSV has values as recorded: import them as text into a spreadsheet, which would take one that begins "
    "with = + - or @ for a formula."
)

FOLLOW_S = 1.0
"""Seconds between two looks for new rows."""
OVERLAP = 1000
"""Rows looked at again: relays on one database may commit in another order than that of ids."""
PROGRESS_S = 0.5

ZoneOption = Annotated[
    str | None,
    typer.Option("--tz", metavar="ZONE", help="Zone of times, such as Europe/Berlin. Else the machine's."),
]

sends = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@sends.callback(epilog=EPILOG, help="Search the records of what was sent, newest first.")
def search(
    context: typer.Context,
    config: ConfigOption = None,
    sender: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Sender; <> is the null reverse-path."),
    ] = None,
    recipient: Annotated[str | None, typer.Option(metavar="ADDRESS", help="One of the recipients.")] = None,
    task_type: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Task type.")] = None,
    client: Annotated[
        str | None, typer.Option(metavar="CLIENT", help="Authenticated user, else the client's IP address.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(metavar="NAME", help="Upstream that accepted.")] = None,
    message_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Message-ID, with or without its angle brackets.")
    ] = None,
    task_id: Annotated[str | None, typer.Option(metavar="UUID", help="The relay's id of the send.")] = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent then or later.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent before then.")] = None,
    zone: ZoneOption = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Rows at most; 0: all.")] = 20,
    in_doubt: Annotated[
        bool,
        typer.Option(
            "--in-doubt", help="Not what was sent, but messages of which nobody knows whether they were."
        ),
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with new rows as they are recorded, oldest first.")
    ] = False,
    output: Annotated[
        Format, typer.Option("--format", help="table: for people; json: one object a line; csv.")
    ] = Format.TABLE,
) -> int:
    """Search the records of what was sent, newest first."""
    if context.invoked_subcommand is not None:
        _nothing_before(context)
        return 0
    given = {
        "sender": sender,
        "recipient": recipient,
        "type": task_type,
        "client": client,
        "upstream": upstream,
        "message_id": message_id,
        "task_id": task_id,
        "since": since,
        "until": until,
    }
    if follow and (in_doubt or until is not None):
        raise mistake("--follow", f"does not go with {'--in-doubt' if in_doubt else '--until'}")
    wanted, place, settings = asked(given, zone, config)

    from relay.cli.rows import writer
    from relay.records.sends import InDoubt, Send

    write = writer(output, sys.stdout, InDoubt if in_doubt else Send, zone=place)
    if follow:
        reading(settings, lambda queries: _follow(queries, wanted, bounded(limit), write))
        return 0
    rows, doubts = reading(
        settings, lambda queries: _print(queries, wanted, bounded(limit), write, in_doubt=in_doubt)
    )
    if not rows and output is Format.TABLE:
        typer.echo(f"relay: no {'messages in doubt' if in_doubt else 'sends'} found", err=True)
    if doubts:
        said = "1 message is in doubt" if doubts == 1 else f"{doubts} messages are in doubt"
        typer.echo(f"relay: {said}, see relay sends --in-doubt", err=True)
    return 0


@sends.command()
def show(
    task_id: Annotated[str, typer.Argument(metavar="TASK_ID", help="The relay's id of the send.")],
    config: ConfigOption = None,
    zone: ZoneOption = None,
    output: Annotated[Format, typer.Option("--format", help="table: for people; json; csv.")] = Format.TABLE,
) -> int:
    """Show everything about one send, or one message in doubt."""
    wanted, place, settings = asked({"task_id": task_id}, zone, config)

    from relay.cli.rows import details, writer
    from relay.records.sends import InDoubt, Send

    async def find(queries: Queries) -> Sequence[Row]:
        return await queries.page(wanted, 1) or await queries.page_of_doubts(wanted, 1)

    found = reading(settings, find)
    if not found:
        raise CommandError(["relay: no send has this task id, and no message in doubt; it may have expired"])
    if output is Format.TABLE:
        details(found[0], sys.stdout, zone=place)
    else:
        writer(output, sys.stdout, Send if isinstance(found[0], Send) else InDoubt, zone=place)(found)
    return 0


async def _print(
    queries: Queries,
    wanted: SendFilter,
    limit: int | None,
    write: Callable[[Sequence[Row]], None],
    *,
    in_doubt: bool,
) -> tuple[int, int]:
    """Print what is wanted; return how many rows, and how many messages in doubt there are to be told of."""
    rows = 0
    progress = _Progress()
    write(())
    pages: AsyncIterator[Sequence[Row]]
    pages = queries.doubts(wanted, limit=limit) if in_doubt else queries.sends(wanted, limit=limit)
    async for page in pages:
        write(page)
        rows += len(page)
        progress.tell(rows)
    progress.end()
    tells = not in_doubt and sys.stderr.isatty()
    return rows, await queries.count_in_doubt() if tells else 0


async def _follow(
    queries: Queries, wanted: SendFilter, limit: int | None, write: Callable[[Sequence[Row]], None]
) -> None:
    """Print the newest rows, oldest first, then each one as it comes, for ever; without a limit all rows."""
    import asyncio

    known, seen = 0, set[int]()
    write(())
    if limit:
        known = await queries.newest_id()
        # What was there at the beginning is not new; what comes meanwhile, or late with a smaller id, is.
        before = await queries.recorded_after(wanted, known - OVERLAP, OVERLAP)
        first = await queries.page(wanted, limit)
        seen = {row.id for row in before if row.id <= known} | {row.id for row in first}
        write(first[::-1])
    while True:
        found = await queries.recorded_after(wanted, known - OVERLAP, 2 * OVERLAP)
        fresh = [row for row in found if row.id not in seen]
        write(fresh)
        if found:
            known = max(known, found[-1].id)
        seen = {key for key in seen if key > known - OVERLAP} | {row.id for row in fresh}
        if len(found) < 2 * OVERLAP:
            await asyncio.sleep(FOLLOW_S)


class _Progress:
    """How many rows are out, for who looks at a terminal while rows go elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and not sys.stdout.isatty()
        self._next = time.monotonic() + PROGRESS_S
        self._told = False

    def tell(self, rows: int) -> None:
        """Say so, now and then."""
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_S
            self._told = True
            typer.echo(f"\r{rows:,} rows", nl=False, err=True)

    def end(self) -> None:
        """Leave the line as it was."""
        if self._told:
            typer.echo("\r\x1b[K", nl=False, err=True)


def _nothing_before(context: typer.Context) -> None:
    """Raise CommandError for options that are not the subcommand's: they would be passed over."""
    sources = map(context.get_parameter_source, context.params)
    if any(source is not None and source.name == "COMMANDLINE" for source in sources):
        raise CommandError(
            ["relay: options of show stand behind it: relay sends show TASK_ID --config FILE"], 2
        )
