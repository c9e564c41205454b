"""`relay sends`: searches the records. Here is what its options take; `rows` prints what was found."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from relay.cli.configuration import ConfigOption, configured_to_read
from relay.cli.failure import CommandError
from relay.envelope import text

if TYPE_CHECKING:
    from relay.cli.rows import Row
    from relay.records.queries import SendFilter
    from relay.settings import Settings

__all__ = ["EPILOG", "Format", "moment", "sends"]

EPILOG = (
    "A row must pass every filter. WHEN is a time ago (90m, 2h, 7d), or a date or time (2026-11-23, "
    "2026-11-23T07:46), local unless it ends in Z or an offset. CSV has values as recorded: import them as "
    "text into a spreadsheet, which would take one that begins with = + - or @ for a formula."
)


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def sends(
    config: ConfigOption = None,
    sender: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address, @domain, or <> (the null reverse-path)."),
    ] = None,
    recipient: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Address or @domain.")] = None,
    task_type: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Task type.")] = None,
    client: Annotated[
        str | None, typer.Option(metavar="CLIENT", help="Authenticated user, else the client's IP address.")
    ] = None,
    message_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Message-ID, with or without its angle brackets.")
    ] = None,
    task_id: Annotated[str | None, typer.Option(metavar="UUID", help="The relay's id of the send.")] = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent then or later.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent before then.")] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Rows at most; 0: all.")] = 20,
    in_doubt: Annotated[
        bool,
        typer.Option(
            "--in-doubt", help="Not what was sent, but messages of which nobody knows whether they were."
        ),
    ] = False,
    output: Annotated[
        Format, typer.Option("--format", help="table: for people; json: one object a line; csv.")
    ] = Format.TABLE,
) -> int:
    """Search the records of what was sent, newest first."""
    now = datetime.now(UTC)
    given: dict[str, Any] = {
        "sender": _address("--sender", sender, null_path=True),
        "recipient": _address("--recipient", recipient),
        "task_type": _given("--type", task_type, "a task type"),
        "client": _given("--client", client, "a user name or an IP address"),
        "message_id": _given("--message-id", message_id, "a Message-ID"),
    }
    identity = _identity(task_id)
    begin, end = _when("--since", since, now), _when("--until", until, now)
    if begin is not None and end is not None and begin >= end:
        raise _mistake("--until", "takes a time after that of --since")
    settings = configured_to_read(config, os.environ)

    import asyncio

    from relay.cli.rows import writer
    from relay.records.errors import StoreError
    from relay.records.queries import InDoubt, Send, SendFilter

    wanted = SendFilter(**given, task_id=identity, since=begin, until=end)
    write = writer(output, sys.stdout, InDoubt if in_doubt else Send)
    try:
        rows, doubts = asyncio.run(_print(settings, wanted, limit or None, write, in_doubt=in_doubt))
    except StoreError as error:
        raise CommandError([f"relay: {error}"]) from None
    except BrokenPipeError:
        raise  # whoever read has seen enough; typer ends quietly
    except OSError as error:
        raise CommandError([f"relay: cannot write what was found: {error.strerror}"]) from None
    if not rows and output is Format.TABLE:
        typer.echo(f"relay: no {'messages in doubt' if in_doubt else 'sends'} found", err=True)
    if doubts:
        said = "1 message is in doubt" if doubts == 1 else f"{doubts} messages are in doubt"
        typer.echo(f"relay: {said}, see relay sends --in-doubt", err=True)
    return 0


async def _print(
    settings: Settings,
    wanted: SendFilter,
    limit: int | None,
    write: Callable[[Sequence[Row]], None],
    *,
    in_doubt: bool,
) -> tuple[int, int]:
    """Print what is wanted; return how many rows, and how many messages in doubt there are to be told of."""
    from relay.records.queries import open_queries

    queries = await open_queries(settings.records.connect_url)
    try:
        rows = 0
        write(())
        pages: AsyncIterator[Sequence[Row]]
        pages = queries.doubts(wanted, limit=limit) if in_doubt else queries.sends(wanted, limit=limit)
        async for page in pages:
            write(page)
            rows += len(page)
        tells = not in_doubt and sys.stderr.isatty()
        return rows, await queries.count_in_doubt() if tells else 0
    finally:
        await queries.close()


def moment(value: str, now: datetime) -> datetime:
    """Return the time that `value` means, aware: a duration before `now`, or ISO 8601, local without offset.

    Raises ValueError for anything else.
    """
    from relay.settings.units import parse_duration

    try:
        if value[-1:].isalpha() and value[-1] != "Z":
            return now - timedelta(seconds=parse_duration(value))
        found = datetime.fromisoformat(value)
        return found.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(str(error)) from error


def _when(option: str, value: str | None, now: datetime) -> datetime | None:
    if value is None:
        return None
    try:
        return moment(value.strip(), now)
    except ValueError:
        raise _mistake(
            option, "takes a time ago such as 90m, 2h or 7d, or a date or time such as 2026-11-23T07:46"
        ) from None


def _address(option: str, value: str | None, *, null_path: bool = False) -> str | None:
    takes = "an address or @domain" + (", or <>" if null_path else "")
    found = _given(option, value, takes)
    if found is None:
        return None
    if found.startswith("<") and found.endswith(">"):
        found = found[1:-1]
    if found == "@" or not (found or null_path):
        raise _mistake(option, f"takes {takes}")
    return found


def _given(option: str, value: str | None, takes: str) -> str | None:
    """Return a value as the store writes text from the wire, octets that are no UTF-8 escaped."""
    if value is None:
        return None
    found = text(os.fsencode(value.strip()))
    if not found:
        raise _mistake(option, f"takes {takes}")
    return found


def _identity(value: str | None) -> UUID | None:
    if value is None:
        return None
    try:
        return UUID(value.strip())
    except ValueError:
        raise _mistake("--task-id", "takes a UUID such as 019b1c7e-5a2f-7c31-9d0e-3f5b8a6c2d14") from None


def _mistake(option: str, takes: str) -> typer.BadParameter:
    return typer.BadParameter(takes, param_hint=f"'{option}'")
