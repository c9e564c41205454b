"""The command line: `relay`.

Rules: exit status 0 done, 1 what was asked for failed, 2 bad usage or configuration. An error is a line or
two on standard error that say what to change, never a traceback. What is heavy to import is imported by the
command that needs it, so that help stays quick.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

import relay
from relay.cli.commands import app
from relay.cli.failure import CommandError
from relay.descriptors import open_standard

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the process's own) name; return the exit status."""
    open_standard()
    try:
        status = app(args=arguments, prog_name="relay", standalone_mode=False)
    except CommandError as error:
        return _fail(error.lines, error.status)
    except typer.TyperException as error:
        return _fail([f"relay: {_sentence(error.format_message())}; see relay --help"], error.exit_code)
    except Exception as error:  # the last door: whatever it is, people get a line
        return _fail(
            [f"relay: {type(error).__name__}: {error} ({_place(error)}); this is a defect, please report it"]
        )
    return int(status or 0)


def _fail(lines: Sequence[str], status: int = 1) -> int:
    for line in lines:
        typer.echo(line, err=True)
    return status


def _sentence(text: str) -> str:
    """The library's message as part of a line of ours."""
    return (text[:1].lower() + text[1:]).rstrip(".").replace("\n", " ")


def _place(error: Exception) -> str:
    """The innermost line of the relay's own code that was running."""
    package = Path(relay.__file__).parent
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    file, line = next(frame for frame in reversed(frames) if frame[0].is_relative_to(package))
    return f"{file.relative_to(package.parent)}:{line}"
