"""A lease token opens its own lease, until it expires, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.errors import TokenError
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.tokens import TOKEN_BYTES_MAX, Claims, lease_key, sign, verify

LEASE, OTHER = LeaseId("ls_1"), LeaseId("ls_2")
KEY = lease_key(b"site", LEASE)
CLAIMS = Claims(lease=LEASE, tenant=TenantId("t"), node=NodeId("n"), expires_s=100.0)


def test_a_signed_token_gives_its_claims() -> None:
    assert verify(sign(CLAIMS, KEY), KEY, LEASE, 100.0) == CLAIMS


def test_a_token_that_expired_long_ago_makes_one_doubt_the_clocks() -> None:
    with pytest.raises(TokenError, match=r"the clocks of this node and the site's machine"):
        verify(sign(CLAIMS, KEY), KEY, LEASE, 100.0 + 86400.0)


def test_an_expired_token_says_by_how_much() -> None:
    with pytest.raises(TokenError, match=r"expired 1\.5 s ago"):
        verify(sign(CLAIMS, KEY), KEY, LEASE, 101.5)


def test_another_leases_token_is_refused() -> None:
    with pytest.raises(TokenError, match="not signed for lease ls_2"):
        verify(sign(CLAIMS, KEY), lease_key(b"site", OTHER), OTHER, 0.0)
    with pytest.raises(TokenError, match="is for ls_1"):
        verify(sign(CLAIMS, KEY), KEY, OTHER, 0.0)


def test_keys_differ_by_site_and_lease() -> None:
    assert len({KEY, lease_key(b"site", OTHER), lease_key(b"other site", LEASE)}) == 3


def test_an_overlong_token_is_not_even_decoded() -> None:
    with pytest.raises(TokenError, match="at most"):
        verify("a" * (TOKEN_BYTES_MAX + 1), KEY, LEASE, 0.0)


@given(place=st.integers(0, 200), character=st.characters())
def test_no_changed_character_goes_unnoticed(place: int, character: str) -> None:
    token = sign(CLAIMS, KEY)
    place %= len(token)
    changed = token[:place] + character + token[place + 1 :]
    if changed.rstrip("=") == token:
        return
    try:
        assert verify(changed, KEY, LEASE, 0.0) == CLAIMS
        # the last character of each half holds bits that base64 does not use
        assert place in (token.index(".") - 1, len(token) - 1)
    except TokenError:
        pass
