"""Where lines go now, and how they look: set when this is imported, and again by `configure`.

What the libraries say through the standard library's logging comes out here too; those that write clients'
octets raw are silenced.
"""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, NamedTuple, Protocol

from relay.maillog.console import Console, coloured
from relay.maillog.line import as_json, cleaned
from relay.maillog.output import Output
from relay.maillog.values import traceback_text
from relay.outcome import Outcome

__all__ = ["configure", "current", "flush"]

# Silenced with their children: aiosmtpd ("mail.log") writes client octets raw and, after a refused AUTH,
# the credentials that follow; aiosmtplib the same for its upstream's.
_SILENCED: Final = ("mail", "aiosmtplib")

_LEVEL_OF: Final = {
    Outcome.ACCEPTED: "info",
    Outcome.REJECTED: "info",
    Outcome.DEFERRED: "info",
    Outcome.REFUSED: "info",
    Outcome.ABORTED: "info",
    Outcome.UNAVAILABLE: "warning",
    Outcome.IN_DOUBT: "error",
}


_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

# Any number is a level there, the ones between the names too.
_STANDARD_LEVELS: Final = (
    (logging.CRITICAL, "critical"),
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
    (logging.NOTSET, "debug"),
)


class Write(Protocol):
    """Writes a line about an event, if lines of its level are written."""

    def __call__(self, event: str, /, **fields: object) -> None:
        """Write it, with these fields behind what happened, or with those of the mapping `fields`."""


class Log(NamedTuple):
    """What writes lines, by their level."""

    debug: Write
    info: Write
    warning: Write
    error: Write
    critical: Write


class _Current:
    """Where lines go now; `configure` replaces it."""

    output: Output
    log: Log
    direct: Mapping[Outcome, tuple[str, Callable[[bytes], None] | None]]
    """The level of a message's line, and what writes it without a logger, if it is to be JSON."""


current: Final = _Current()


def _lines_lost(lines: int) -> None:
    current.log.error("log lines lost", lines=lines)


def _use(render: Callable[[Mapping[str, Any]], bytes], level: str, stream: BinaryIO | None) -> None:
    output = current.output = Output(stream, _lines_lost)
    written = _LEVELS[_LEVELS.index(level) :]
    current.log = Log(*(_writing(output, each, render) if each in written else _nothing for each in _LEVELS))
    current.direct = {
        outcome: (of_it, _way_out(output, of_it) if of_it in written and render is as_json else None)
        for outcome, of_it in _LEVEL_OF.items()
    }


def _writing(output: Output, level: str, render: Callable[[Mapping[str, Any]], bytes]) -> Write:
    line = _way_out(output, level)

    def write(event: str, /, **fields: object) -> None:
        line(render(cleaned(level, event, fields)))

    return write


def _way_out(output: Output, level: str) -> Callable[[bytes], None]:
    """Errors do not wait."""
    return output.line_at_once if level in ("error", "critical") else output.line


def _nothing(_event: str, /, **_fields: object) -> None:
    """What a line comes to whose level is not written."""


def flush() -> None:
    """Write the lines that wait for the end of the event loop's turn."""
    current.output.flush()


_use(as_json, "info", None)
atexit.register(flush)


def configure(format: str, level: str, stream: BinaryIO | None = None) -> None:  # noqa: A002
    """Set how lines look and which are written; may be called again.

    `format` is "json" (one object a line) or "console" (lines for people, coloured on a terminal); `level`
    one of debug, info, warning, error, critical. `stream` takes the lines' octets, by default standard
    output. The standard library's logging comes out here too, from warnings up.
    """
    render = as_json if format == "json" else Console(colors=coloured(stream or sys.stdout))
    flush()
    _use(render, level, stream)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Bridge) for handler in root.handlers):
        root.addHandler(_Bridge())
    for name in _SILENCED:
        silenced = logging.getLogger(name)
        silenced.propagate = False
        silenced.setLevel(logging.CRITICAL + 1)
        silenced.handlers = [logging.NullHandler()]


class _Bridge(logging.Handler):
    """Brings what libraries say through the standard library's logging into the mail log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # arguments that do not fit the format
            text = str(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        found = None if error is None else traceback_text(error)
        level = next(name for least, name in _STANDARD_LEVELS if record.levelno >= least)
        getattr(current.log, level)(text, logger=record.name, traceback=found)
