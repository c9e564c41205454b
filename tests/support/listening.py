"""A relay that says, among what Python says of its imports, when it listens.

`PYTHONPROFILEIMPORTTIME=1 python -m tests.support.listening serve ...` names modules on standard error as
they are loaded, and LISTENS stands between those before and those after.
"""

from __future__ import annotations

import sys
from typing import Any

from relay import maillog
from relay.cli import main

__all__ = ["LISTENS"]

LISTENS = "the relay listens"


def _mark() -> None:
    started = maillog.started

    def marked(*values: Any, **named: Any) -> None:
        print(LISTENS, file=sys.stderr, flush=True)
        started(*values, **named)

    maillog.started = marked


if __name__ == "__main__":
    _mark()
    sys.exit(main())
