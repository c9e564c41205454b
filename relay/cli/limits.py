"""`relay limits`: each rate limit, who is near it, and who is over it now."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from relay.cli.configuration import ConfigOption, configured_to_read
from relay.cli.failure import CommandError
from relay.cli.format import Format
from relay.escaping import escaped

if TYPE_CHECKING:
    from relay.limits.now import LimitState
    from relay.settings import Settings

__all__ = ["limits"]

HEADER = ("LIMIT", "LETS PASS", "ACTION", "WHO", "USED", "ROOM AGAIN")
COLUMNS = (
    *("name", "scope", "unit", "maximum", "window_s", "action"),
    *("key", "used", "state", "room_in_s"),
)


def limits(
    config: ConfigOption = None,
    output: Annotated[
        Format, typer.Option("--format", help="table: for people; json: one limit a line; csv.")
    ] = Format.TABLE,
) -> int:
    """Show each rate limit, who is near it (80 %) and who is over it now, from the records."""
    settings = configured_to_read(config, os.environ)
    if not settings.limits:
        typer.echo("relay: no limits are configured", err=True)
        return 0

    import asyncio

    from relay.records.errors import StoreError

    try:
        states = asyncio.run(_states(settings))
    except StoreError as error:
        raise CommandError([f"relay: {error}"]) from None
    _write(states, output, sys.stdout)
    return 0


async def _states(settings: Settings) -> list[LimitState]:
    from relay import parts
    from relay.limits.configured import rules_of
    from relay.limits.now import limits_now
    from relay.records.counts import counts_of

    aliases = partial(parts.aliases, settings)
    counts = counts_of(settings.records.connect_url, aliases)
    try:
        return await limits_now(counts, rules_of(settings.limits, aliases), time.time())
    finally:
        await counts.close()


def _write(states: Sequence[LimitState], output: Format, out: TextIO) -> None:
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(encoding="utf-8", errors="backslashreplace")
    if output is Format.JSON:
        out.writelines(json.dumps(state.plain()) + "\n" for state in states)
    elif output is Format.CSV:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row for state in states for row in _rows(state, escaped if out.isatty() else str))
    else:
        out.writelines(line + "\n" for line in _lines(states, out))
    out.flush()


def _rows(state: LimitState, show: Callable[[str], str]) -> Iterator[tuple[object, ...]]:
    """Give one row for each key, one without a key where nobody is near."""
    limit = (state.name, state.scope, state.unit, state.maximum, state.window_s, state.action)
    for key in state.keys:
        yield (*limit, show(key.key), key.used, key.state, key.room_in_s)
    if not state.keys:
        yield (*limit, None, None, None, None)


def _lines(states: Sequence[LimitState], out: TextIO) -> Iterator[str]:
    from rich.cells import cell_len, set_cell_size

    from relay.cli.rows import GAP, fitted
    from relay.limits.rule import in_words

    table: list[tuple[str, ...]] = [HEADER]
    for state in states:
        passes = f"{state.maximum:,} {state.unit} in {in_words(state.window_s)} for each {state.scope}"
        first: tuple[str, ...] = (state.name, passes.removesuffix(" for each all"), state.action)
        for key in state.keys:
            who = escaped(key.key) or ("all" if state.scope == "all" else "<>")
            again = "there is" if key.room_in_s is None else f"in {in_words(key.room_in_s)}"
            table.append((*first, who, f"{key.used:,} ({key.state})", again))
            first = ("", "", "")
        if not state.keys:
            table.append((*first, "nobody is near", "", ""))
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    if out.isatty():
        widths = fitted(widths, shutil.get_terminal_size().columns)
    for row in table:
        cells = (
            set_cell_size(cell, width) if cell_len(cell) <= width else set_cell_size(cell, width - 1) + "…"
            for cell, width in zip(row, widths, strict=True)
        )
        yield GAP.join(cells).rstrip()
