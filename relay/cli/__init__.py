"""The command line: `relay`.

Rules: exit status 0 done, 1 what was asked for failed, 2 bad usage or configuration. An error is a line or
two on standard error that say what to change, never a traceback. What is heavy to import is imported by the
command that needs it, so that help stays quick.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

import relay
from relay.cli.commands import app
from relay.cli.failure import CommandError
from relay.cli.streams import let_go, not_written, prepare
from relay.exhausted import exhausted

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the process's own) name; return the exit status."""
    prepare()
    try:
        return _run(arguments)
    finally:
        let_go()


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status = app(args=arguments, prog_name="relay", standalone_mode=False)
        sys.stdout.flush()
    except CommandError as error:
        return _fail(error.lines, error.status)
    except typer.TyperException as error:
        return _fail([f"relay: {_sentence(error.format_message())}; see relay --help"], error.exit_code)
    except BrokenPipeError:  # whoever read has seen enough
        return 1
    except Exception as error:  # the last door: whatever it is, people get a line
        if not_written(error):
            return _fail([f"relay: cannot write to standard output: {error.strerror}"])
        if (limit := exhausted(error)) is not None:
            return _fail([f"relay: {limit}"])
        return _fail(
            [f"relay: {type(error).__name__}: {error} ({_place(error)}); this is a defect, please report it"]
        )
    return int(status or 0)


def _fail(lines: Sequence[str], status: int = 1) -> int:
    with contextlib.suppress(OSError):  # there is nobody to tell
        for line in lines:
            typer.echo(line, err=True)
    return status


def _sentence(text: str) -> str:
    """The library's message as part of a line of ours, without its tabs and the marks of its own library."""
    text = " ".join(text.replace("Value error, ", "").split())
    return (text[:1].lower() + text[1:]).rstrip(".")


def _place(error: Exception) -> str:
    """The innermost line of the relay's own code that was running."""
    package = Path(relay.__file__).parent
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    file, line = next(frame for frame in reversed(frames) if frame[0].is_relative_to(package))
    return f"{file.relative_to(package.parent)}:{line}"
