"""Finding the peers that Debian's and npm's packages bring, and a place where their daemons can work.

Rules: a peer that is missing skips its tests and says what to install; nothing here starts a service of the
system or touches its configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

__all__ = [
    "AS_ROOT",
    "AXE",
    "NGINX_ALONE",
    "NGINX_FILES",
    "NODEMAILER",
    "Ended",
    "command",
    "daemon_directory",
    "free_port",
    "listening",
    "needs",
    "run",
]

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
_HERE = Path(__file__).parent
NODEMAILER = _HERE / "node_modules" / "nodemailer"
AXE = _HERE / "node_modules" / "axe-core" / "axe.min.js"
"""Where `npm install` in this directory puts them."""

NGINX_ALONE = """\
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr error;
events {{ worker_connections 64; }}
"""
NGINX_FILES = """\
    access_log off;
    client_body_temp_path {directory}/1; proxy_temp_path {directory}/2; fastcgi_temp_path {directory}/3;
    uwsgi_temp_path {directory}/4; scgi_temp_path {directory}/5;
"""
"""What an nginx of our own has in its configuration, and in the block `http`; to be formatted."""

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="Postfix starts its daemons as root only")


def command(name: str) -> str:
    """Return the path of a command, sbin directories included; FileNotFoundError if it is not installed."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def needs(name: str, package: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a test that needs the command `name` from Debian's `package`."""
    missing = shutil.which(name, path=_PATH) is None
    reason = f"{name} is not installed: apt-get install {package}"
    return [pytest.mark.interop, pytest.mark.skipif(missing, reason=reason)]


@dataclass(frozen=True)
class Ended:
    """A program that has run to its end."""

    status: int
    out: bytes
    err: bytes

    @property
    def said(self) -> str:
        """Everything that it wrote, for people."""
        return (self.out + self.err).decode("utf-8", "replace")


async def run(arguments: Sequence[str], stdin: bytes = b"", *, timeout_s: float = 40.0) -> Ended:
    """Run a program beside this event loop; one that takes too long is killed and fails the test."""
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin)
    except TimeoutError:
        raise AssertionError(f"{arguments[0]} has not ended within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


@contextlib.contextmanager
def daemon_directory() -> Iterator[Path]:
    """Make a directory that a daemon can reach once it has given up root: pytest's own are root's alone."""
    with tempfile.TemporaryDirectory(prefix="relay-interop-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago, for peers that cannot choose one and tell it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def listening(port: int, name: str, *arguments: str) -> AsyncIterator[None]:
    """Run the command `name`, which stays in the foreground, from when it listens at `port` on."""
    process = await asyncio.create_subprocess_exec(
        *(command(name), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await _listens(port, name, process)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def _listens(port: int, name: str, process: asyncio.subprocess.Process) -> None:
    for _ in range(600):
        if process.returncode is not None:
            _, said = await process.communicate()
            raise AssertionError(f"{name} did not start: {said.decode(errors='replace')}")
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} does not listen")
