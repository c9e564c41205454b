r"""What a search is given to look for: an address, a domain, or a pattern with `*`.

Rules. `*` stands for anything, also for nothing; `\*` is a star. Case does not matter in an address or in a
pattern. A pattern that fixes the domain (`*@example.com`, `ann*@example.com`) is a search in that domain, for
which there is an index; one that does not (`ann*`, `@*.example.com`) looks at every row of the time that is
asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

__all__ = ["Wanted", "equals_or_like", "literal"]

_STAR = re.compile(r"(?<!\\)\*")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An address that is looked for: whole, in a domain, or like a pattern. None of them: nothing matches.

    An address whole has nothing but `address`. `domain` leads by an index; `pattern` is for LIKE.
    """

    address: str | None = None
    domain: str | None = None
    pattern: str | None = None

    @classmethod
    def of(cls, value: str) -> Wanted:
        """Return what `value` asks for."""
        if value.startswith("@"):
            value = f"*{value}"
        if not _STAR.search(value):
            return cls(address=_plain(value))
        local, at, domain = value.rpartition("@")
        if not at or _STAR.search(domain):
            return cls(pattern=_like(value))
        return cls(domain=_plain(domain).lower(), pattern=None if local == "*" else _like(value))

    def matches(
        self,
        address: sa.ColumnElement[str],
        domain: sa.ColumnElement[str] | None,
        aliases: Sequence[str] = (),
    ) -> sa.ColumnElement[bool]:
        """Return the condition on a column of addresses, and the one of their domains if there is one.

        `aliases` are other spellings under which a whole address is kept.
        """
        # Both through the database's own lower(), which need not be Python's; the index is on it.
        kept = sa.func.lower(address)
        if self.address is not None:
            values = [sa.func.lower(each) for each in (self.address, *aliases)]
            return kept == values[0] if len(values) == 1 else kept.in_(values)
        conditions: list[sa.ColumnElement[bool]] = []
        if self.domain is not None:
            if domain is not None:
                conditions.append(domain == self.domain)
            elif self.pattern is None:
                conditions.append(kept.like(sa.func.lower(_like(f"*@{self.domain}")), escape="\\"))
        if self.pattern is not None:
            conditions.append(kept.like(sa.func.lower(self.pattern), escape="\\"))
        return sa.and_(*conditions)


def equals_or_like(value: str, column: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Return the condition on a column of names: equal to the octet, or like a pattern in any case."""
    if _STAR.search(value):
        return sa.func.lower(column).like(sa.func.lower(_like(value)), escape="\\")
    return column == _plain(value)


def _plain(value: str) -> str:
    return value.replace(r"\*", "*")


def _like(value: str) -> str:
    """Return a pattern in the words of LIKE, escaped by a backslash."""
    return "%".join(literal(_plain(part)) for part in _STAR.split(value))


def literal(text: str) -> str:
    """Return text that stands for itself in LIKE, escaped by a backslash."""
    return re.sub(r"([\\%_])", r"\\\1", text)
