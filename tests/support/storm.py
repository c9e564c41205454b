"""Applications that send through a relay process for as long as they are let, and the account of it.

Rules: each application sends one message after the other, now on a kept-open connection, now on a new one,
by DATA or, where it is offered, by BDAT, and sends a message again, as applications do, until it hears 2yz:
after a 4yz, after a lost connection. A message has one Message-ID however often it is sent; each try has an
id of its own (`ledger.ID_HEADER`), so that the relay's duplicates can be told from the application's. The
accounts are taken in between, so that hundreds of thousands of messages fit into memory.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from .client import Client, OverdueError, Reply
from .ledger import ID_HEADER, Ledger, check, id_of, ids
from .process import RelayProcess
from .upstream import Action, Delay, Message, Reset, ScriptedUpstream

__all__ = ["Figures", "Storm", "is_uncertain", "moody"]

_RETRY_S = 0.01


def moody(dice: random.Random, share: float) -> Action | None:
    """Refuse a share of all for now, reset the connection as often, and take its time with some of the rest.

    A row for what is refused here is a false one; the waits are for kills to fall into.
    """
    return dice.choices(
        [b"451 4.3.0 not now\r\n", Reset(), Delay(dice.uniform(0.0, 0.03)), None],
        [share, share, 0.3, 0.7 - 2 * share],
    )[0]


@dataclass(frozen=True)
class Figures:
    """What a storm came to."""

    kills: int
    messages: int
    """Messages that the applications had to send; each was told 2yz in the end."""
    tries: int
    told_yes: int
    """Tries that were told 2yz: one for each message."""
    accepted: int
    """Tries that the upstream accepted."""
    rows: int
    yes_unheard: int
    """Tries with a row whose client was gone, or the relay, before it heard 2yz."""
    in_doubt: int
    """Tries of which the relay says that it does not know what became of them."""
    accepted_in_doubt: int
    """Of those, what the upstream did accept: no client was told 2yz."""
    unanswered_in_doubt: int
    """Of those, what the upstream has whole and never answered."""
    spooled: int
    """Rows that were found in the spool after kills; one that outlived several counts for each."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


