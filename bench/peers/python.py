"""Peers from PyPI: aiosmtpd's own Proxy, python-slimta; found in `.peers/venv`."""

from __future__ import annotations

from pathlib import Path

from bench.processes import ROOT

_VENV = ROOT / ".peers" / "venv"


def _installed(name: str) -> str | None:
    """The version of a package there, read from its metadata's directory."""
    found = sorted(_VENV.glob(f"lib/python3*/site-packages/{name}-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").rpartition("-")[2] if found else None


def no_aiosmtpd() -> str | None:
    return None if _installed("aiosmtpd") else "aiosmtpd is not installed"


def aiosmtpd_version() -> str:
    return f"aiosmtpd {_installed('aiosmtpd')}"


def aiosmtpd_proxy(_directory: Path, port: int, sink_port: int) -> list[str]:
    """`aiosmtpd.handlers.Proxy` as shipped: blocking smtplib inside the event loop."""
    return _script("aiosmtpd_relay.py", port, sink_port)


def no_slimta() -> str | None:
    return None if _installed("python_slimta") else "python-slimta is not installed"


def slimta_version() -> str:
    return f"python-slimta {_installed('python_slimta')}"


def slimta(_directory: Path, port: int, sink_port: int) -> list[str]:
    """`SmtpEdge`, `ProxyQueue` and `StaticSmtpRelay` with connections that are used again."""
    return _script("slimta_relay.py", port, sink_port)


def _script(name: str, port: int, sink_port: int) -> list[str]:
    return [str(_VENV / "bin" / "python"), str(Path(__file__).with_name(name)), str(port), str(sink_port)]
