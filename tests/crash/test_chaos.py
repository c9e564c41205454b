"""Everything at once: kills, dead upstreams, cut connections, a full disk, a database that is gone or locked.

`CRASH_KILLS=400 pytest -s tests/crash/test_chaos.py` goes on for longer, `python -m bench.chaos` for as long
as one likes. What befalls the relay, and what does not, stands in `tests/support/chaos.py`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.chaos import Chaos, small_disk

KILLS = int(os.environ.get("CRASH_KILLS", "30"))
EPISODES = max(10, KILLS // 3)


@pytest.mark.timeout(300 + 10 * EPISODES)
async def test_the_books_agree_after_chaos(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")
    with small_disk(tmp_path / "data", 32 + EPISODES) as disk:
        report = await Chaos(tmp_path, seed=seed, disk=disk).run(EPISODES)
        print(report)

    assert report.findings == []
    assert report.figures.told_yes > 0
    assert report.faults.total() > 0
