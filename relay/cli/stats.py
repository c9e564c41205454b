"""`relay stats`: how much was sent, counted by one thing or two, with bars where a person looks."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from relay.cli.configuration import ConfigOption
from relay.cli.format import Format
from relay.cli.reading import asked, bounded, reading
from relay.escaping import escaped
from relay.records.by import By

if TYPE_CHECKING:
    from relay.records.queries import Queries
    from relay.records.statistics import Count, Statistics

__all__ = ["bar", "lines", "stats"]

DETAILS = ("recipients", "octets", "average_ms", "slowest_ms")
GAP = "  "
WIDEST_BAR = 60
NARROWEST_BAR = 10
LONGEST_KEY = 50
_EIGHTHS = " ▏▎▍▌▋▊▉"


def stats(
    by: Annotated[
        list[By],
        typer.Option(
            help="What to count by; may be given twice. Time is counted in hours or days; by "
            "recipient-domain a message counts once for each recipient there."
        ),
    ],
    config: ConfigOption = None,
    sender: Annotated[str | None, typer.Option(metavar="ADDRESS", help="As of relay sends.")] = None,
    recipient: Annotated[str | None, typer.Option(metavar="ADDRESS", help="As of relay sends.")] = None,
    task_type: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Task type.")] = None,
    client: Annotated[str | None, typer.Option(metavar="CLIENT", help="As of relay sends.")] = None,
    upstream: Annotated[str | None, typer.Option(metavar="NAME", help="Upstream that accepted.")] = None,
    since: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent then or later, such as 7d.")] = None,
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Sent before then.")] = None,
    zone: Annotated[
        str | None,
        typer.Option("--tz", metavar="ZONE", help="Zone of times, hours and days. Else the machine's."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Lines at most, the biggest or the latest; 0: all.")
    ] = 0,
    detail: Annotated[
        bool, typer.Option("--detail", help="Recipients, octets and times too; reads every row.")
    ] = False,
    output: Annotated[
        Format, typer.Option("--format", help="table: for people; json: one object a line; csv.")
    ] = Format.TABLE,
) -> int:
    """Count what was sent."""
    if len(by) > 2 or len(set(by)) < len(by):
        raise typer.BadParameter("takes one thing, or two different ones", param_hint="'--by'")
    given = {
        "sender": sender,
        "recipient": recipient,
        "type": task_type,
        "client": client,
        "upstream": upstream,
        "since": since,
        "until": until,
    }
    wanted, place, settings = asked(given, zone, config)

    async def count(queries: Queries) -> Statistics:
        return await queries.statistics(wanted, by, zone=place, detail=detail, limit=bounded(limit))

    found = reading(settings, count)
    _write(found, by, output, sys.stdout, detail=detail)
    if not found.counts and output is Format.TABLE:
        typer.echo("relay: no sends found", err=True)
    return 0


def _write(found: Statistics, by: Sequence[By], output: Format, out: TextIO, *, detail: bool) -> None:
    from relay.cli.rows import as_utf8

    if output is not Format.TABLE:
        as_utf8(out)
    columns = ("messages", *(DETAILS if detail else ()))
    if output is Format.JSON:
        for each in found.counts:
            shown = dict(zip(by, each.keys, strict=True)) | {name: getattr(each, name) for name in columns}
            out.write(json.dumps(shown) + "\n")
    elif output is Format.CSV:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow((*by, *columns))
        show = escaped if out.isatty() else str
        for each in found.counts:
            writer.writerow((*map(show, each.keys), *(getattr(each, name) for name in columns)))
    else:
        terminal = out.isatty()
        width = shutil.get_terminal_size().columns if terminal else None
        bold = terminal and os.environ.get("TERM") != "dumb"
        made = enumerate(lines(found, by, width, detail=detail, bars=_takes(out, _EIGHTHS)))
        out.writelines(f"{typer.style(line, bold=True) if bold and not at else line}\n" for at, line in made)


def _takes(out: TextIO, text: str) -> bool:
    """Whether the encoding of `out` has this text."""
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def lines(
    found: Statistics, by: Sequence[By], width: int | None, *, detail: bool = False, bars: bool = True
) -> Iterator[str]:
    """Give the lines of a table, with bars where it is `width` cells wide; None: as wide as it takes."""
    from rich.cells import cell_len

    from relay.cli.rows import SMALLEST

    if not found.counts:
        return
    counted = "recipients" if By.RECIPIENT_DOMAIN in by else "messages"
    names = ("messages", *(name for name in DETAILS if detail and name != counted))
    rows = [
        ([_key(each, key) for each, key in zip(by, count.keys, strict=True)], count) for count in found.counts
    ]
    header = [each.upper().replace("-", " ") for each in by]
    numbers = [[_number(count, name) for name in names] for _, count in rows]
    key_widths = [
        min(max(map(cell_len, column)), LONGEST_KEY if width else 10_000)
        for column in zip(header, *(keys for keys, _ in rows), strict=True)
    ]
    heads = [name.upper().replace("_", " ") for name in (counted, *names[1:])]
    number_widths = [max(map(len, column)) for column in zip(heads, *numbers, strict=True)]
    room = 0
    if width is not None:
        while sum(key_widths) + sum(number_widths) + len(GAP) * (len(key_widths) + len(names) - 1) > width:
            widest = max(range(len(by)), key=key_widths.__getitem__)
            if key_widths[widest] <= SMALLEST:
                break
            key_widths[widest] -= 1
        used = sum(key_widths) + sum(number_widths) + len(GAP) * (len(key_widths) + len(number_widths))
        room = min(width - used, WIDEST_BAR)
    most = max(count.messages for _, count in rows)
    for keys, values, share in (
        (header, heads, None),
        *((keys, values, count.messages) for (keys, count), values in zip(rows, numbers, strict=True)),
    ):
        cells = [*map(_fitted, keys, key_widths)]
        cells += [f"{value:>{size}}" for value, size in zip(values, number_widths, strict=True)]
        if bars and room >= NARROWEST_BAR and share is not None:
            cells.append(bar(share, most, room))
        yield GAP.join(cells).rstrip()
    if found.groups > len(found.counts):
        yield f"... {found.groups - len(found.counts):,} more; {found.messages:,} {counted} in all"


def bar(value: int, most: int, room: int) -> str:
    """Return a bar as long as `value` is of `most`, in eighths of a cell; the smallest can still be seen."""
    eighths = max(round(value / most * room * 8), 1) if value and most else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _key(by: By, key: str) -> str:
    if by is By.HOUR:
        return f"{key[:10]} {key[11:16]}"
    return escaped(key) or ("<>" if by is By.SENDER else "-")


def _number(count: Count, name: str) -> str:
    value = getattr(count, name)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _fitted(text: str, width: int) -> str:
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…"
    return text + " " * (width - cell_len(text))
