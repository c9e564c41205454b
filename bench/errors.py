"""What keeps a run from counting."""

from __future__ import annotations


class RunError(Exception):
    """A run that does not count; the text says why."""
