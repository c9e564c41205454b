"""`relay demo`: an hour of mail to look at."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

from relay.cli.failure import CommandError
from relay.cli.streams import not_written

__all__ = ["demo"]


def demo(
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Where its configuration and records go.")
    ] = Path("demo"),
    within: Annotated[
        str, typer.Option("--within", metavar="DURATION", help="How long the hour takes.")
    ] = "1m",
    leave: Annotated[bool, typer.Option("--exit", help="End when the hour is over.")] = False,
) -> int:
    """Play an hour of a small product's mail through a relay, to have something to look at."""
    from relay.app import StartError
    from relay.demo import configuration
    from relay.demo import demo as play
    from relay.settings import SettingsError
    from relay.settings.units import parse_duration

    try:
        seconds = parse_duration(within)
    except ValueError as error:
        raise CommandError([f"relay: --within: {error}"], 2) from None
    if not seconds:
        raise CommandError(["relay: --within: must be longer than nothing"], 2)
    import asyncio

    try:
        file = configuration(directory)
        asyncio.run(play(file, os.environ, seconds=seconds, leave=leave, tell=typer.echo))
    except SettingsError as error:
        raise CommandError([f"relay: {problem}" for problem in error.problems], 2) from None
    except (StartError, OSError) as error:
        if isinstance(error, BrokenPipeError) or not_written(error):
            raise
        lines = [f"relay: the demonstration cannot start: {error}"]
        if os.strerror(errno.EADDRINUSE) in str(error):
            lines.append(
                f"relay: end the relay that runs here, or change the addresses in {directory}/relay.toml"
            )
        raise CommandError(lines) from None
    return 0
