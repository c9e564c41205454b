"""Text as people may see it: what does not print, or turns the text round, escaped."""

from __future__ import annotations

__all__ = ["escaped"]


def escaped(text: str, keep: str = "") -> str:
    """Return `text` with backslash escapes for the characters that do not print, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
