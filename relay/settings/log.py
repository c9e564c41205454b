"""The keys of `[log]`: what is written to standard output. No I/O."""

from __future__ import annotations

from typing import Literal

from relay.settings.section import Section

__all__ = ["LogSettings"]


class LogSettings(Section):
    """What is written to standard output."""

    format: Literal["json", "console"] = "json"
    """One JSON object a line, or lines for people."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events that are written."""