class Storm:
    """`clients` applications at work between `async with`; then `settle` gives the findings.

    An application that meets an unexpected reply (a 5yz, no reply in time) fails the test.
    """

    def __init__(
        self,
        relay: RelayProcess,
        *upstreams: ScriptedUpstream,
        clients: int = 20,
        seed: int = 0,
        port: Callable[[], int] | None = None,
        patience_s: float | None = None,
    ) -> None:
        """`port` says where to connect, 0: nowhere now; by default to the relay itself.

        With `patience_s` an application that waits longer than that for a reply leaves, and sends again.
        """
        self.relay = relay
        self.upstreams = upstreams
        self.told: dict[str, int | None] = {}
        self.uncertain: set[str] = set()
        self.messages = 0
        self.kills = 0
        self.spooled = 0
        self._clients = clients
        self._random = random.Random(seed)
        self._port = port or (lambda: relay.port)
        self._patience_s = patience_s
        self._accepted: list[str] = []
        self._refused: list[str] = []
        self._unanswered: list[str] = []
        self._over = False
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        for number in range(self._clients):
            self._group.create_task(self._application(number, random.Random(self._random.random())))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        await self._group.__aexit__(kind, error, trace)

    @property
    def told_yes(self) -> int:
        """How many tries have been told 2yz."""
        return sum(1 for code in self.told.values() if code is not None and 200 <= code < 300)

    async def kill(self, after_s: float, *, starting: bool = False) -> None:
        """Start the relay, kill it `after_s` seconds after it listens, or after its spawn if `starting`."""
        if starting:
            await self.relay.spawn()
        else:
            await self.relay.start()
        await asyncio.sleep(after_s)
        await self.relay.kill()
        await self.killed()

    async def killed(self) -> None:
        """Note that the relay has been killed, and take the account of what it did."""
        self.kills += 1
        self.spooled += sum(
            segment.read_bytes().count(b"\n") for segment in self.relay.spool.glob("[0-9]*.jsonl")
        )
        await self.take_account()

    async def take_account(self) -> None:
        """Move what the upstream has into the account; only while no relay runs."""
        for upstream in self.upstreams:
            ends = [connection.task for connection in upstream.connections if connection.task is not None]
            if ends:  # each reads what was sent before the kill, to its end
                _, late = await asyncio.wait(ends, timeout=20)
                assert not late, upstream.transcript()
            for message in upstream.messages:
                self._book(message).append(id_of(message.content))
            assert upstream.violations == []
            for account in (upstream.messages, upstream.log, upstream.connections):
                account.clear()

    def _book(self, message: Message) -> list[str]:
        if message.reply is None:
            return self._unanswered
        return self._accepted if message.accepted else self._refused

    async def settle(self, *, killed: bool = True) -> tuple[list[str], Figures]:
        """With the applications done and the relay ended in order: return all contradictions, and figures."""
        await self.take_account()
        rows, in_doubt = ids(self.relay.rows, "task_done"), ids(self.relay.rows, "task_in_doubt")
        ledger = Ledger(
            told=self.told,
            uncertain=self.uncertain,
            accepted=self._accepted,
            refused=self._refused,
            unanswered=self._unanswered,
            rows=rows,
            in_doubt=in_doubt,
        )
        yes = {key for key, code in self.told.items() if code is not None and 200 <= code < 300}
        return check(ledger, settled=not killed), Figures(
            kills=self.kills,
            messages=self.messages,
            tries=len(self.told),
            told_yes=len(yes),
            accepted=len(self._accepted),
            rows=len(rows),
            yes_unheard=len(set(rows) - yes),
            in_doubt=len(in_doubt),
            accepted_in_doubt=len(set(in_doubt) & set(self._accepted)),
            unanswered_in_doubt=len(set(in_doubt) & set(self._unanswered)),
            spooled=self.spooled,
        )

    # One application

    async def _application(self, number: int, dice: random.Random) -> None:
        session: Client | None = None
        sent = attempt = 0
        try:
            while not (self._over and attempt == 0):
                session = session or await self._connect()
                self.messages += attempt == 0
                attempt += 1
                code = await self._send(session, f"{number}-{sent}-{attempt}", f"{number}-{sent}", dice)
                if code is not None and code < 300:
                    sent, attempt = sent + 1, 0
                    stays = dice.random() < 0.8
                else:
                    stays = False
                if not stays:
                    await _leave(session)
                    session = None
        finally:
            if session is not None:
                await _leave(session)

    async def _connect(self) -> Client:
        """Return a session past its EHLO, as soon as there is a relay to have it with."""
        while True:
            while not (port := self._port()):
                await asyncio.sleep(_RETRY_S)
            try:
                session = await Client.connect(port, deadline_s=self._patience_s)
            except self._failures:
                await asyncio.sleep(_RETRY_S)
                continue
            welcome = False
            try:
                welcome = await self._welcome(session)
            finally:
                if not welcome:
                    await _leave(session)
            if welcome:
                return session

    async def _welcome(self, session: Client) -> bool:
        """Whether greeting and EHLO went well: a relay that drains says 421 to either, or is gone."""
        try:
            if (await session.reply()).code != 220:
                return False
            welcome = await session.command("EHLO a.test")
        except self._failures:
            return False
        session.extensions = dict.fromkeys(welcome.lines, "")
        return welcome.code == 250

    async def _send(self, session: Client, key: str, message: str, dice: random.Random) -> int | None:
        """Send once; return the code that told what became of it, or None if nobody said."""
        lines = [b"text %d" % number for number in range(dice.randrange(1, 40))]
        content = b"\r\n".join(
            [
                b"From: <a@example.test>",
                b"Message-ID: <%b@example.test>" % message.encode(),
                b"%b: %b" % (ID_HEADER.encode(), key.encode()),
                b"",
                *lines,
                b"",
            ]
        )
        self.told[key] = None
        try:
            if "CHUNKING" in session.extensions and dice.random() < 0.5:
                cut = dice.randrange(len(content))
                chunks = [content[:cut], content[cut:]]
                replies = await session.chunks(b"a@example.test", [b"b@example.test"], chunks)
            else:
                replies = await session.message(
                    b"a@example.test", [b"b@example.test"], content, pipelined=dice.random() < 0.5
                )
        except self._failures:
            return None
        code = next((reply.code for reply in replies if reply.code >= 400), replies[-1].code)
        assert code < 300 or 400 <= code < 500, replies
        self.told[key] = code
        if is_uncertain(replies):
            self.uncertain.add(key)
        return code

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        """What makes an application send again, on a new connection."""
        return (ConnectionError,) if self._patience_s is None else (ConnectionError, OverdueError)


def is_uncertain(replies: Sequence[Reply]) -> bool:
    """Whether the relay has said that it does not know what became of the message."""
    return any(reply.code == 451 and "may have been sent" in reply.text for reply in replies)


async def _leave(session: Client) -> None:
    await session.__aexit__()
