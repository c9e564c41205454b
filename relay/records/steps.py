"""The steps of long work: how much of it is looked at in one, and what one did."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLANNED_ROWS", "RETENTION_ROWS", "Step"]

RETENTION_ROWS = 500
"""Rows that are made to follow changed settings in one step."""
PLANNED_ROWS = 250
"""Expired rows that are looked up at a time, to be deleted in as many steps as it takes."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one short transaction of long work did."""

    rows: int
    seconds: float
    finished: bool
