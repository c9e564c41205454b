"""What an upstream said that it can do (its EHLO reply), as a value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["UNKNOWN", "Capabilities"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The service extensions of one upstream, by their EHLO keywords in upper case."""

    keywords: frozenset[str]
    size: int | None = None
    """The upstream's message size limit in octets (RFC 1870); None: it names none."""
    mechanisms: frozenset[str] = frozenset()
    """The AUTH mechanisms that it offers (RFC 4954), in upper case."""
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """The words behind each keyword, in upper case."""

    @classmethod
    def of(cls, extensions: Mapping[str, str], mechanisms: Iterable[str] = ()) -> Capabilities:
        """Read the keywords and their parameters of an EHLO reply.

        `mechanisms` are those of all its AUTH lines: servers say `AUTH=` besides, at times with other words.
        """
        parameters = {keyword.upper(): tuple(words.upper().split()) for keyword, words in extensions.items()}
        size = "".join(parameters.get("SIZE", ()))
        limit = int(size) if size.isascii() and size.isdigit() and len(size) <= 20 else 0
        offered = frozenset((*parameters.get("AUTH", ()), *(each.upper() for each in mechanisms)))
        return cls(frozenset(parameters), limit or None, offered, parameters)

    @classmethod
    def common(cls, several: Sequence[Capabilities]) -> Capabilities:
        """Return what all of `several` can do, one at least: of limits the smallest, whoever has it."""
        if len(several) == 1:
            return several[0]
        keywords = frozenset.intersection(*(each.keywords for each in several))
        limits: dict[str, int] = {}
        for each in several:
            for word in each.parameters.get("LIMITS", ()):
                name, _, value = word.partition("=")
                if value.isascii() and value.isdigit() and len(value) <= 6:
                    limits[name] = min(int(value), limits.get(name, int(value)))
        return cls(
            keywords,
            min((each.size for each in several if each.size), default=None),
            frozenset.intersection(*(each.mechanisms for each in several)),
            {"LIMITS": tuple(f"{name}={value}" for name, value in limits.items())} if limits else {},
        )

    def without(self, *keywords: str) -> Capabilities:
        """Return the same without some extensions."""
        return replace(self, keywords=self.keywords.difference(keywords))

    def __contains__(self, keyword: str) -> bool:
        return keyword in self.keywords


UNKNOWN = Capabilities(frozenset({"PIPELINING", "8BITMIME", "SIZE"}))
"""Assumed until the upstream has been reached once; MAIL says 451 as long as it has not."""
