"""The environment as a layer over the file: `RELAY__SECTION__KEY`, `RELAY__UPSTREAMS__0__ADDRESS`.

Rules: a name is followed through the model, so an unknown one is found here and never ignored; a value is
read as the type that the key wants. The keys of a table of free names (`retention.by_type`) are taken as the
file writes them, else in lower case. A list that the file does not have begins empty.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

__all__ = ["Key", "Problem", "dotted", "model_at", "overlay", "unknown_key"]

PREFIX = "RELAY__"
_TABLE = "is a table: set its keys one by one"

Key = tuple[str | int, ...]
"""Where a value stands: `("upstreams", 0, "address")`."""
Problem = tuple[str, Key, str]
"""What is wrong: the source (a file, or a variable of the environment), the key, the reason."""


def overlay(
    tree: dict[str, Any], model: type[BaseModel], environ: Mapping[str, str]
) -> tuple[dict[Key, str], list[Problem]]:
    """Put the variables of `environ` into `tree`, in place; a variable that does not fit is a problem.

    Returns the source of each key that the environment gave, and the problems.
    """
    sources: dict[Key, str] = {}
    problems: list[Problem] = []
    names = (name for name in environ if name.startswith(PREFIX))
    for name in sorted(names, key=_in_order):
        source = f"environment {name}"
        parts = name.removeprefix(PREFIX).split("__")
        try:
            sources[_put(tree, model, parts, environ[name])] = source
        except _MisfitError as error:
            problems.append((source, error.key, error.reason))
    return sources, problems


def dotted(key: Key) -> str:
    """Write a key as in messages: `upstreams.0.address`."""
    return ".".join(str(part) for part in key)


def model_at(model: type[BaseModel], key: Key) -> type[BaseModel]:
    """Return the model of the table at `key`, which has to be one that `model` describes."""
    wanted: Any = model
    for part in key:
        kind, inner = _shape(wanted)
        wanted = inner.model_fields[part].annotation if kind == "model" else inner
    found: type[BaseModel] = _shape(wanted)[1]
    return found


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Say that `name` is no key, with the one that was probably meant."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f'unknown key; did you mean "{near[0]}"?' if near else "unknown key"


class _MisfitError(Exception):
    def __init__(self, key: Key, reason: str) -> None:
        super().__init__(reason)
        self.key = key
        self.reason = reason


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort key: list entries by number, so that each one finds its predecessor."""
    return [(int(part), "") if _is_index(part) else (-1, part) for part in name.split("__")]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= 6


def _put(tree: dict[str, Any], model: type[BaseModel], parts: list[str], text: str) -> Key:
    """Set the value that `parts` names; return its key."""
    node: Any = tree
    wanted: Any = model
    key: Key = ()
    for position, part in enumerate(parts):
        step, wanted = _step(node, wanted, part, key)
        key = (*key, step)
        if position == len(parts) - 1:
            node[step] = _value(text, wanted, key)
        else:
            node = _child(node, step, wanted)
    return key


def _step(node: Any, wanted: Any, part: str, key: Key) -> tuple[str | int, Any]:
    """Return the key or index that `part` means at `node`, and the type that is wanted there."""
    kind, inner = _shape(wanted)
    if kind == "model" and isinstance(node, dict):
        step = part.lower()
        fields = inner.model_fields
        if step not in fields:
            raise _MisfitError((*key, step), unknown_key(step, fields))
        return step, fields[step].annotation
    if kind == "dict" and isinstance(node, dict):
        if not part:
            raise _MisfitError(key, "an empty name is no key")
        same = [name for name in node if name.casefold() == part.casefold()]
        return (same or [part.lower()])[0], inner
    if kind == "list" and isinstance(node, list):
        if not _is_index(part):
            raise _MisfitError((*key, part.lower()), "is a list: a number must stand here, from 0")
        if int(part) > len(node):
            raise _MisfitError((*key, int(part)), f"comes after a gap: entry {len(node)} is not there")
        if int(part) == len(node):
            node.append({} if _shape(inner)[0] in {"model", "dict"} else None)
        return int(part), inner
    raise _MisfitError((*key, part.lower()), f"cannot be set: {dotted(key)} is no table")


def _child(node: Any, step: Any, wanted: Any) -> Any:
    """Return what stands below `step`, made when it is missing."""
    kind, _ = _shape(wanted)
    if isinstance(node, dict) and step not in node and kind in {"model", "dict", "list"}:
        node[step] = [] if kind == "list" else {}
    return node.get(step) if isinstance(node, dict) else node[step]


def _shape(wanted: Any) -> tuple[str, Any]:
    """Return the kind of a type (model, dict, list or scalar) and the type inside."""
    wanted = _plain(wanted)
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        return "model", wanted
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is dict:
        return "dict", arguments[1]
    if origin is tuple:
        return "list", arguments[0]
    return "scalar", wanted


def _plain(wanted: Any) -> Any:
    """Take `Annotated` and `None` off a type."""
    while get_origin(wanted) is Annotated:
        wanted = get_args(wanted)[0]
    if get_origin(wanted) in {Union, UnionType}:
        members = [member for member in get_args(wanted) if member is not NoneType]
        if len(members) == 1:
            return _plain(members[0])
    return wanted


def _value(text: str, wanted: Any, key: Key) -> Any:
    """Read `text` as the type that is wanted. Durations, sizes and addresses are texts in the file too."""
    kind, inner = _shape(wanted)
    if kind in {"model", "dict"}:
        raise _MisfitError(key, _TABLE)
    if any("\ud800" <= character <= "\udfff" for character in text):  # octets that Python could not read
        raise _MisfitError(key, "is not UTF-8")
    if kind == "list":
        return _list(text, key)
    if inner is bool:
        if text.lower() not in {"true", "false"}:
            raise _MisfitError(key, "must be true or false")
        return text.lower() == "true"
    if inner is int and re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        return int(text)
    return text


def _list(text: str, key: Key) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    for read in (_toml_list, json.loads):  # JSON differs where strings have escapes and tables have keys
        try:
            values: list[Any] = read(text)
        except (ValueError, RecursionError):
            continue
        return values
    raise _MisfitError(key, "is no list: write it as in TOML, or with commas")


def _toml_list(text: str) -> Any:
    return tomllib.loads(f"values = {text}")["values"]
