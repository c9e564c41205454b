"""What differs between two configurations, key by key. No I/O.

Rules: nothing here applies a change. Names are those of the file, values do not appear: they may be secrets.
Keys whose names stand in RESTART keep the values that the relay was started with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from pydantic import BaseModel

from relay.settings.model import Settings

__all__ = ["RESTART", "Changes", "compare"]

RESTART: Final = (
    "records.url",
    "records.password_file",
    "records.password",
    "records.relay",
    "records.spool",
    "records.recipients",
    "records.recipients_key",
    "records.recipients_key_file",
    "server.reuse_port",
)
"""Store and spool hold what is under way; the kernel wants to know about a shared port when it is bound."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What is other than before."""

    settings: Settings
    """What is to be in force."""
    names: tuple[str, ...]
    """The keys that change, as they are written: `server.idle_timeout`, `upstreams.0.password`."""
    restart: tuple[str, ...]
    """The keys that have changed in the file, and only a restart would change in the relay."""

    def touch(self, *sections: str) -> bool:
        """Whether a key of these sections, or one of these keys, changes."""
        return any(name == each or name.startswith(f"{each}.") for name in self.names for each in sections)


def compare(running: Settings, wanted: Settings) -> Changes:
    """Return what changes when `wanted` comes to a relay that runs with `running`."""
    names = tuple(_differences(running, wanted, ""))
    restart = tuple(name for name in names if name in RESTART)
    kept: dict[str, dict[str, Any]] = {}
    for name in restart:
        section, _, key = name.partition(".")
        kept.setdefault(section, {})[key] = getattr(getattr(running, section), key)
    sections = {name: getattr(wanted, name).model_copy(update=values) for name, values in kept.items()}
    return Changes(
        wanted.model_copy(update=sections), tuple(name for name in names if name not in restart), restart
    )


def _differences(one: object, other: object, name: str) -> Iterator[str]:
    """Yield the names of what differs, as far down as both have the same parts."""
    pairs: Iterable[tuple[object, object, object]] = ()
    if isinstance(one, BaseModel) and isinstance(other, BaseModel):
        pairs = ((key, getattr(one, key), getattr(other, key)) for key in type(one).model_fields)
    elif _models(one) and _models(other) and len(one) == len(other):
        pairs = zip(range(len(one)), one, other, strict=True)
    elif one != other:
        yield name
    for key, mine, theirs in pairs:
        yield from _differences(mine, theirs, f"{name}.{key}" if name else str(key))


def _models(value: object) -> TypeGuard[tuple[BaseModel, ...]]:
    return isinstance(value, tuple) and all(isinstance(each, BaseModel) for each in value)
