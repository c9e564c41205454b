"""A relay that is broken on purpose: it answers as soon as the upstream has accepted, and records later.

For the proof that the crash tests can fail: `python -m tests.support.early_answer serve --config FILE`.
"""

from __future__ import annotations

import asyncio
import sys

from relay.cli import main
from relay.records.model import Entry
from relay.records.recorder import Recorder

LATE_S = 0.2

_record = Recorder.record
_pending: set[asyncio.Task[None]] = set()


def _record_later(recorder: Recorder, entry: Entry) -> asyncio.Future[None]:
    async def later() -> None:
        await asyncio.sleep(LATE_S)
        await _record(recorder, entry)

    loop = asyncio.get_running_loop()
    task = loop.create_task(later())
    _pending.add(task)
    task.add_done_callback(_pending.discard)
    at_once = loop.create_future()
    at_once.set_result(None)
    return at_once


if __name__ == "__main__":
    Recorder.record = _record_later  # type: ignore[method-assign]
    sys.exit(main())
