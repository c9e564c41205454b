"""The relay that is measured: as `pip install .` installs it, so with its message path compiled.

It stands in build/installed, where `make bench` puts it. Without that the sources run, which the
results say.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.processes import ROOT

PLACE = ROOT / "build" / "installed"


def compiled() -> bool:
    """Whether what `environment` names is compiled."""
    return any(PLACE.glob("relay/transaction.*.so"))


def command(config: Path) -> list[str]:
    """What serves with this configuration. -P: the sources in the working directory are not meant."""
    return [sys.executable, "-P", "-m", "relay", "serve", "--config", str(config)]


def environment() -> dict[str, str]:
    """Where `command` finds the relay."""
    return {"PYTHONPATH": str(PLACE if PLACE.exists() else ROOT)}


def sources() -> dict[str, str]:
    """Where `command` finds the relay that is never compiled."""
    return {"PYTHONPATH": str(ROOT)}
