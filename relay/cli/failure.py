"""How a command says that it failed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CommandError"]


class CommandError(Exception):
    """The command failed: `lines` for standard error, `status` for the shell (2: bad usage or settings)."""

    def __init__(self, lines: Sequence[str], status: int = 1) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.status = status
