"""Every conversation in tests/dialogs, held with a live relay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support import dialogs

if TYPE_CHECKING:
    from pathlib import Path

FILES = sorted(dialogs.DIALOGS.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
async def test_dialogue(path: Path, start: Any) -> None:
    dialogue = dialogs.parse(path.name, path.read_text())
    async with dialogue.upstream() as upstream, start(upstream.port, **dialogue.relay) as running:
        await dialogs.run(dialogue, running.port, upstream)
