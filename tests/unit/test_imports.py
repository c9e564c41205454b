"""What the commands import: help and the small commands stay quick because they load nothing heavy.

Modules are counted, not seconds: they do not depend on how busy the machine is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    *("aiohttp", "aiosmtpd", "aiosmtplib", "aiosqlite", "alembic", "argon2", "asyncio", "asyncpg"),
    *("cryptography", "email", "jinja2", "mako", "orjson", "prometheus_client", "pydantic", "pygments"),
    *("rich", "sqlalchemy", "sqlite3", "ssl", "tomlkit", "uvloop"),
}
"""Packages that take longer to import than help takes to print."""
MOST = 300
"""Modules that help may load in all, the interpreter's own among them."""


def loaded(*arguments: str) -> set[str]:
    """The modules that a command has loaded by its end."""
    script = (
        "import contextlib, io, sys\n"
        "from relay.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    modules = loaded(*arguments)
    assert {module.partition(".")[0] for module in modules} & HEAVY == set()
    assert len(modules) <= MOST


def test_the_process_loads_nothing_that_is_needed_later() -> None:
    script = "import relay.process, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True
    )
    packages = {module.partition(".")[0] for module in done.stdout.split()}
    later = {"aiohttp", "alembic", "asyncpg", "cryptography", "jinja2", "mako", "rich", "sqlalchemy", "typer"}
    assert packages & later == set()
