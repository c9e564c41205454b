"""Limits against a plain model: random mail, clocks, windows, restarts, a store away, an upstream that fails.

The model adds up what was really sent, and what is under way, message by message. A message passes exactly
when the model has room for it in every limit, whatever the limits know at that moment and whenever the store
answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.limits import limits as engine
from relay.limits.claim import Claim
from relay.limits.limits import Limits
from relay.limits.rule import Event, Message, Patterns, Rule
from relay.records.errors import StoreError
from relay.records.identity import uuid7
from relay.records.model import Doubt, Record

if TYPE_CHECKING:
    from collections.abc import Collection
    from uuid import UUID

    from relay.reply import Reply

SENDERS = ("a@example.com", "A@Example.com", "b@example.com", "")
RECIPIENTS = ("x@example.org", "X@EXAMPLE.org", "y@example.net")
TYPES = ("mention", "digest")


@dataclass
class Sent:
    """One message that was sent, or may have been."""

    task_id: UUID
    at: float
    message: Message
    doubtful: bool = False
    stored: bool = False


@dataclass
class World:
    """The truth: what was sent, and the store that has it, or is away."""

    rng: random.Random
    now: float = 1_800_000_000.0
    sent: list[Sent] = field(default_factory=list)
    away: bool = False
    spooling: bool = False
    """Whether rows go to the spool, and wait there: also while the store can be read again."""
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)

    async def look_up(self, rule: Rule, key: str, since: float, own: Collection[UUID]) -> list[Event]:
        del own
        for _ in range(self.rng.randrange(3)):
            await asyncio.sleep(0)
        if self.away:
            raise StoreError("away")
        found = [
            Event(each.at, amount, each.task_id)
            for each in self.sent
            if each.stored and each.at > since and (amount := rule.demand(each.message).get(key, 0))
        ]
        for _ in range(self.rng.randrange(3)):
            await asyncio.sleep(0)
        return found

    def limit_hit(self, limit: str, action: str) -> None:
        self.hits[limit, action] += 1

    def used(self, rule: Rule, key: str) -> int:
        """Return what counts now, by the records alone."""
        return sum(
            rule.demand(each.message).get(key, 0) for each in self.sent if each.at > self.now - rule.window
        )

    def keep(self, sent: Sent) -> None:
        sent.stored = not self.spooling
        self.sent.append(sent)

    def back(self) -> None:
        """Return the store, which has everything then."""
        self.away = self.spooling = False
        for each in self.sent:
            each.stored = True


class Relay:
    """The limits of one process, and its messages under way."""

    def __init__(self, world: World, rules: tuple[Rule, ...]) -> None:
        self.world = world
        self.rules = rules
        self.open: list[Under] = []
        self.limits: Limits
        self.start()

    def start(self) -> None:
        world = self.world
        self.limits = Limits(world, world, clock=lambda: world.now, spooling=lambda: world.spooling)
        self.limits.use(self.rules)
        self.limits.adopt(entry(each) for each in world.sent if not each.stored)

    async def restart(self) -> None:
        """Kill it: what is under way may have been sent, or was never."""
        await self.limits.close()
        for under in self.open:
            if under.stage == "end" and self.world.rng.random() < 0.5:
                self.world.keep(Sent(under.task_id, self.world.now, under.message, doubtful=True))
        self.open.clear()
        self.start()

    def held(self, rule: Rule, key: str, but: Under | None = None) -> int:
        """Return what is under way, by what each message is known to be."""
        return sum(under.holds(rule).get(key, 0) for under in self.open if under is not but)


class Under:
    """One message under way."""

    def __init__(self, relay: Relay, message: Message, declared: int) -> None:
        self.relay = relay
        self.task_id = uuid7()
        self.whole = message
        self.message = replace(message, task_type=None, recipients=(), size=declared)
        self.stage = "new"
        self.claim = Claim(relay.limits, self.task_id, message.sender, message.client, declared)

    def holds(self, rule: Rule) -> dict[str, int]:
        """Return what it has to hold by now."""
        if self.stage == "new" or (rule.needs_header and self.stage not in ("header", "end")):
            return {}
        return rule.demand(self.message)

    async def decided(self, stage: str, message: Message) -> bool:
        """Take one step; return whether it passes, which is as the model says."""
        told: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        match stage:
            case "mail":
                self.claim.at_mail(told.set_result)
            case "rcpt":
                self.claim.at_rcpt(message.recipients[-1], told.set_result)
            case "header":
                self.claim.at_header(str(message.task_type), told.set_result)
            case _:
                self.claim.at_end(message.recipients, message.size, told.set_result)
        refusal = await told
        full = [rule for rule in self.relay.rules if self.strikes(rule, stage, message)]
        enforced = [rule for rule in full if rule.action != "observe"]
        blind = refusal is not None and b"cannot be counted" in refusal.wire
        assert blind or (refusal is not None) == bool(enforced), (stage, refusal, full)
        assert not blind or self.relay.world.away
        if refusal is None:
            self.message, self.stage = message, stage
            return True
        if not blind:
            assert any(f"Rate limit {rule.name} ".encode() in refusal.wire for rule in enforced)
        return False

    def strikes(self, rule: Rule, stage: str, message: Message) -> bool:
        """Whether the model has no room for the message as it is now."""
        if not rule.concerns(message):
            return False
        if rule.needs_header != (stage == "header") and stage != "end":
            return False
        probe = rule.demand(message)
        if stage == "mail":
            if rule.by_recipient:
                return False
            probe = probe or {rule.key_of(message): 1}
        elif stage == "rcpt":
            if not rule.by_recipient and rule.unit != "recipients":
                return False
            if not rule.counted(message.recipients[-1]):
                return False
            key = rule.key_of_recipient(message, message.recipients[-1])
            probe = {key: probe[key]}
        elif stage == "end":
            before = rule.demand(self.message)
            probe = {key: amount for key, amount in probe.items() if amount > before.get(key, 0)}
        world, relay = self.relay.world, self.relay
        return any(
            world.used(rule, key) + relay.held(rule, key, but=self) + max(amount, 1) > rule.maximum
            for key, amount in probe.items()
        )

    async def to(self, last: str, refused: Collection[str] = ()) -> bool:
        """Go on until `last`; False: a limit, or the upstream for all recipients, was against it."""
        whole = self.whole
        if not await self.decided("mail", self.message):
            return False
        for recipient in whole.recipients:
            message = replace(self.message, recipients=(*self.message.recipients, recipient))
            if await self.decided("rcpt", message) and recipient in refused:
                self.claim.not_taken(recipient)
                taken = list(self.message.recipients)
                taken.remove(recipient)
                self.message = replace(self.message, recipients=tuple(taken))
        if not self.message.recipients:
            return False
        if last == "rcpt":
            return True
        if not await self.decided("header", replace(self.message, task_type=whole.task_type)):
            return False
        return last == "header" or await self.decided("end", replace(self.message, size=whole.size))

    def close(self, fate: str) -> None:
        """Let the upstream decide."""
        sent = fate in ("accepted", "doubt")
        if sent:
            doubtful = fate == "doubt"
            self.relay.world.keep(Sent(self.task_id, self.relay.world.now, self.message, doubtful=doubtful))
        self.claim.end(sent=sent)
        if self in self.relay.open:
            self.relay.open.remove(self)


def entry(sent: Sent) -> Record | Doubt:
    """Return what a process finds in its spool."""
    message, moment = sent.message, datetime.fromtimestamp(sent.at, UTC)
    given = {
        "task_id": sent.task_id,
        "task_type": message.task_type,
        "sender": message.sender,
        "client": message.client,
        "upstream": "primary",
        "size": message.size,
        "duration_ms": 1,
        "recipients": tuple(message.recipients),
    }
    if sent.doubtful:
        return Doubt(since=moment, reason="", **given)
    return Record(sent_at=moment, upstream_reply="250 ok", **given)


def patterns(*texts: str) -> st.SearchStrategy[Patterns | None]:
    given = st.lists(st.sampled_from(texts), min_size=1, max_size=2).map(Patterns)
    return st.one_of(*([st.none()] * 5), given)


RULES = st.builds(
    Rule,
    name=st.just("a"),
    scope=st.sampled_from(["sender", "recipient", "client", "sender_domain", "recipient_domain", "all"]),
    unit=st.sampled_from(["messages", "recipients", "octets"]),
    maximum=st.integers(1, 4),
    window=st.sampled_from([60.0, 600.0, 86_400.0]),
    action=st.sampled_from(["defer", "reject", "observe"]),
    on_error=st.just("defer"),
    task_type=patterns("mention", "D*"),
    sender=patterns("<>", "*@example.com", "?@*"),
    recipient_domain=patterns("example.org", "*.NET"),
    not_task_type=patterns("digest"),
    not_sender=patterns("b@*"),
    not_client=patterns("user*"),
    not_recipient=patterns("y@*"),
)
MESSAGES = st.builds(
    Message,
    sender=st.sampled_from(SENDERS),
    client=st.sampled_from(["192.0.2.1", "user"]),
    task_type=st.sampled_from(TYPES),
    recipients=st.lists(st.sampled_from(RECIPIENTS), min_size=1, max_size=3).map(tuple),
    size=st.integers(1, 4),
)
FATES = st.sampled_from(["accepted"] * 5 + ["refused", "doubt", "gone"])
STEPS = st.one_of(
    st.tuples(st.just("send"), MESSAGES, FATES | st.just("one refused"), st.integers(0, 4)),
    st.tuples(st.just("send"), MESSAGES, FATES, st.just(0)),
    st.tuples(st.just("open"), MESSAGES, st.sampled_from(["rcpt", "header", "end"]), st.integers(0, 4)),
    st.tuples(st.just("close"), st.integers(0, 5), FATES),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 20.0, 59.0, 60.0, 300.0, 90_000.0])),
    st.tuples(st.just("restart")),
    st.tuples(st.just("away")),
    st.tuples(st.just("back")),
    st.tuples(st.just("late")),
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a store that failed again at once, and known counts as often as can be."""
    monkeypatch.setattr(engine, "ASK_PAUSE_S", -1.0)


