"""Turn an Authorization header into a Principal: an API key, or the token of a lease for code that runs under
it.
"""

import msgspec
import structlog

from isthmus.core.clock import Clock
from isthmus.core.errors import AuthError, NotFoundError, SiteUnavailableError
from isthmus.core.ids import LeaseId
from isthmus.core.model import LeaseState, Principal
from isthmus.core.tokens import lease_key, verify
from isthmus.gateway.keys import AuditRow, KeyStore
from isthmus.leasing import Leasing

_log = structlog.get_logger("gateway.guard")

_LEASE_PREFIX = "lease:"
_AUTHORIZATION_CHARACTERS_MAX = 4096


class SiteGuard:
    def __init__(self, keys: KeyStore, leasing: Leasing, site_key: bytes, clock: Clock) -> None:
        self._keys = keys
        self._leasing = leasing
        self._site_key = site_key
        self._clock = clock

    def identify(self, authorization: str) -> Principal:
        scheme, _, bearer = authorization.partition(" ")
        if scheme.lower() != "bearer" or not bearer or len(authorization) > _AUTHORIZATION_CHARACTERS_MAX:
            raise AuthError(
                "send `Authorization: Bearer KEY`; a local site keeps its key in its state directory"
            )
        if bearer.startswith(_LEASE_PREFIX):
            return self._identify_lease(bearer.removeprefix(_LEASE_PREFIX))
        return self._keys.authenticate(bearer)

    def note(self, principal: Principal, action: str, status: int, detail: str) -> None:
        row = AuditRow(
            at_s=self._clock.now(),
            tenant=principal.tenant,
            name=principal.name,
            role=principal.role,
            action=action,
            status=status,
            detail=detail,
        )
        try:
            self._keys.record(row)
        except SiteUnavailableError as error:  # what was done is done: at least the log has it
            _log.error("not audited", why=str(error), row=msgspec.to_builtins(row))

    def _identify_lease(self, bearer: str) -> Principal:
        """The lease's own code. Its tenant is the ledger's word, not the token's: executors hold the key that
        signs
        tokens of their lease and could write any tenant into one."""
        name, _, token = bearer.partition(":")
        lease_id = LeaseId(name)
        claims = verify(token, lease_key(self._site_key, lease_id), lease_id, self._clock.now())
        principal = Principal(tenant=claims.tenant, role="lease", name=f"lease {lease_id}", lease=lease_id)
        try:
            lease = self._leasing.lease(principal, lease_id)
        except NotFoundError as error:
            raise AuthError(f"no lease {lease_id} of this tenant") from error
        if lease.tenant != claims.tenant or lease.state is LeaseState.ENDED:
            raise AuthError(f"lease {lease_id} is over")
        return principal
