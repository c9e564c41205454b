"""What the relays that are yardsticks have in common: how `targets.py` starts them."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["arguments"]


def arguments(description: str | None) -> argparse.Namespace:
    """Read port, upstream_port and database from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    parser.add_argument("--database", type=Path, required=True)
    return parser.parse_args()
