"""A Postfix of our own: private configuration, queue and ports, run in the foreground, ended by its master.

Rules: it needs root, as Postfix does to give its daemons their users, and Debian's package for the programs;
it never touches the system's instance. Mail is not delivered: every message stays in the hold queue, where
its file is the proof that Postfix has taken responsibility.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.interop.peers import command, daemon_directory, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Postfix", "begin", "end", "postfix", "prepared"]

MESSAGE_SIZE_LIMIT = 2 * 1024 * 1024

# Nothing may ask the system: no aliases, no DNS, no maps from /etc. The first port is lenient, as Postfix was
# for decades, for what must not depend on it; the others end a client that talks out of turn. No pause lets
# delivery catch up with arrival (in_flow_delay): nothing is ever delivered.
MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
command_directory = {commands}
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
maillog_file = /dev/stdout
inet_interfaces = loopback-only
inet_protocols = ipv4
myhostname = postfix.test
mydestination =
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
smtpd_peername_lookup = no
smtpd_reject_unlisted_recipient = no
smtpd_client_restrictions = check_client_access static:HOLD
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_sender_restrictions = check_sender_access inline:{{{{banned@example.test = 550 5.7.1 Not from you}}}}
smtpd_recipient_restrictions =
    check_recipient_access inline:{{{{nobody@example.test = 550 5.1.1 No such user}},
    {{greylisted@example.test = 450 4.7.1 Come back later}}}}
header_checks = regexp:{directory}/etc/header_checks
smtpd_end_of_data_restrictions =
    check_sender_access inline:{{{{full@example.test = 452 4.2.2 Over quota}}}}
message_size_limit = {limit}
smtpd_tls_chain_files = {directory}/etc/tls.pem
smtpd_tls_received_header = yes
smtputf8_enable = yes
smtpd_forbid_bare_newline = no
in_flow_delay = 0
"""

HEADER_CHECKS = "/^X-Spam-Flag: YES/ REJECT looks like spam\n"

