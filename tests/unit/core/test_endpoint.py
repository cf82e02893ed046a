"""An address and a key are checked where they are read, and no message shows the key."""

import pytest

import isthmus
from isthmus.core.discovery import Endpoint
from isthmus.core.errors import AuthError, SettingsError

KEY = "isk_0123456789abcdef"


@pytest.mark.parametrize("more", ["\n", "\r\nx-other: 1", "é", " ", "\0", "\x7f", "\n" + KEY])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(more: str) -> None:
    with pytest.raises(AuthError) as caught:
        isthmus.connect("http://127.0.0.1:9", api_key=KEY + more)
    assert "character 21 of" in str(caught.value)
    assert KEY not in str(caught.value)


def test_an_endpoint_does_not_show_its_key() -> None:
    assert KEY not in repr(Endpoint("http://127.0.0.1:9", KEY))


@pytest.mark.parametrize(
    "url", ["foo", "127.0.0.1:80", "ftp://host", "http://", "http://h:port", "http://[::1"]
)
def test_what_is_no_url_is_refused_before_anything_is_asked_there(url: str) -> None:
    with pytest.raises(SettingsError, match="no URL of a site; write it like"):
        isthmus.connect(url, api_key=KEY)
