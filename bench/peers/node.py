"""Peers from npm: Haraka, and nodemailer behind its own smtp-server; found in `.peers/node`."""

from __future__ import annotations

import json
from pathlib import Path

from bench.ends import tool
from bench.peers.debian import LIMIT
from bench.processes import ROOT

_MODULES = ROOT / ".peers" / "node" / "node_modules"
POOL = 200
"""Connections to the upstream at most."""


def _missing(*names: str) -> str | None:
    if tool("node") is None:
        return "nodejs is not installed"
    gone = [name for name in names if not (_MODULES / name).is_dir()]
    return f"{', '.join(gone)} not installed" if gone else None


def _version(name: str) -> str:
    text = (_MODULES / name / "package.json").read_text("utf-8")
    return f"{name} {json.loads(text)['version']}"


def no_haraka() -> str | None:
    return _missing("Haraka")


def haraka_version() -> str:
    return _version("Haraka")


def haraka(directory: Path, port: int, sink_port: int) -> list[str]:
    """One process, `smtp_proxy` with its pool, the look-up of client names switched off."""
    files = {
        "config/smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\npublic_ip=127.0.0.1\n",
        "config/plugins": "bench_accept\nqueue/smtp_proxy\n",
        "config/smtp_proxy.ini": f"host=127.0.0.1\nport={sink_port}\nmax_connections={POOL}\ntimeout=280\n",
        "config/log.ini": "[main]\nlevel=error\n",
        "config/loglevel": "error\n",
        "config/me": "relay.bench\n",
        "config/databytes": f"{LIMIT}\n",
        "config/internalcmd_key": "bench\n",
        "plugins/bench_accept.js": (
            "exports.hook_lookup_rdns = (next) => next(OK, 'localhost')\n"
            "exports.hook_rcpt = (next) => next(OK)\n"
        ),
    }
    for name, text in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "ascii")
    (directory / "queue").mkdir()
    return ["node", str(_MODULES / "Haraka" / "bin" / "haraka"), "-c", str(directory)]


def no_nodemailer() -> str | None:
    return _missing("nodemailer", "smtp-server")


def nodemailer_version() -> str:
    return f"{_version('smtp-server')}, {_version('nodemailer')}"


def nodemailer(_directory: Path, port: int, sink_port: int) -> list[str]:
    """`nodemailer_relay.js`: a message collected, then sent over a pool."""
    script = Path(__file__).with_name("nodemailer_relay.js")
    return ["node", str(script), str(_MODULES), str(port), str(sink_port), str(POOL)]
