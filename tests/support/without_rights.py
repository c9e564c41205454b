"""`python -m tests.support.without_rights ARGUMENTS`: `python -m relay ARGUMENTS`, bound by file modes.

They do not bind root, in whose name tests run in many containers: so what exempts it is given up for good,
CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of capabilities(7). For anybody else this changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2


def main() -> None:
    """Give up, and become the relay."""
    if os.geteuid() == 0:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl")
    # A program that root starts has what is left of the bounding set, and not what was dropped from it.
    os.execv(sys.executable, [sys.executable, "-m", "relay", *sys.argv[1:]])


if __name__ == "__main__":
    main()
