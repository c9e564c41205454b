"""The README's commands are run as they stand, but for the ports and `make`, which would run this test."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NOT_HERE = {"make run\n", "make test\n"}
"""They set up the environment that this test already runs in; a release runs them in a fresh clone."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_listening(port: int) -> None:
    for _ in range(200):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the relay does not listen")


def test_the_first_screen_shows_run_and_test() -> None:
    first_screen = README.split("\n## ")[0]
    assert "make run" in first_screen
    assert "make test" in first_screen
    assert {block for block in BLOCKS if block.startswith("make")} == NOT_HERE


def test_every_command_works_as_written(tmp_path: Path) -> None:
    smtp, http = free_port(), free_port()
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "config").symlink_to(ROOT / "config")
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith(("RELAY", "VIRTUAL_ENV"))
    }
    ports = {"RELAY__LISTENERS__0__ADDRESS": f"127.0.0.1:{smtp}", "RELAY__HTTP__ADDRESS": f"127.0.0.1:{http}"}
    relay = subprocess.Popen(
        [".venv/bin/relay", "serve", "--dev"], cwd=tmp_path, env=environ | ports, stdout=subprocess.DEVNULL
    )
    try:
        wait_until_listening(smtp)
        said = []
        for block in BLOCKS:
            if block in NOT_HERE:
                continue
            script = block.replace("2525", str(smtp)).replace("9025", str(http))
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=environ,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
            said.append(done.stdout)
    finally:
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(30) == 0
    assert "order-confirmation" in said[0]
    assert 'smtp_relay_messages_total{outcome="accepted",upstream="dev"} 1.0' in said[0]
    assert "valid" in said[1]
