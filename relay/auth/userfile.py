"""The file of users: TOML, a table `[users.NAME]` for each one, read and checked as a whole.

Rules: every mistake is reported, each as `FILE: USER: reason`, and no message shows a hash. A file with a
mistake is not used at all, so that nobody is let in, or kept out, by half of it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay.auth import hashing
from relay.escaping import escaped

__all__ = ["MAX_NAME", "User", "UsersError", "name_problem", "parse", "read", "sender_problem"]

MAX_NAME = 255
"""Octets of a user name."""


class UsersError(Exception):
    """The file of users cannot be used. `problems` has one line for each mistake, for the operator.

    `unread`: what it says is not known.
    """

    def __init__(self, problems: list[str], *, unread: bool = False) -> None:
        self.problems = [escaped(problem) for problem in problems]  # names come from the file as they are
        self.unread = unread
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class User:
    """A user, as the file has it."""

    hashed: str
    """The password's argon2id hash."""
    senders: tuple[str, ...] | None
    """Patterns of the reverse-paths that it may use, see `policy.may_send`; None: any."""

    def __repr__(self) -> str:
        return "<User>"


def read(path: Path) -> dict[str, User]:
    """Return the users of the file at `path`, by name, in its order; raise UsersError if it has mistakes."""
    try:
        return parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise UsersError([f"{path}: no such file: relay user add makes it"]) from None
    except OSError as error:
        raise UsersError([f"{path}: cannot be read: {error.strerror}"], unread=True) from None


def parse(octets: bytes, path: Path) -> dict[str, User]:
    """Return the users that the text of the file `path` holds; raise UsersError if it has mistakes."""
    try:
        tree = tomllib.loads(octets.decode("utf-8-sig"))  # some editors begin it with a BOM
    except UnicodeDecodeError:
        raise UsersError([f"{path}: is not UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond what Python reads
        raise UsersError([f"{path}: is not TOML: {error}"]) from None
    tables = tree.pop("users", {})
    problems = [f"{path}: {key}: unknown key; users stand in tables [users.NAME]" for key in tree]
    if not isinstance(tables, dict):
        raise UsersError([*problems, f"{path}: users: must be tables [users.NAME]"])
    for name, table in tables.items():
        problems += [f"{path}: {name}: {reason}" for reason in _problems(name, table)]
    if problems:
        raise UsersError(problems)
    return {name: _user(table) for name, table in tables.items()}


def name_problem(name: str) -> str | None:
    """Return why a user cannot have this name, None if it can."""
    if not name:
        return "a user name is needed"
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        return f"a user name has at most {MAX_NAME} octets"
    if not name.isprintable() or " " in name:
        return "a user name has no blanks and no characters that do not print"
    return None


def sender_problem(pattern: str) -> str | None:
    """Return why this is no pattern of reverse-paths, None if it is one."""
    local, _, domain = pattern.rpartition("@")
    plain = pattern.isprintable() and not set(pattern) & set('<>"')
    if pattern == "<>" or (local and domain and plain):
        return None
    return "must be an address, * in it for anything (*@example.com), or <> for the null reverse-path"


def _problems(name: str, table: object) -> Iterator[str]:
    reason = name_problem(name)
    if reason:
        yield reason
    if not isinstance(table, Mapping):
        yield "must be a table with a password"
        return
    for key in table:
        if key not in ("password", "senders"):
            yield f'{key}: unknown key; a user has "password" and "senders"'
    hashed = table.get("password")
    if not isinstance(hashed, str):
        yield "password: missing, or no text: relay user add makes it"
    elif (reason := hashing.problem(hashed)) is not None:
        yield f"password: {reason}"
    if "senders" in table:
        yield from _sender_problems(table["senders"])


def _sender_problems(senders: object) -> Iterator[str]:
    if not isinstance(senders, list) or not senders:
        yield "senders: must be a list of patterns; leave it out for any sender"
        return
    for index, pattern in enumerate(senders):
        reason = sender_problem(pattern) if isinstance(pattern, str) else "must be text"
        if reason:
            yield f"senders.{index}: {reason}"


def _user(table: Mapping[str, Any]) -> User:
    senders = table.get("senders")
    return User(table["password"], None if senders is None else tuple(senders))
