"""Lease tokens: short-lived signed capabilities bound to tenant, lease and node.

A token is `base64url(claims) "." base64url(HMAC-SHA256(lease key, claims))`. The lease key is derived
from the site's key and the lease id, so an executor, which holds its own lease's key, can verify (and at
worst forge) tokens for that lease only. Not here: API keys (`isthmus.gateway`).
Source: RFC 2104 (HMAC); the derivation is HKDF-like with the lease id as info (RFC 5869).
"""

import base64
import binascii
import hashlib
import hmac

import msgspec

from isthmus.core.errors import TokenError
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.model import Record

TOKEN_BYTES_MAX = 2048
DOUBT_S = 3600.0  # nobody holds on to a token for so long: a clock is wrong


class Claims(Record, frozen=True):
    lease: LeaseId
    tenant: TenantId
    node: NodeId
    expires_s: float


def lease_key(site_key: bytes, lease: LeaseId) -> bytes:
    return hmac.digest(site_key, b"isthmus-lease-key-1:" + lease.encode(), hashlib.sha256)


def agent_key(join_key: bytes, holder: str) -> bytes:
    """What an agent proves to hold, so that none can speak for another: of an agent's name, or a pool's."""
    return hmac.digest(join_key, b"isthmus-agent-key-1:" + holder.encode(), hashlib.sha256)


def sign(claims: Claims, key: bytes) -> str:
    body = msgspec.msgpack.encode(claims)
    return f"{_to_text(body)}.{_to_text(hmac.digest(key, body, hashlib.sha256))}"


def verify(token: str, key: bytes, lease: LeaseId, now_s: float) -> Claims:
    """The claims of a token that this lease's key signed and that has not expired. Raises TokenError."""
    if len(token) > TOKEN_BYTES_MAX:
        raise TokenError(
            f"lease token is {len(token)} characters long, at most {TOKEN_BYTES_MAX} are accepted"
        )
    body_text, _, signature_text = token.partition(".")
    try:
        body, signature = _from_text(body_text), _from_text(signature_text)
    except (ValueError, binascii.Error) as error:
        raise TokenError("lease token is malformed; ask the site for a new lease") from error
    if not hmac.compare_digest(hmac.digest(key, body, hashlib.sha256), signature):
        raise TokenError(f"lease token was not signed for lease {lease}; ask the site for a new lease")
    try:
        claims = msgspec.msgpack.decode(body, type=Claims)
    except msgspec.MsgspecError as error:
        raise TokenError("lease token has unreadable claims; client and site differ in version") from error
    if claims.lease != lease:
        raise TokenError(f"lease token is for {claims.lease}, this executor belongs to {lease}")
    if claims.expires_s < now_s:
        late_s = now_s - claims.expires_s
        doubt = ", or set right the clocks of this node and the site's machine" if late_s > DOUBT_S else ""
        raise TokenError(f"lease token expired {late_s:.1f} s ago; renew the lease{doubt}")
    return claims


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_text(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
