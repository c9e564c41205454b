"""What a start has no time for, loaded later: in a thread, so that the event loop and the mail go on.

What is loaded stays. The garbage collector is told to leave it alone, or it would look at all of it again and
again, for tens of milliseconds, and everything would wait for that.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from typing import TypeVar

__all__ = ["late"]

T = TypeVar("T")


async def late(load: Callable[[], T]) -> T:
    """Return what `load` returns, which imports modules (it blocks); what it raises is raised here."""
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        return await asyncio.to_thread(load)
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if collects:
            gc.enable()
