"""The id of a relay among those on one store: made once, and kept beside its spool."""

from __future__ import annotations

import contextlib
from pathlib import Path
from uuid import uuid4

__all__ = ["relay_id"]


def relay_id(directory: Path) -> str:
    """Return the id of the relay whose spool this is, made when it is asked for first (it blocks)."""
    file = directory / "relay_id"
    try:
        found = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    if not found.isalnum():
        found = uuid4().hex
        with contextlib.suppress(OSError):  # then it is another one after a restart
            file.touch(0o600)  # as all files there, whatever the umask
            file.write_text(f"{found}\n", "ascii")
    return found
