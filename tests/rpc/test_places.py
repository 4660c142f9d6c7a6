"""Where calls come from."""

import pytest

from server.places import place_of


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("192.0.2.1", "192.0.2.1/32"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("", ""),
        ("rubbish", ""),
    ],
)
def test_a_place_is_an_address_or_a_customer_s_network(address: str, place: str) -> None:
    assert place_of(address) == place
