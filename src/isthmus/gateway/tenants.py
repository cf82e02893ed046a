"""REST: API keys and tenants' quotas."""

from isthmus.core.api import KeySummary, NewKey
from isthmus.core.errors import NotFoundError, PermissionDeniedError
from isthmus.core.ids import KeyId, TenantId
from isthmus.core.model import Quota
from isthmus.gateway.keys import AuditRow, KeyStore
from isthmus.gateway.operations import ADMINS, Asked, Operation

_MIGHT = {"user": 0, "operator": 1, "admin": 2}


class Tenants:
    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def operations(self) -> list[Operation]:
        tenant = "/v1/tenants/{tenant}"
        return [
            Operation(
                "POST",
                "/v1/keys",
                "Make an API key; only this reply ever holds its secret",
                self.create,
                KeySummary,
                roles=ADMINS,
                body=NewKey,
                status=201,
            ),
            Operation(
                "GET",
                "/v1/keys",
                "Your tenant's API keys; an administrator sees all",
                self.show_all,
                list[KeySummary],
            ),
            Operation("DELETE", "/v1/keys/{key}", "Revoke an API key", self.revoke, KeySummary),
            Operation(
                "PUT",
                tenant,
                "Set what a tenant may hold at once",
                self.set_quota,
                Quota,
                roles=ADMINS,
                body=Quota,
            ),
            Operation("GET", tenant, "What a tenant may hold at once", self.quota, Quota),
            Operation(
                "GET",
                "/v1/audit",
                "The newest requests that changed something",
                self.audit,
                list[AuditRow],
                roles=ADMINS,
            ),
        ]

    async def create(self, asked: Asked) -> KeySummary:
        return self._keys.create(asked.body)

    async def show_all(self, asked: Asked) -> list[KeySummary]:
        principal = asked.principal
        return self._keys.summaries(None if principal.role == "admin" else principal.tenant)

    async def revoke(self, asked: Asked) -> KeySummary:
        """An administrator may revoke any key, others those of their own tenant that may do no more than
        theirs; foreign keys do not exist to them.
        """
        key_id, principal = KeyId(asked.path["key"]), asked.principal
        key = self._keys.find(key_id)
        if principal.role != "admin" and key.tenant != principal.tenant:
            raise NotFoundError(f"no key {key_id} of tenant {principal.tenant}")
        if _MIGHT[key.role] > _MIGHT[principal.role]:
            raise PermissionDeniedError(f"{key_id} has role {key.role}; you are {principal.role}")
        return self._keys.revoke(key_id)

    async def set_quota(self, asked: Asked) -> Quota:
        self._keys.set_quota(TenantId(asked.path["tenant"]), asked.body)
        return self._keys.quota(TenantId(asked.path["tenant"]))

    async def quota(self, asked: Asked) -> Quota:
        tenant, principal = TenantId(asked.path["tenant"]), asked.principal
        if principal.role == "user" and tenant != principal.tenant:
            raise PermissionDeniedError(
                f"you are of tenant {principal.tenant}; only operators see other tenants"
            )
        return self._keys.quota(tenant)

    async def audit(self, asked: Asked) -> list[AuditRow]:
        return self._keys.audit()
