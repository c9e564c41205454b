"""The search box: what people type, and what it asks the records for.

Rules. A word alone is looked for wherever it can stand: an address among recipients, senders and Message-IDs,
another word among types, clients and domains. `to:`, `from:`, `type:`, `client:`, `upstream:`, `id:`,
`since:` and `until:` say where. All of it must hold. Pure functions: the same words, the same search.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Final
from uuid import UUID

from relay.asking import AskedError, filter_of
from relay.records.sends import SendFilter

__all__ = ["FIELDS", "Box"]

FIELDS: Final = {
    "recipient": "Recipient",
    "sender": "Sender",
    "type": "Type",
    "client": "Client",
    "upstream": "Upstream",
    "message_id": "Message-ID",
    "task_id": "Task id",
    "since": "Since",
    "until": "Until",
}
"""The single filters and their names, in the order of the form."""
_WORDS: Final = {
    "to": "recipient",
    "from": "sender",
    "id": "message_id",
    "task": "task_id",
    **{name: name for name in FIELDS},
}
_TOKEN: Final = re.compile(r'(?:([a-z_]+):)?("[^"]*"|\S+)')


@dataclass(frozen=True, slots=True)
class Box:
    """What is in the search form: the words of the box, and the single filters."""

    q: str
    values: Mapping[str, str]

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Box:
        """Return what the parameters of an address say."""
        return cls(query.get("q", "").strip(), {name: query.get(name, "").strip() for name in FIELDS})

    @property
    def fields(self) -> list[tuple[str, str]]:
        """The single filters: name and label."""
        return list(FIELDS.items())

    @property
    def filtered(self) -> bool:
        """Whether a single filter is set."""
        return any(self.values.values())

    @property
    def chips(self) -> list[str]:
        """What is asked for, to people."""
        words = [self.q] if self.q else []
        return words + [f"{FIELDS[name]}: {value}" for name, value in self.values.items() if value]

    def filters(
        self,
        now: datetime,
        zone: tzinfo | None,
        aliases: Callable[[str], tuple[str, ...]] | None,
    ) -> list[SendFilter]:
        """Return the searches whose rows, together, are what is asked for; raises AskedError."""
        given: dict[str, str | None] = {name: value or None for name, value in self.values.items()}
        alone = ""
        for key, quoted in _TOKEN.findall(self.q):
            word = quoted[1:-1] if quoted.startswith('"') and len(quoted) > 1 else quoted
            name = _WORDS.get(key)
            if name is not None:
                if given[name] not in (None, word):
                    raise AskedError("q", f"one {FIELDS[name].lower()}, in the box or in its own field")
                given[name] = word
            elif alone:
                raise AskedError("q", "one word alone; say to:, from: or type: before the others")
            else:
                alone = f"{key}:{word}" if key else word
        return [
            filter_of({**given, **place}, now, zone, aliases)
            for place in (_places(alone) if alone else [{}])
            if all(given.get(name) in (None, value) for name, value in place.items())
        ]


def _places(word: str) -> list[dict[str, str]]:
    """Return where a word alone is looked for."""
    try:
        return [{"task_id": str(UUID(word))}]
    except ValueError:
        pass
    if word == "<>":
        return [{"sender": word}]
    if "@" in word:
        bare = word.removeprefix("<").removesuffix(">")
        pattern = word.startswith("@") or "*" in word
        return [
            {"recipient": bare},
            {"sender": bare},
            *([] if pattern else [{"message_id": word}]),
        ]
    places = [{"type": word}, {"client": word}]
    if "*" not in word:
        places.append({"message_id": word})
        if "." in word:
            places += [{"recipient": f"@{word}"}, {"sender": f"@{word}"}]
    return places
