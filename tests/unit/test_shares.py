from __future__ import annotations

from relay.upstream.shares import Shares, Waiter


def waiter(shares: Shares, client: str, *, fresh: bool = False) -> Waiter:
    made = Waiter(client, None, shares.arrival(), fresh=fresh)
    shares.wait(made)
    return made


def turns(shares: Shares) -> list[str]:
    """Serve everybody; return the clients in the order in which it was their turn."""
    order = []
    while (turn := shares.next(lambda _: True)) is not None:
        shares.remove(turn)
        shares.lend(turn.client)
        order.append(turn.client)
    return order


async def test_who_holds_least_is_next_and_among_equals_who_came_first() -> None:
    shares = Shares()
    for client in "aaabacb":
        waiter(shares, client)
    shares.lend("b")
    assert turns(shares) == ["a", "c", "a", "b", "a", "b", "a"]


async def test_within_one_client_it_is_first_come_first_served() -> None:
    shares = Shares()
    waiting = [waiter(shares, "a") for _ in range(4)]
    shares.remove(waiting[1])
    waiting[2].granted.cancel()
    assert shares.next(lambda _: True) is waiting[0]
    shares.remove(waiting[0])
    assert shares.next(lambda _: True) is waiting[3]


async def test_who_waits_again_has_its_place_as_before() -> None:
    shares = Shares()
    early = [Waiter("a", None, shares.arrival(), fresh=False) for _ in range(2)]
    late = [waiter(shares, client) for client in "ab"]
    for each in reversed(early):
        shares.wait(each)
    assert shares.waiting == 4
    for expected in (early[0], early[1], late[0], late[1]):
        assert shares.next(lambda _: True) is expected
        shares.remove(expected)


async def test_who_cannot_use_it_keeps_the_place() -> None:
    shares = Shares()
    first = waiter(shares, "a", fresh=True)
    second = waiter(shares, "a")
    assert shares.next(lambda each: not each.fresh) is second
    shares.remove(second)
    assert shares.next(lambda each: not each.fresh) is None
    assert shares.next(lambda _: True) is first


async def test_nobody_is_over_the_share_while_nobody_else_waits() -> None:
    shares = Shares()
    for _ in range(4):
        shares.lend("a")
    waiter(shares, "a")
    assert not shares.over("a", 4)
    waiter(shares, "b")
    assert shares.over("a", 4)
    shares.give_back("a")
    assert shares.over("a", 4), "3 of 4, and two clients"
    shares.give_back("a")
    assert not shares.over("a", 4), "2 of 4 are its share"
    assert not shares.over("b", 4)


async def test_the_share_is_rounded_up_and_at_least_one() -> None:
    shares = Shares()
    shares.lend("a")
    shares.lend("a")
    for client in "bcde":
        waiter(shares, client)
    assert shares.over("a", 2)
    shares.give_back("a")
    assert not shares.over("a", 2)
    shares = Shares()
    for client in "aab":
        shares.lend(client)
    waiter(shares, "b")
    assert not shares.over("a", 3), "3 by 2, rounded up, are 2"


async def test_nothing_is_kept_of_who_has_gone() -> None:
    shares = Shares()
    shares.lend("a")
    gone = waiter(shares, "b")
    assert repr(shares) == "<Shares: 1 leases, 1 waiting>"
    shares.give_back("a")
    shares.remove(gone)
    shares.remove(gone)
    assert repr(shares) == "<Shares: 0 leases, 0 waiting>"
    assert (shares._leases, shares._waiters) == ({}, {})
