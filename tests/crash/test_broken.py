"""The checker of the ledgers can fail: a relay that breaks one promise is found out, by what it breaks.

Each runs on purpose in the very situation in which the promise is hard to keep, with the same applications
and the same checker as the chaos and the kills; a relay that keeps its promises is run beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken import BREAKS, VARIABLE
from tests.support.ledger import id_of, kinds
from tests.support.process import RelayProcess
from tests.support.script import Script
from tests.support.storm import Storm
from tests.support.upstream import Delay, Reset, ScriptedUpstream

SOUND = "relay"
Trouble = Callable[[RelayProcess, Storm], Awaitable[None]]


async def refusals(relay: RelayProcess, applications: Storm) -> None:
    """The upstream refuses now and then."""
    await enough(applications)


async def locks(relay: RelayProcess, applications: Storm) -> None:
    """The database is locked for a while."""
    with contextlib.closing(sqlite3.connect(relay.database)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        await enough(applications)
        connection.rollback()


async def kills(relay: RelayProcess, applications: Storm) -> None:
    """The relay is killed."""
    for _ in range(2):
        await enough(applications)
        await kill(relay, applications)


async def kills_before_a_verdict(relay: RelayProcess, applications: Storm) -> None:
    """The relay is killed with a message between its end of data and its verdict."""
    (upstream,) = applications.upstreams
    for _ in range(2):
        await enough(applications)
        before = len(upstream.messages)
        while not any(message.reply is None for message in upstream.messages[before:]):
            await asyncio.sleep(0.001)
        await kill(relay, applications)


async def kill(relay: RelayProcess, applications: Storm) -> None:
    await relay.kill()
    await applications.take_account()
    await relay.start()


async def enough(applications: Storm) -> None:
    told = applications.told_yes + 20
    async with asyncio.timeout(30):
        while applications.told_yes < told:
            await asyncio.sleep(0.01)


REFUSES: Script = {"end_of_data": lambda _, __, connection: every_other(connection, b"451 4.3.0 not now\r\n")}
RESETS: Script = {"end_of_data": lambda _, __, connection: every_other(connection, Reset())}
SLOW: Script = {"end_of_data": lambda *_: Delay(0.02)}

SITUATIONS: dict[str, tuple[Trouble, Script, str]] = {
    "records before the verdict": (refusals, REFUSES, "a row, but the upstream has not accepted it"),
    "drops rows of a failed commit": (locks, {}, "the client was told 250, and there is no row"),
    "forgets what it spooled": (locks, {}, "the client was told 250, and there is no row"),
    "sends again after a lost verdict": (refusals, RESETS, "the upstream got it 2 times"),
    "forgets the journal": (
        kills_before_a_verdict,
        SLOW,
        "accepted by the upstream, and there is neither row nor entry in doubt",
    ),
    "forgets doubts": (
        refusals,
        RESETS,
        "the upstream has it whole and never answered, and there is no entry in doubt",
    ),
    "doubts what it knows": (kills, REFUSES, "in doubt, and the client was told 451"),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_it_is_found_out(name: str, tmp_path: Path, upstream: ScriptedUpstream) -> None:
    trouble, script, finding = SITUATIONS[name]

    found = await run(tmp_path, upstream, script, trouble, module="tests.support.broken", broken=name)

    assert found[finding] > 0, found


@pytest.mark.parametrize(
    ("trouble", "script"),
    [(refusals, REFUSES), (locks, RESETS), (kills, RESETS), (kills_before_a_verdict, SLOW)],
)
async def test_a_sound_relay_is_not(
    trouble: Trouble, script: Script, tmp_path: Path, upstream: ScriptedUpstream
) -> None:
    assert await run(tmp_path, upstream, script, trouble, module=SOUND) == Counter()


async def run(
    directory: Path,
    upstream: ScriptedUpstream,
    script: Script,
    trouble: Trouble,
    *,
    module: str,
    broken: str = "",
) -> Counter[str]:
    """Have applications send through a relay in trouble, and return what the checker finds, by kind."""
    upstream.script = script
    records: dict[str, Any] = {"commit_timeout": "50ms"}
    async with RelayProcess(directory, upstream.port, module=module, records=records) as relay:
        relay.environment = {VARIABLE: broken}
        await relay.start()
        async with Storm(relay, upstream, clients=5) as applications:
            await trouble(relay, applications)
        await relay.until(
            "records_spooled", 0
        )  # a commit of a slow machine takes longer than commit_timeout, too
        assert await relay.terminate() == 0
    findings, _ = await applications.settle()
    return kinds(findings)


def every_other(connection: Any, action: Any) -> Any:
    """Meet every other try of an application, and with it whatever a relay makes of that try.

    Counted by tries, not by messages: where a broken relay sends each message twice, the last application
    would meet the first of two for ever.
    """
    tries = {id_of(message.content) for message in connection._upstream.messages}
    return action if len(tries) % 2 else None
