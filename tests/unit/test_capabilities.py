"""What an upstream said that it can do, and what several can do together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.upstream.capabilities import Capabilities


def test_what_all_can_do_and_the_smallest_of_limits() -> None:
    common = Capabilities.common(
        [
            Capabilities.of({"DSN": "", "8BITMIME": "", "SIZE": "5000", "LIMITS": "RCPTMAX=70 MAILMAX=5"}),
            Capabilities.of({"dsn": "", "size": "1000", "limits": "rcptmax=50", "auth": "PLAIN LOGIN"}),
            Capabilities.of({"DSN": "", "SIZE": "", "AUTH": "PLAIN"}),
        ]
    )
    assert common.keywords == {"DSN", "SIZE"}
    assert common.size == 1000
    assert common.parameters == {"LIMITS": ("RCPTMAX=50", "MAILMAX=5")}
    assert common.mechanisms == frozenset()


def test_one_alone_is_itself() -> None:
    alone = Capabilities.of({"SIZE": "10"})
    assert Capabilities.common([alone]) is alone


def test_what_is_no_number_limits_nothing() -> None:
    one = Capabilities.of({"LIMITS": "RCPTMAX=many MAILMAX= RCPTDOMAINMAX=1234567 X=3"})
    assert Capabilities.common([one, one]).parameters == {"LIMITS": ("X=3",)}


offers = st.dictionaries(
    st.sampled_from(["DSN", "8BITMIME", "SIZE", "SMTPUTF8", "LIMITS"]),
    st.sampled_from(["", "100", "2000", "RCPTMAX=3", "RCPTMAX=7 RCPTDOMAINMAX=2"]),
)


@given(st.lists(offers, min_size=1, max_size=4))
def test_the_order_does_not_matter_and_nothing_is_made_up(several: list[dict[str, str]]) -> None:
    each = [Capabilities.of(extensions) for extensions in several]
    common, reverse = Capabilities.common(each), Capabilities.common(each[::-1])
    assert (common.keywords, common.size) == (reverse.keywords, reverse.size)
    assert all(common.keywords <= one.keywords for one in each)
    assert common.size in {None, *(one.size for one in each)}


def test_equal_offers_are_one_key() -> None:
    """EHLO replies are kept by what they are made for."""
    one, same = Capabilities.of({"SIZE": "10", "DSN": ""}), Capabilities.of({"DSN": "", "SIZE": "10"})
    assert one == same
    assert len({one, same}) == 1
    assert one != Capabilities.of({"SIZE": "10", "DSN": "x"})
