"""All limits of a relay: their counts, what is asked of the store for them, and the decision.

Rules:
- A decision is one step of the event loop: what fits is held at once, in every count it is for, or in none.
  So of many at the edge of a limit exactly those pass for whom there is room.
- A count that is not known is asked for, once, however many wait for it; the decision comes after. From then
  on it is kept right by what this relay sends. While other relays use the store every decision waits for an
  answer to a question that was asked after it came.
- A known count is asked for again now and then, which holds up nobody.
- When the store cannot be asked, `on_error` of the limit decides, and for a while nobody waits for it.
- Counts are bounded: those longest not used are forgotten, but none in which something is held.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol
from uuid import UUID

from relay import maillog
from relay.limits.rule import Aliases, Event, Message, Rule, fold, in_words
from relay.limits.tally import Tally
from relay.records.errors import StoreError
from relay.records.model import Doubt, Record
from relay.reply import Reply

__all__ = ["Counts", "Limits", "LimitsMetrics", "Want"]

ASK_TIMEOUT_S = 2.0
"""How long the store is waited for."""
ASK_PAUSE_S = 1.0
"""After a failure, how long nobody asks."""
REFRESH_S = 60.0
"""Age at which a known count is asked for again, beside the decisions."""
MAX_TALLIES = 20_000
"""Counts that are kept."""
MAX_KEPT = 500_000
"""Events in all of them, looked at whenever the store has answered."""


class Counts(Protocol):
    """What can be asked of the store."""

    async def look_up(self, rule: Rule, key: str, since: float, own: Collection[UUID], /) -> list[Event]:
        """Return what was sent after `since` (Unix time) and counts, as far back as makes up the maximum.

        Those of `own` may be among it only with their task ids. Raises StoreError.
        """


class LimitsMetrics(Protocol):
    """What limits count."""

    def limit_hit(self, limit: str, action: str, /) -> None:
        """Count a message, or a recipient, for which there was no room."""


class Want(NamedTuple):
    """Room in one count: what to hold, and how much there must be room for (at least that)."""

    tally: Tally
    hold: int
    room: int


Decided = Callable[[Reply | None], None]
"""Is told the refusal, or None: it passes, and what it wants is held."""


@dataclass(slots=True)
class _Asking:
    """A question that is under way, and who waits."""

    for_this: list[Callable[[], None]] = field(default_factory=list)
    for_next: list[Callable[[], None]] = field(default_factory=list)
    """They came after it was asked, and want to know what others have sent until then."""


class Limits:
    """The limits of one relay; `use` says which.

    `clock` gives Unix time. `spooling` says whether rows of this relay wait to get into the store.
    """

    def __init__(
        self,
        counts: Counts,
        metrics: LimitsMetrics,
        *,
        clock: Callable[[], float],
        spooling: Callable[[], bool],
        aliases: Aliases = lambda _: (),
    ) -> None:
        self.rules: tuple[Rule, ...] = ()
        self.shared = False
        """Whether other relays use the store; `share` says so."""
        self.clock = clock
        self._counts = counts
        self._metrics = metrics
        self._spooling = spooling
        self._aliases = aliases
        self._loop = asyncio.get_running_loop()
        self._tallies: OrderedDict[tuple[Rule, str], Tally] = OrderedDict()
        self._asking: dict[Tally, _Asking] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept = 0
        self._most_tallies = self._most_kept = 0  # where there is little to forget, how many are let be
        self._failed_until = 0.0
        self._failure: str | None = None

    def use(self, rules: Sequence[Rule]) -> None:
        """Go on with other limits; one that counts what one before did goes on with its counts."""
        self.rules = tuple(rules)
        tallies, self._tallies = self._tallies, OrderedDict()
        for (rule, key), tally in tallies.items():
            if (heir := self._heir(rule)) is not None:
                tally.inherit(heir)
                self._tallies[heir, key] = tally

    def _heir(self, rule: Rule) -> Rule | None:
        """Return the limit that counts now what this one does or did: itself, if it is still in force."""
        if rule in self.rules:
            return rule
        return next((each for each in self.rules if each.counts_like(rule)), None)

    def share(self, shared: bool) -> None:
        """Hear whether other relays use the store: what is known may be older than what they have sent."""
        if shared is not self.shared:
            self.shared = shared
            for tally in self._tallies.values():
                tally.known = False

    @property
    def withhold_chunking(self) -> bool:
        """Whether a message must be seen as text, since a limit may refuse it for its header section."""
        return any(rule.needs_header and rule.action != "observe" for rule in self.rules)

    def tally(self, rule: Rule, key: str) -> Tally:
        """Return the count of a key; a message that began under other settings counts by those in force."""
        rule = self._heir(rule) or rule
        tallies, place = self._tallies, (rule, key)
        tally = tallies.get(place)
        if tally is None:
            tally = tallies[place] = Tally(rule, key)
            if rule.of_address:
                for alias in self._aliases(key):
                    self._take_over(tally, tallies.get((rule, fold(alias))))
            if len(tallies) > max(MAX_TALLIES, self._most_tallies):
                self._forget_some()
        else:
            tallies.move_to_end(place)
        return tally

    @staticmethod
    def _take_over(tally: Tally, other: Tally | None) -> None:
        """Count what was adopted under another name, which is how it was recorded."""
        if other is not None and other is not tally:
            for event in other.unsettled:
                tally.add(event, settled=False)

    def _forget_some(self) -> None:
        """Forget a tenth of the counts, those that were not used for longest, as far as they can be.

        That takes a look at all of them: where most cannot be, the next time is when there are a tenth more.
        """
        now, spooling, before = self.clock(), self._spooling(), len(self._tallies)
        for place, tally in list(islice(self._tallies.items(), before // 10 + 1)):
            if tally in self._asking:
                continue
            if not spooling:
                tally.settle()
            tally.used(now)  # what is older than the window goes
            if tally.idle:
                del self._tallies[place]
        self._kept = sum(map(len, self._tallies.values()))
        few = (before - len(self._tallies)) * 20 < before
        self._most_tallies, self._most_kept = (before * 11 // 10, self._kept * 11 // 10) if few else (0, 0)

    def adopt(self, entries: Iterable[Record | Doubt]) -> None:
        """Count what an earlier process of this relay has sent, and the store does not have yet."""
        for entry in entries:
            at = (entry.sent_at if isinstance(entry, Record) else entry.since).timestamp()
            message = Message(entry.sender, entry.client, entry.task_type, entry.recipients, entry.size)
            for rule in self.rules:
                for key, amount in rule.demand(message).items():
                    self.tally(rule, key).add(Event(at, amount, entry.task_id), settled=False)

    def sent(self, tally: Tally, task_id: UUID, at: float) -> None:
        """A message was sent, and its row is durable."""
        tally.sent(task_id, at, settled=tally not in self._asking and not self._spooling())

    # The decision

    def ask(self, task_id: UUID, wants: Sequence[Want], decided: Decided, observed: set[Tally]) -> None:
        """Hold what is wanted, all of it or, with a refusal, nothing; `decided` may be called at once.

        `observed` are the counts for which that has been said already of this message.
        """
        waiting = [want.tally for want in wants if self._must_ask(want.tally)]
        if not waiting:
            decided(self._decide(task_id, wants, observed))
            return
        left = len(waiting)

        def answered() -> None:
            nonlocal left
            left -= 1
            if not left:
                decided(self._decide(task_id, wants, observed))

        for tally in waiting:
            self._await(tally, answered)

    def _decide(self, task_id: UUID, wants: Sequence[Want], observed: set[Tally]) -> Reply | None:
        now = self.clock()
        struck: list[tuple[Want, float | None]] = []
        for want in wants:
            tally = want.tally
            if self._blind(tally) and tally.rule.on_error == "defer":
                struck.append((want, None))
            elif not tally.fits(task_id, want.room, now):
                self._hit(task_id, want, now, observed)
                if tally.rule.action != "observe":
                    struck.append((want, tally.wait(task_id, want.room, now)))
        if struck:
            return _refusal(struck)
        for want in wants:
            want.tally.hold(task_id, want.hold)
        return None

    def _hit(self, task_id: UUID, want: Want, now: float, observed: set[Tally]) -> None:
        tally, rule = want.tally, want.tally.rule
        if tally in observed:
            return
        if rule.action == "observe":
            observed.add(tally)
        self._metrics.limit_hit(rule.name, rule.action)
        maillog.limit_hit(
            task_id,
            limit=rule.name,
            action=rule.action,
            key=tally.key,
            used=tally.used(now),
            maximum=rule.maximum,
            unit=rule.unit,
            window_s=rule.window,
        )

    # What the store is asked

    def _blind(self, tally: Tally) -> bool:
        """Whether the store would have to be asked, and cannot be."""
        return self._failure is not None and (self.shared or not tally.known)

    def _must_ask(self, tally: Tally) -> bool:
        """Whether a decision has to wait for the store's answer."""
        now = self._loop.time()
        if self._failure is not None and now < self._failed_until:
            return False
        if self.shared or not tally.known:
            return True
        if now - tally.asked_at > REFRESH_S and tally not in self._asking:
            self._begin(tally, [])
        return False

    def _await(self, tally: Tally, answered: Callable[[], None]) -> None:
        asking = self._asking.get(tally)
        if asking is None:
            self._begin(tally, [answered])
        elif self.shared:
            asking.for_next.append(answered)
        else:
            asking.for_this.append(answered)

    def _begin(self, tally: Tally, waiting: list[Callable[[], None]]) -> None:
        if not self._spooling():
            tally.settle()
        self._asking[tally] = _Asking(waiting)
        task = self._loop.create_task(self._look_up(tally), name="limit look-up")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_up(self, tally: Tally) -> None:
        begun, rule = self._loop.time(), tally.rule
        since = self.clock() - rule.window
        too_short = False
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                rows = await self._counts.look_up(rule, tally.key, since, tally.own)
        except (StoreError, TimeoutError) as error:
            self._failed(str(error) or "the store did not answer in time")
        except Exception as error:
            maillog.unforeseen("limits", None, error)
            self._failed(f"unforeseen error: {error!r}")
        else:
            tally.replace(rows, begun)
            too_short = rule.maximum < tally.rule.maximum  # a reload has raised it meanwhile
            self._kept += len(rows)
            if self._kept > max(MAX_KEPT, self._most_kept):
                self._forget_some()
            if self._failure is not None:
                self._failure = None
                maillog.limits_counted_again()
        asking = self._asking.pop(tally)
        if too_short:
            self._begin(tally, asking.for_this + asking.for_next)
            return
        if asking.for_next:
            self._begin(tally, asking.for_next)
        for answered in asking.for_this:
            answered()

    def _failed(self, reason: str) -> None:
        if self._failure is None:
            maillog.limits_not_counted(reason)
        self._failure = reason
        self._failed_until = self._loop.time() + ASK_PAUSE_S

    async def close(self) -> None:
        """Ask nothing more."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _refusal(struck: Iterable[tuple[Want, float | None]]) -> Reply:
    """Return what the client hears: of several limits, one that refuses for good, else the longest wait."""
    want, wait = max(struck, key=_weight)
    rule = want.tally.rule
    name = f"Rate limit {rule.name} ({rule})"
    if wait is None:
        return Reply.own(451, "7.1", f"{name} cannot be counted now, try again later")
    if _alone(want):
        return Reply.own(550, "7.1", f"{name} is less than this message alone")
    if rule.action == "reject":
        return Reply.own(550, "7.1", f"{name} is reached")
    return Reply.own(451, "7.1", f"{name} is reached, try again in {in_words(wait)}")


def _weight(struck: tuple[Want, float | None]) -> tuple[bool, float]:
    want, wait = struck
    rule = want.tally.rule
    return wait is not None and (rule.action == "reject" or _alone(want)), wait or 0.0


def _alone(want: Want) -> bool:
    """Whether the message is too much, whatever else was sent; recipients can come in several messages."""
    return want.tally.rule.unit == "octets" and want.room > want.tally.rule.maximum
