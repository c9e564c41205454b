"""A Postfix of its own that hands all its mail to one relay: relayhost with SASL and verified TLS."""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.interop.peers import command, daemon_directory
from tests.interop.postfix import begin, end, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["sending_postfix", "submit"]

MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
command_directory = {commands}
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
maillog_file = /dev/stdout
myhostname = client.test
mydestination =
inet_protocols = ipv4
inet_interfaces =
alias_maps =
relayhost = [localhost]:{port}
smtp_host_lookup = native
smtp_tls_security_level = verify
smtp_tls_CAfile = {directory}/ca.pem
smtp_tls_wrappermode = {wrapper}
smtp_sasl_auth_enable = yes
smtp_sasl_password_maps = static:{{{user}:{password}}}
smtp_sasl_security_options = noanonymous
smtp_sasl_tls_security_options = noanonymous
"""
MASTER = """\
cleanup unix n - n - 0 cleanup
pickup unix n - n 60 1 pickup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
tlsmgr unix - - n 1000? 1 tlsmgr
smtp unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
postlog unix-dgram n - n - 1 postlogd
"""


@contextlib.contextmanager
def sending_postfix(
    port: int, *, implicit: bool, user: str, password: str, authority: Path
) -> Iterator[Path]:
    """Run it, and return its directory; `authority` is a file with the certificates to trust."""
    with daemon_directory() as directory:
        places = prepared(directory)
        (directory / "ca.pem").write_bytes(authority.read_bytes())
        main = MAIN.format(
            **places,
            port=port,
            wrapper="yes" if implicit else "no",
            user=user,
            password=password,
        )
        (directory / "etc/main.cf").write_text(main)
        (directory / "etc/master.cf").write_text(MASTER)
        process = begin(directory)
        try:
            _await_start(directory, process)
            yield directory
        finally:
            end(directory, process)


def submit(directory: Path, sender: str, recipient: str, message: bytes) -> None:
    """Give it a message, with the line ends of its system, as an application does with sendmail."""
    subprocess.run(
        [command("sendmail"), "-C", str(directory / "etc"), "-i", "-f", sender, "--", recipient],
        input=message,
        check=True,
        capture_output=True,
    )


def _await_start(directory: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        log = (directory / "log").read_text(errors="replace")
        assert process.poll() is None, f"Postfix did not start:\n{log}"
        if "daemon started" in log:
            return
        time.sleep(0.05)
    raise AssertionError("Postfix did not start in time")
