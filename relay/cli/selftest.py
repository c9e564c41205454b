"""`relay selftest`: looks for an open relay, and says what it has found as it finds it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import ConfigOption, configured, find

if TYPE_CHECKING:
    from relay.selftest import Finding

__all__ = ["selftest"]


class Shape(StrEnum):
    """How findings are written."""

    TEXT = "text"
    JSON = "json"


def selftest(
    config: ConfigOption = None,
    shape: Annotated[
        Shape, typer.Option("--format", metavar="text|json", help="How findings are written.")
    ] = Shape.TEXT,
) -> int:
    """Look for an open relay: probe the running listeners as a stranger would. Sends no mail."""
    settings = configured(find(config, os.environ), without=("upstreams",))
    from relay.selftest import selftest as findings

    if shape is Shape.JSON:
        import json

        found = [finding._asdict() for finding in findings(settings)]
        typer.echo(json.dumps(found, indent=2))
        return int(any(finding["level"] == "failed" for finding in found))
    return _tell(findings(settings))


def _tell(findings: Iterable[Finding]) -> int:
    """Print findings as they come, those of one place together; return the exit status."""
    from relay.maillog.console import coloured

    colours = {"ok": "green", "note": "yellow", "failed": "red"}
    shows = coloured(sys.stdout)
    counts = dict.fromkeys(colours, 0)
    place = ""
    for where, level, text in findings:
        if where != place:
            typer.echo(where)
            place = where
        counts[level] += 1
        shown = text.replace("\n", " / ")  # a reply of several lines
        level_shown = typer.style(f"{level:<6}", fg=colours[level])
        typer.echo(f"  {level_shown}  {shown}", color=shows)
    typer.echo(", ".join(f"{count} {level}" for level, count in counts.items()))
    return 1 if counts["failed"] else 0
