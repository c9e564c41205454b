"""File descriptors: the soft limit is raised, and a configuration that may need more is told."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.descriptors import BESIDE, raise_limit, shortage
from tests.support.process import RelayProcess
from tests.support.upstream import ScriptedUpstream

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def low_soft_limit() -> Iterator[int]:
    """A soft limit below the hard one; the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_soft_limit_becomes_the_hard_one(low_soft_limit: int) -> None:
    assert raise_limit() == low_soft_limit
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low_soft_limit, low_soft_limit)


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert raise_limit() == soft


def test_connections_beyond_the_limit_are_a_warning_that_says_what_to_change(settings_for: Any) -> None:
    settings = settings_for(25)
    needed = settings.server.max_connections + sum(u.max_connections for u in settings.upstreams) + BESIDE
    assert shortage(settings, needed) is None
    assert shortage(settings, resource.RLIM_INFINITY) is None
    text = shortage(settings, needed - 1)
    assert text is not None
    assert f"may need {needed} file descriptors, this process may have {needed - 1}" in text
    assert "LimitNOFILE" in text


@pytest.mark.usefixtures("low_soft_limit")
async def test_the_relay_raises_it_at_its_start_and_warns(tmp_path: Path) -> None:
    server = {"max_connections": 10_000_000}
    async with ScriptedUpstream() as upstream, RelayProcess(tmp_path, upstream.port, server=server) as relay:
        await relay.start()
        soft, hard = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
        assert soft == hard
        warnings = [line["text"] for line in relay.log() if line["event"] == "warning"]
    assert (
        any("may need 10000148 file descriptors" in text for text in warnings)
        or hard == resource.RLIM_INFINITY
    )
