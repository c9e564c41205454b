"""`python -m relay`: the same as the installed command."""

import sys

from relay.cli import main

sys.exit(main())
