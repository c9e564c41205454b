"""Changes to the file of users, by the command line.

Rules: the file is replaced as a whole, so that the relay reads the old one or the new one and nothing
between; what was there stays as it was written, comments too; mode and owner stay. Two commands at a time
wait for each other. What would not be read back as it was meant is not written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import InlineTable

from relay.auth.userfile import User, UsersError, parse

__all__ = ["UserError", "put", "remove"]

HEADER = "Users of the relay. `relay user add` and `relay user remove` change this file, and keep comments."


class UserError(Exception):
    """The change cannot be made to the users that there are."""


def put(path: Path, name: str, hashed: str, senders: Sequence[str], *, replace: bool) -> bool:
    """Give the user `name` the password hash `hashed`; return whether it is a new user.

    `senders` are its patterns; none: any sender for a new user, and those that it has for an old one. The
    file is made where there is none. Raises UserError if the user exists and is not to be replaced,
    UsersError if the file has mistakes, OSError if it cannot be written.
    """
    with _changed(path, create=True) as (tables, users):
        new = name not in users
        if not new and not replace:
            raise UserError(f"{name} exists already: --force gives it a new password")
        if new:
            inline = isinstance(tables, InlineTable)
            tables[name] = tomlkit.inline_table() if inline else tomlkit.table()
        tables[name]["password"] = hashed
        if senders:
            tables[name]["senders"] = list(senders)
        kept = None if new else users[name].senders
        users[name] = User(hashed, tuple(senders) or kept)
    return new


def remove(path: Path, name: str) -> None:
    """Take the user `name` out; raises UserError if there is none, UsersError and OSError as `put` does."""
    with _changed(path, create=False) as (tables, users):
        if name not in users:
            raise UserError(f"{name} is no user in {path}")
        del tables[name], users[name]


@contextlib.contextmanager
def _changed(path: Path, *, create: bool) -> Iterator[tuple[Any, dict[str, User]]]:
    """Give the file's tables and its users, both to be changed, and write the tables if they agree."""
    target = path.resolve()  # a link stays one
    with _locked(target.parent):
        missing = create and not target.exists()
        old = f"# {HEADER}\n\n".encode() if missing else target.read_bytes()
        users = parse(old, path)
        document = tomlkit.parse(old.decode("utf-8-sig"))
        tables = document.setdefault("users", tomlkit.table(is_super_table=True))
        yield tables, users
        new = tomlkit.dumps(document).encode()
        if not _says(new, path, users):
            raise UserError(f"{path} is written in a way that cannot be changed here: edit it by hand")
        _replace(target, new)


def _says(octets: bytes, path: Path, users: dict[str, User]) -> bool:
    """Whether a new file would be read as these users."""
    try:
        return parse(octets, path) == users
    except UsersError:
        return False


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: the file itself is another one after each change."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(target: Path, octets: bytes) -> None:
    """Put a new file in the place of `target`, durably; where there was none it is for its owner alone."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                stat = target.stat()
                os.fchmod(descriptor, stat.st_mode & 0o7777)
                if (stat.st_uid, stat.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, stat.st_uid, stat.st_gid)
            file.write(octets)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink()
        raise
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
