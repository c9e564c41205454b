"""Tries what `relay check --connect` names to an operator: store, spool and upstreams. Sends no mail."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from relay import maillog, parts
from relay.metrics import Metrics
from relay.records.inspection import check_usable, survey
from relay.records.spool import SpoolError
from relay.records.store import MissingStoreError, OlderStoreError, StoreError, check_makeable, open_store
from relay.upstream.dial import Dialer
from relay.upstream.pool import Pool, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from relay.settings import Settings, UpstreamSettings

__all__ = ["Finding", "probe"]

Finding = tuple[str, bool, str]
"""What was tried, whether it works, and a line about it."""


def probe(settings: Settings) -> Sequence[Finding]:
    """Try the store, the spool and all upstreams."""
    maillog.configure("console", "critical")  # what goes wrong is in the findings
    return asyncio.run(_all(settings))


async def _all(settings: Settings) -> Sequence[Finding]:
    found = await _store(settings)
    tried = await asyncio.gather(*(_upstream(settings, upstream) for upstream in settings.upstreams))
    return [found, _spool(settings.records.spool), *tried]


async def _store(settings: Settings) -> Finding:
    """Open the store as it is; one that does not exist is left to the first start to make."""
    url = settings.records.connect_url
    what = f"store {settings.records.shown_url}"
    try:
        store = await open_store(url, parts.retention(settings), create=False, upgrade=False)
        await store.close()
    except MissingStoreError:
        try:
            await check_makeable(url)
        except StoreError as error:
            return what, False, str(error)
        return what, True, "does not exist yet, the first start makes it"
    except OlderStoreError as older:
        return what, True, f"has schema version {older.version}, the next start brings it up to date"
    except StoreError as error:
        return what, False, str(error)
    return what, True, "opens, its schema is current"


def _spool(directory: Path) -> Finding:
    """Look whether rows can wait there. A relay that runs holds the spool, so nothing is opened."""
    what = f"spool {directory}"
    try:
        check_usable(directory)
        if not directory.exists():
            return what, True, "does not exist yet, the first start makes it"
        rows = survey(directory).rows
    except SpoolError as error:
        return what, False, str(error).removeprefix(f"{what}: ")
    return what, True, f"can be written, {rows:,} {'row waits' if rows == 1 else 'rows wait'}"


async def _upstream(settings: Settings, upstream: UpstreamSettings) -> Finding:
    """Connect, secure and log in as a relay would; also where no message goes now."""
    what = f"upstream {upstream.name} {upstream.address}{'' if upstream.weight else ' (drained)'}"
    metrics = Metrics(upstreams=[upstream.name], listeners=[], task_types=[])
    dialer = Dialer(upstream, hostname=settings.server.hostname, own_token=secrets.token_hex(6))
    pool = Pool(upstream, dialer, metrics.upstreams[upstream.name])
    try:
        await pool.probe()
    except UnavailableError:
        return what, False, pool.last_error or "no connection"
    finally:
        await pool.close()
    keywords = " ".join(sorted(pool.capabilities.keywords))
    return what, True, f"connected, TLS {upstream.tls}, offers {keywords or 'no extensions'}"
