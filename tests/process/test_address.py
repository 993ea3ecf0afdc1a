"""HOST:PORT as people type it, and what counts as this machine alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import UserError
from fedtune.process.address import is_loopback, parse_address


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:9092", ("127.0.0.1", 9092)),
        ("localhost:1", ("localhost", 1)),
        ("fed.example.org:65535", ("fed.example.org", 65535)),
        ("[::1]:9092", ("::1", 9092)),
        ("[2001:db8::7]:443", ("2001:db8::7", 443)),
    ],
)
def test_addresses(text, found):
    assert parse_address(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":9092",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "host:1e3",
        "host:9 ",
        "::1:9092",
        "2001:db8::7:443",
        "http://host:80",
        "[]:80",
        "host:99999999999999999999",
    ],
)
def test_what_is_no_address_is_said_in_one_line(text):
    with pytest.raises(UserError, match=r"must be HOST:PORT") as e:
        parse_address(text)
    assert "\n" not in str(e.value)


@given(st.text())
def test_any_text_is_an_address_or_a_user_error(text):
    try:
        host, port = parse_address(text)
    except UserError:
        return
    assert host and 1 <= port <= 65535


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("::ffff:192.0.2.1", False),
        ("", False),
        ("127.1", False),
        ("2130706433", False),
    ],
)
def test_loopback(host, alone):
    assert is_loopback(host) is alone
