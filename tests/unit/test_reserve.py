"""Nobody is promised what another has been promised; the state machine has the rest."""

from __future__ import annotations

import threading

from relay.records.reserve import Reserve


def test_promises_end_where_the_reserve_does() -> None:
    reserve = Reserve()
    assert not reserve.promise(1)
    reserve.became(10)

    assert reserve.promise(6)
    assert not reserve.promise(5)
    assert reserve.promise(4)
    reserve.release(6)
    assert (reserve.free, reserve.promised) == (10, 4)


def test_what_is_promised_stays() -> None:
    reserve = Reserve()
    reserve.became(10)
    assert reserve.promise(6)

    assert not reserve.may_become(5)
    assert reserve.free == 10
    assert reserve.may_become(6)
    assert not reserve.promise(1)


def test_two_threads() -> None:
    """One goes over to a smaller reserve and back, while the other promises all that there is."""
    reserve = Reserve()
    reserve.became(10)
    broken = []

    def change() -> None:
        for _ in range(20_000):
            if reserve.may_become(5):
                broken.append(reserve.promised > 5)
                reserve.became(10)

    thread = threading.Thread(target=change)
    thread.start()
    while thread.is_alive():
        if reserve.promise(8):
            reserve.release(8)
    thread.join()
    assert not any(broken)
    assert reserve.promised == 0
