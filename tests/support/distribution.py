"""Which process runs which tests, where several run them (pytest-xdist).

The tests of a file stay together, since they share what it sets up, and so do the files that share something.
Not by marks and `--dist loadgroup`: pytest-xdist 3.8 puts the group into a place that pytest 9 does not read.
"""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadFileScheduling

__all__ = ["LONGEST", "ByFile"]

ONE_OF_A_KIND = {"test_install.py", "test_image.py", "test_systemd.py"}  # the wheel, the image, the system
LONGEST = {*ONE_OF_A_KIND, "test_compiled.py", "test_transaction_walk.py"}
"""Files that run first, so that no process waits for another at the end."""


class ByFile(LoadFileScheduling):
    """Gives out files, not tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "one of a kind" if Path(file).name in ONE_OF_A_KIND else file
