"""The keys of `[retention]`, how long rows are kept, and of `[expiry]`, how they are deleted then. No I/O."""

from __future__ import annotations

from pydantic import Field

from relay.settings.kinds import Count, Duration, Lifetime, TaskTypeName, written
from relay.settings.section import Section

__all__ = ["ExpirySettings", "RetentionSettings"]


class RetentionSettings(Section):
    """How long rows are kept."""

    default: Lifetime = written("30d")
    """Lifetime of a row, or "never" for rows that are not deleted."""
    by_type: dict[TaskTypeName, Lifetime] = Field(default_factory=dict)
    """Lifetimes of their own for single task types."""


class ExpirySettings(Section):
    """How expired rows are deleted."""

    interval: Duration = written("1h")
    """Time from one round to the next."""
    batch_size: Count = 5000
    """Rows deleted in one transaction, at most."""