def numbered(rules: list[Rule]) -> tuple[Rule, ...]:
    return tuple(replace(rule, name=f"rule{number}") for number, rule in enumerate(rules))


async def play(relay: Relay, step: tuple[object, ...]) -> None:
    """Take one step, and see that the world is as the model has it."""
    world = relay.world
    match step:
        case ("send", Message() as message, str(fate), int(declared)):
            under = Under(relay, message, declared)
            relay.open.append(under)
            # One more fate: the upstream does not take the first recipient.
            passed = await under.to("end", message.recipients[:1] if fate == "one refused" else ())
            under.close({"one refused": "accepted"}.get(fate, fate) if passed else "gone")
        case ("open", Message() as message, str(last), int(declared)):
            under = Under(relay, message, declared)
            relay.open.append(under)
            if not await under.to(last):
                under.close("gone")
        case ("close", int(number), str(fate)) if relay.open:
            under = relay.open[number % len(relay.open)]
            under.close(fate if under.stage == "end" else "gone")
        case ("wait", float(seconds)):
            world.now += seconds
        case ("restart",):
            await relay.restart()
        case ("away",):
            world.away = world.spooling = True
        case ("late",):
            world.away = False
        case ("back",):
            world.back()
    for rule in relay.rules:
        if rule.action != "observe":
            for each in world.sent:
                for key in rule.demand(each.message):
                    assert world.used(rule, key) + relay.held(rule, key) <= rule.maximum


