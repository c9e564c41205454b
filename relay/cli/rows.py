"""How rows are printed: as a table for people, as JSON lines or CSV for programs; page by page.

Rules. What came over the wire does not drive a terminal: in a table every character that does not print is
shown escaped, in JSON it is escaped by JSON's own means, so that the value stays; so it is in CSV when a
terminal shows it. Otherwise CSV has the values as they are, also those that a spreadsheet would take for a
formula (`=`, `+`, `-`, `@` at the beginning): addresses may begin so, and a mark put before one would make it
another address for every other reader.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime, tzinfo
from typing import TextIO

import typer
from rich.cells import cell_len, set_cell_size

from relay.cli.format import Format
from relay.escaping import escaped
from relay.provider import accepted_as
from relay.records.model import Json
from relay.records.sends import InDoubt, Send

__all__ = ["GAP", "Table", "as_utf8", "details", "fitted", "writer"]

Row = Send | InDoubt
HEADER = ("TIME", "TYPE", "SENDER", "RECIPIENTS", "REPLY")
HEADER_IN_DOUBT = ("SINCE", "TYPE", "SENDER", "RECIPIENTS", "REASON")
GAP = "  "
SMALLEST = 8
"""Cells of a column that is not made smaller, however narrow the terminal."""

Cell = tuple[str, str]
"""What may be shortened, and what follows it whole."""


def writer(
    output: Format,
    out: TextIO,
    kind: type[Send] | type[InDoubt] = Send,
    *,
    zone: tzinfo | None = None,
) -> Callable[[Sequence[Row]], None]:
    """Return a printer of pages of `kind` to `out`; a table has its times in `zone`, None: the machine's.

    An empty first page makes it print what stands above the rows.
    """
    columns = tuple(field.name for field in fields(kind))
    if output is Format.TABLE:
        write = _table(out, HEADER if kind is Send else HEADER_IN_DOUBT, zone)
    else:
        as_utf8(out)
        write = (_json if output is Format.JSON else _csv)(out, columns)

    def page(rows: Sequence[Row]) -> None:
        write(rows)
        out.flush()  # a reader that has gone is found out here, and not at exit

    return page


def as_utf8(out: TextIO) -> None:
    """Write JSON and CSV as UTF-8, whatever the terminal's encoding; for people, `streams.py` sees to it."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(encoding="utf-8")


# For people


def _table(out: TextIO, header: Sequence[str], zone: tzinfo | None) -> Callable[[Sequence[Row]], None]:
    terminal = out.isatty()
    bold = terminal and os.environ.get("TERM") != "dumb"
    table = Table(shutil.get_terminal_size().columns if terminal else None, header, zone)

    def write(rows: Sequence[Row]) -> None:
        for number, line in enumerate(table.lines(rows)):
            heading = bold and number == 0 and table.pages == 1
            out.write((typer.style(line, bold=True) if heading else line) + "\n")

    return write


class Table:
    """Lines of columns, as wide as the first page needs, and no wider than `width` cells; None: no bound."""

    def __init__(self, width: int | None, header: Sequence[str] = HEADER, zone: tzinfo | None = None) -> None:
        self._zone = zone
        self._width = width
        self._header = header
        self._widths: list[int] = []
        self.pages = 0

    def lines(self, rows: Sequence[Row]) -> list[str]:
        """Return the lines of the next page; the first one's begin with the header."""
        if not rows:
            return []
        page = [_cells(row, self._zone) for row in rows]
        self.pages += 1
        if self.pages == 1:
            page.insert(0, [(name, "") for name in self._header])
            wanted = [max(cell_len("".join(cell)) for cell in column) for column in zip(*page, strict=True)]
            self._widths = wanted if self._width is None else fitted(wanted, self._width)
        return [self._line(cells) for cells in page]

    def _line(self, cells: list[Cell]) -> str:
        return GAP.join(map(self._padded, cells, self._widths)).rstrip()

    def _padded(self, cell: Cell, width: int) -> str:
        text, rest = cell
        missing = width - cell_len(text) - cell_len(rest)
        if missing >= 0:
            return text + rest + " " * missing
        if self._width is None:
            return text + rest
        return set_cell_size(text, max(0, width - cell_len(rest) - 1)) + "…" + rest


