"""Text as people may see it: what does not print, or turns the text round, escaped.

Rules: the log comes here with anything, also when the process may open no file. So no codec is used that
Python loads when it is first asked for, as `unicode_escape`.
"""

from __future__ import annotations

__all__ = ["escaped"]


def escaped(text: str, keep: str = "") -> str:
    """Return `text` with backslash escapes for the characters that do not print, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else ascii(character)[1:-1]
        for character in text
    )
