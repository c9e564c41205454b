"""What commands are tried on: a directory with a configuration, and rows in the database that it means."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from relay.records.retention import Retention
from relay.records.store import open_store

if TYPE_CHECKING:
    import pytest

    from relay.records.model import Entry

__all__ = ["configured", "record"]


def configured(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to `directory`, with a configuration in it that commands find."""
    monkeypatch.chdir(directory)
    Path("relay.toml").write_text('[[upstreams]]\naddress = "smtp.example.com:587"\n')
    monkeypatch.setenv("RELAY_CONFIG", "relay.toml")


def record(*rows: Entry) -> None:
    """Write rows, for 30 days, to the database of whoever names none."""

    async def write() -> None:
        store = await open_store("sqlite:///data/task_done.db", Retention(timedelta(days=30)))
        await store.write(rows)
        await store.close()

    asyncio.run(write())
