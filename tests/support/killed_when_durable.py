"""A relay that is killed at a named point: when a row is durable, before anything is made of that.

`python -m tests.support.killed_when_durable serve --config FILE`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from relay.cli import main
from relay.records import recorder


def _kill(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    recorder._release = _kill
    sys.exit(main())