def fitted(wanted: Sequence[int], width: int) -> list[int]:
    """Return widths for columns that want so many cells, for a line of `width`: the widest give way first."""
    widths = list(wanted)
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0:
        # The first column is the time, which says nothing when it is cut.
        widest = max(range(1, len(widths)), key=widths.__getitem__)
        if widths[widest] <= SMALLEST:
            break
        widths[widest] -= 1
        excess -= 1
    return widths


def _cells(row: Row, zone: tzinfo | None) -> list[Cell]:
    first, *more = row.recipients or ("",)
    moment, last = (row.sent_at, row.upstream_reply) if isinstance(row, Send) else (row.since, row.reason)
    return [
        (f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S}", ""),
        (escaped(row.task_type), ""),
        (escaped(row.sender) or "<>", ""),
        (escaped(first), f" +{len(more)}" if more else ""),
        (escaped(" ".join(last.split("\n"))), ""),
    ]


def details(row: Row, out: TextIO, *, zone: tzinfo | None = None) -> None:
    """Print everything about one row, a line for each value, for people."""
    lines = list(_details(row, zone))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        first, *more = [escaped(line) for line in value.split("\n")]
        out.write(f"{name:<{width}}{GAP}{first}".rstrip() + "\n")
        out.writelines(f"{'':<{width}}{GAP}{line}\n" for line in more)
    out.flush()


def _details(row: Row, zone: tzinfo | None) -> Iterator[tuple[str, str]]:
    def when(moment: datetime) -> str:
        return f"{moment.astimezone(zone):%Y-%m-%d %H:%M:%S.%f %z}"

    sent = isinstance(row, Send)
    yield "task id", row.task_id
    if row.client_task_id is not None:
        yield "client's task id", row.client_task_id
    yield "state", "accepted" if sent else "in doubt"
    yield ("sent at", when(row.sent_at)) if isinstance(row, Send) else ("since", when(row.since))
    yield "expires at", "never" if row.expires_at is None else when(row.expires_at)
    yield "type", row.task_type
    yield "sender", row.sender or "<>"
    yield "recipients", "\n".join(row.recipients)
    yield "client", row.client
    yield "upstream", row.upstream
    if isinstance(row, Send):
        yield "accepted as", accepted_as(row.upstream_reply) or "(the reply names no id)"
        yield "reply", row.upstream_reply
    else:
        yield "reason", row.reason
    if row.message_id is not None:
        yield "Message-ID", row.message_id
    yield "size", f"{row.size:,} octets"
    yield "took", f"{row.duration_ms:,} ms"
    for name, value in row.data.items():
        yield from _data(name, value)


def _data(name: str, value: Json) -> Iterator[tuple[str, str]]:
    if name == "headers" and isinstance(value, dict):
        for header, content in value.items():
            texts = content if isinstance(content, list) else [content]
            yield f"header {escaped(header)}", "\n".join(map(str, texts))
    elif name == "refused" and isinstance(value, list):
        each = [item for item in value if isinstance(item, dict)]
        yield "refused", "\n".join(f"{item.get('recipient')}: {item.get('reply')}" for item in each)
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name.replace("_", " "), "(its connection had broken)" if value is None else str(value)


# For programs


def _json(out: TextIO, columns: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            line = json.dumps({name: _plain(getattr(row, name)) for name in columns}, ensure_ascii=False)
            out.write(_printable_json(line) + "\n")

    return write


def _csv(out: TextIO, columns: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    lines = csv.writer(out, lineterminator="\n")
    header = iter([columns])  # written once, when there is a store to read
    show = escaped if out.isatty() else str

    def write(rows: Sequence[Row]) -> None:
        lines.writerows(header)
        for row in rows:
            lines.writerow([show(_cell(getattr(row, name))) for name in columns])

    return write


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, dict):
        return _printable_json(json.dumps(value, ensure_ascii=False))
    return str(_plain(value))


def _plain(value: object) -> object:
    """A time as ISO 8601 in UTC, everything else as it is."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value


def _printable_json(text: str) -> str:
    """What does not print can only stand in a string, where it has another spelling."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