# name, type, private, unprivileged, chroot, wakeup, maximal processes, command
MASTER = """\
127.0.0.1:{plain} inet n - n - - smtpd
127.0.0.1:{tls} inet n - n - - smtpd -o smtpd_tls_security_level=encrypt
 -o smtpd_forbid_unauth_pipelining=yes
127.0.0.1:{no_size} inet n - n - - smtpd -o smtpd_discard_ehlo_keywords=size
 -o smtpd_forbid_unauth_pipelining=yes
127.0.0.1:{xforward} inet n - n - - smtpd -o smtpd_authorized_xforward_hosts=127.0.0.0/8
 -o inet_protocols=all
 -o smtpd_forbid_unauth_pipelining=yes
127.0.0.1:{bare} inet n - n - - smtpd -o smtpd_discard_ehlo_keywords=pipelining,dsn,smtputf8,chunking
 -o smtpd_forbid_unauth_pipelining=yes
127.0.0.1:{few} inet n - n - - smtpd -o smtpd_client_connection_count_limit=2
 -o smtpd_client_event_limit_exceptions=
 -o smtpd_forbid_unauth_pipelining=yes
cleanup unix n - n - 0 cleanup
pickup unix n - n 60 1 pickup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
tlsmgr unix - - n 1000? 1 tlsmgr
anvil unix - - n - 1 anvil
showq unix n - n - - showq
error unix - - n - - error
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass(frozen=True)
class Postfix:
    """A Postfix that runs, and its ports."""

    directory: Path
    plain: int
    """Every extension that Postfix has, no TLS needed; takes a bare LF for a line end."""
    tls: int
    """STARTTLS is a must."""
    no_size: int
    """Without SIZE: nobody knows the limit before it is passed."""
    bare: int
    """Without PIPELINING, DSN and SMTPUTF8."""
    xforward: int
    """With XFORWARD, for clients from loopback; it knows IPv6."""
    few: int
    """No more than two connections of one client at the same time."""

    @property
    def version(self) -> str:
        """Return `mail_version`."""
        return self._run("postconf", "-h", "mail_version").strip()

    def queue(self) -> list[dict[str, Any]]:
        """Return what `postqueue -j` says about each message, oldest first."""
        found = [json.loads(line) for line in self._run("postqueue", "-j").splitlines()]
        return sorted(found, key=lambda message: message["arrival_time"])

    def envelope(self, queue_id: str) -> str:
        """Return the envelope records of a message, as postcat shows them."""
        return self._run("postcat", "-e", "-q", queue_id)

    def message(self, queue_id: str) -> bytes:
        """Return a message's header section and body, with CRLF, without the Received field of Postfix."""
        arguments = [command("postcat"), "-c", str(self.directory / "etc"), "-hb", "-q", queue_id]
        octets = subprocess.run(arguments, check=True, capture_output=True).stdout
        lines = octets.split(b"\n")
        own = next(index for index, line in enumerate(lines[1:], 1) if line[:1] not in (b" ", b"\t"))
        assert lines[0].startswith(b"Received: ")
        return b"\r\n".join(lines[own:])

    def received(self, queue_id: str) -> str:
        """Return the message with what Postfix put before it."""
        return self._run("postcat", "-hb", "-q", queue_id)

    def log(self) -> str:
        """Return what it has logged so far."""
        return (self.directory / "log").read_text(errors="replace")

    def empty(self) -> None:
        """Forget every queued message."""
        if self.queue():
            self._run("postsuper", "-d", "ALL")

    def hang_up(self) -> None:
        """End every server process that has talked to a client, and with it the client's connection."""
        for pid in set(re.findall(r"postfix/smtpd\[(\d+)\]: connect from", self.log())):
            # Some have ended since, and their number may be another program's now.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text() == "smtpd\n":
                    os.kill(int(pid), signal.SIGTERM)

    def _run(self, name: str, *arguments: str) -> str:
        done = subprocess.run(
            [command(name), "-c", str(self.directory / "etc"), *arguments],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def postfix(certificate: bytes) -> Iterator[Postfix]:
    """Run a Postfix whose key and certificate chain (PEM) are `certificate`."""
    with daemon_directory() as directory:
        instance = Postfix(directory, *(free_port() for _ in range(6)))
        _configure(instance, certificate)
        process = begin(directory)
        try:
            _await_greeting(instance, process)
            yield instance
        finally:
            end(directory, process)


def _configure(instance: Postfix, certificate: bytes) -> None:
    directory = instance.directory
    main = MAIN.format(**prepared(directory), limit=MESSAGE_SIZE_LIMIT)
    names = ("plain", "tls", "no_size", "bare", "xforward", "few")
    ports = {name: getattr(instance, name) for name in names}
    (directory / "etc/main.cf").write_text(main)
    (directory / "etc/master.cf").write_text(MASTER.format(**ports))
    (directory / "etc/header_checks").write_text(HEADER_CHECKS)
    (directory / "etc/tls.pem").write_bytes(certificate)
    (directory / "etc/tls.pem").chmod(0o600)


def _await_greeting(instance: Postfix, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Postfix did not start:\n{instance.log()}"
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", instance.plain), timeout=10) as probe,
        ):
            assert probe.recv(100).startswith(b"220 "), instance.log()
            return
        time.sleep(0.05)
    raise AssertionError(f"Postfix does not answer:\n{instance.log()}")


# What every instance has, whatever it is for


def prepared(directory: Path) -> dict[str, Path]:
    """Make the directories of an instance; return what its main.cf is to say of places."""
    for name in ("etc", "queue", "data"):
        (directory / name).mkdir()
    shutil.chown(directory / "data", "postfix")
    daemons = next(
        path for path in map(Path, ("/usr/lib/postfix/sbin", "/usr/libexec/postfix")) if path.is_dir()
    )
    return {"directory": directory, "commands": Path(command("postfix")).parent, "daemons": daemons}


def begin(directory: Path) -> subprocess.Popen[bytes]:
    """Start the instance that is configured there; it logs to the file `log`."""
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [command("postfix"), "-c", str(directory / "etc"), "start-fg"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def end(directory: Path, process: subprocess.Popen[bytes]) -> None:
    """End the master, which ends its daemons; the shell script in front of it ends with it."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((directory / "queue/pid/master.pid").read_text()), signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