@settings(deadline=None, max_examples=300)
@given(
    rules=st.lists(RULES, min_size=1, max_size=3).map(numbered),
    steps=st.lists(STEPS, min_size=5, max_size=40),
    seed=st.integers(0, 1000),
    refresh=st.sampled_from([-1.0, 1e9]),
)
@example(
    rules=numbered([Rule("a", "sender", "messages", 1, 60.0)]),
    steps=[
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("wait", 59.0),
        ("send", Message("A@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("wait", 1.0),
        ("send", Message("a@EXAMPLE.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
    ],
    seed=0,
    refresh=1e9,
)
@example(  # rows in the spool, a restart, and a store that comes back
    rules=numbered([Rule("a", "sender", "messages", 2, 600.0, on_error="defer")]),
    steps=[
        ("away",),
        ("send", Message("b@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("back",),
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("away",),
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("restart",),
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("late",),
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
        ("back",),
        ("send", Message("a@example.com", "c", "mention", ("x@example.org",), 1), "accepted", 0),
    ],
    seed=0,
    refresh=-1.0,
)
def test_a_message_passes_exactly_when_there_is_room(
    rules: tuple[Rule, ...], steps: list[tuple[object, ...]], seed: int, refresh: float
) -> None:
    async def run() -> None:
        relay = Relay(World(random.Random(seed)), rules)
        for step in steps:
            await play(relay, step)
        await relay.limits.close()

    before = engine.REFRESH_S
    engine.REFRESH_S = refresh
    try:
        asyncio.run(run())
    finally:
        engine.REFRESH_S = before


@settings(deadline=None)
@given(
    maximum=st.integers(1, 12),
    there=st.integers(0, 12),
    parallel=st.integers(1, 30),
    fates=st.lists(FATES, min_size=30, max_size=30),
    seed=st.integers(0, 1000),
    shared=st.booleans(),
)
def test_of_many_at_once_as_many_pass_as_there_is_room_for(
    maximum: int, there: int, parallel: int, fates: list[str], seed: int, *, shared: bool
) -> None:
    async def run() -> None:
        world = World(random.Random(seed))
        rule = Rule("a", "sender", "messages", maximum, 60.0)
        message = Message("a@example.com", "c", "mention", ("x@example.org",), 1)
        for _ in range(min(there, maximum)):
            world.keep(Sent(uuid7(), world.now, message))
        limits = Limits(world, world, clock=lambda: world.now, spooling=lambda: False)
        limits.use([rule])
        limits.share(shared)
        passed: list[Claim] = []

        async def one(number: int) -> None:
            task_id = uuid7()
            claim = Claim(limits, task_id, message.sender, message.client, 0)
            told: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
            for _ in range(world.rng.randrange(4)):
                await asyncio.sleep(0)
            claim.at_mail(told.set_result)
            if await told is None:
                passed.append(claim)
                await asyncio.gather(*(asyncio.sleep(0) for _ in range(world.rng.randrange(4))))
                if fates[number] in ("accepted", "doubt"):
                    world.keep(Sent(task_id, world.now, message))
                    claim.end(sent=True)

        await asyncio.gather(*(one(number) for number in range(parallel)))
        # Nothing was given back meanwhile, so exactly those passed for whom there was room.
        assert len(passed) == min(parallel, maximum - min(there, maximum))
        assert limits.tally(rule, "a@example.com").used(world.now) == min(there, maximum) + len(passed)
        await limits.close()

    asyncio.run(run())


@pytest.mark.parametrize("ends", ["the store is back", "the window is over"])
async def test_more_counts_than_are_kept_while_rows_wait(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """None of them can be forgotten, and to find that out for each message would take longer and longer."""
    monkeypatch.setattr(engine, "MAX_TALLIES", 20)
    looks: list[int] = []
    forget_some = Limits._forget_some

    def noted(limits: Limits) -> None:
        looks.append(len(limits._tallies))
        forget_some(limits)

    monkeypatch.setattr(Limits, "_forget_some", noted)
    world = World(random.Random(0), spooling=True)
    rule = Rule("a", "recipient", "messages", 9, 60.0)
    recipients = tuple(f"{number}@example.org" for number in range(1000))
    limits = Limits(world, world, clock=lambda: world.now, spooling=lambda: world.spooling)
    limits.use([rule])
    limits.adopt([entry(Sent(uuid7(), world.now, Message("a@x", "c", "t", recipients, 1)))])
    assert len(limits._tallies) == 1000
    assert len(looks) < 60

    if ends == "the store is back":
        world.back()
    else:
        world.now += rule.window
    for number in range(2000):
        limits.tally(rule, f"new{number}@example.org")
    assert len(limits._tallies) < 200
    await limits.close()
