"""`relay user`: the file of local users, for people and for scripts.

Rules: a password is asked for, or read from standard input; it is never an argument, which every user of the
machine could read. Hashes are never shown.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.configuration import ConfigOption, configured, find
from relay.cli.failure import CommandError
from relay.cli.format import Format

if TYPE_CHECKING:
    from relay.auth.userfile import User

__all__ = ["user"]

user = typer.Typer(
    help="Manage the file of local users, who log in with hashed passwords.",
    rich_markup_mode=None,
    no_args_is_help=False,
)

FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="FILE", help="File of users. Else clients.users_file of the configuration."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="User name.")]


@user.command()
def add(
    name: NameArgument,
    sender: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="A reverse-path that the user may use, such as *@example.com; <>: the null one. May be "
            "repeated. Without: any.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Give a user that exists a new password (and these senders, if any)."),
    ] = False,
    config: ConfigOption = None,
    file: FileOption = None,
) -> int:
    """Add a user; the password is asked for, or is the first line of standard input."""
    from relay.auth.edit import put
    from relay.auth.hashing import Hasher
    from relay.auth.userfile import name_problem, sender_problem

    reason = name_problem(name)
    if reason:
        raise typer.BadParameter(reason, param_hint="'NAME'")
    for pattern in sender or ():
        reason = sender_problem(pattern)
        if reason:
            raise typer.BadParameter(reason, param_hint="'--sender'")
    path = _file(config, file)
    if not force:
        _must_be_new(path, name)  # before somebody thinks of a password
    hashed = Hasher().hash(_password(name))
    with _failures(path):
        new = put(path, name, hashed, sender or (), replace=force)
    typer.echo(f"{name} added to {path}" if new else f"{name} changed in {path}")
    return 0


@user.command(name="list")
def show(
    output: Annotated[
        Format, typer.Option("--format", help="table: for people; json: one object a line; csv.")
    ] = Format.TABLE,
    config: ConfigOption = None,
    file: FileOption = None,
) -> int:
    """List the users and what they may send as; never their hashes."""
    users = _users(_file(config, file))
    if output is Format.JSON:
        import json

        for name, found in users.items():
            typer.echo(json.dumps({"user": name, "senders": found.senders}))
    elif output is Format.CSV:
        import csv

        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(("user", "senders"))
        rows.writerows((name, " ".join(found.senders or ())) for name, found in users.items())
        typer.echo(table.getvalue(), nl=False)
    elif users:
        width = max(map(len, ("USER", *users)))
        typer.echo(f"{'USER':<{width}}  SENDERS")
        for name, found in users.items():
            typer.echo(f"{name:<{width}}  {'any' if found.senders is None else ', '.join(found.senders)}")
    else:
        typer.echo("relay: no users found", err=True)
    return 0


@user.command()
def remove(name: NameArgument, config: ConfigOption = None, file: FileOption = None) -> int:
    """Remove a user; who is logged in stays so until its session ends."""
    from relay.auth import edit

    path = _file(config, file)
    with _failures(path):
        edit.remove(path, name)
    typer.echo(f"{name} removed from {path}")
    return 0


def _file(config: Path | None, file: Path | None) -> Path:
    """Return the file of users that a command works on."""
    if file is not None:
        if config is not None:
            raise typer.BadParameter("takes the place of --config: give one of them", param_hint="'--file'")
        return file
    source = find(config, os.environ)
    named = configured(source, without=("upstreams",)).clients.users_file
    if named is None:
        raise CommandError(
            [f"relay: {source}: clients.users_file: not set: name the file there, or give --file FILE"], 2
        )
    return named


def _users(path: Path) -> dict[str, User]:
    from relay.auth.userfile import read

    with _failures(path):
        return read(path)


def _must_be_new(path: Path, name: str) -> None:
    with _failures(path):
        exists = path.exists()
    if exists and name in _users(path):
        raise CommandError([f"relay: {name} exists already: --force gives it a new password"])


def _password(name: str) -> str:
    """Ask for the password, twice, or read it from standard input if that is no terminal."""
    if sys.stdin.isatty():
        password = _asked(name)
    else:
        try:
            password = sys.stdin.buffer.readline().decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise CommandError(["relay: the password on standard input is not UTF-8"]) from None
    if not password or "\0" in password:
        raise CommandError(["relay: a password is needed: type it, or give it as a line on standard input"])
    return password


def _asked(name: str) -> str:
    try:
        password: str = typer.prompt(
            f"Password for {name}", hide_input=True, confirmation_prompt="Once more", err=True
        )
    except typer.Abort:  # as a shell counts the end by Ctrl-C
        typer.echo(err=True)
        raise typer.Exit(130) from None
    return password


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Say what is wrong with the file, or with the change, in lines."""
    from relay.auth.edit import UserError
    from relay.auth.userfile import UsersError

    try:
        yield
    except UsersError as error:
        raise CommandError([f"relay: {problem}" for problem in error.problems]) from None
    except UserError as error:
        raise CommandError([f"relay: {error}"]) from None
    except FileNotFoundError:
        missing = "file" if path.parent.is_dir() else "directory"
        raise CommandError([f"relay: {path}: no such {missing}"]) from None
    except OSError as error:
        raise CommandError([f"relay: {path}: cannot be changed: {error.strerror}"]) from None
