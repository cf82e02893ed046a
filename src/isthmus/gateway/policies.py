"""REST: the rules that decide on leases, what a request would get now, and what other rules would have
changed.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from isthmus.core.api import LeaseRequest
from isthmus.core.ids import TenantId
from isthmus.core.model import Principal, Quota, Record
from isthmus.gateway.operations import OPERATORS, Asked, Operation
from isthmus.leasing import Explanation, Leasing
from isthmus.policy import Replay, load_policies
from isthmus.policy.fairness import Standing
from isthmus.policy.rules import Rule
from isthmus.policy.snapshot import Holding

SENT_POLICY = "the policy you sent"
SENT_AGAINST = "the policy to compare with"


class RuleSummary(Record, frozen=True):
    name: str
    then: str
    when: str
    message: str
    priority: int
    line: int


class PolicyReply(Record, frozen=True):
    """GET /v1/policy. `rules` in the order in which they are tried; `text` is the file as it was loaded;
    `signals`: what they read as `signal` now; `outdated`: the file says something else by now.
    """

    source: str
    text: str
    rules: tuple[RuleSummary, ...]
    signals: dict[str, float] = msgspec.field(default_factory=dict)
    outdated: bool = False


class DryRunRequest(Record, frozen=True):
    """POST /v1/policy/dry-run.

    policy   TOML to decide by; None: the site's own rules
    tenant   on behalf of a user of this one, with its quota; empty: your own
    at_s     by the clock at this time, in seconds since the epoch; None: now
    """

    lease: LeaseRequest = LeaseRequest()
    policy: str | None = None
    tenant: str = ""
    at_s: float | None = None


class ReplayRequest(Record, frozen=True):
    """POST /v1/policy/replay.

    policy    TOML to decide the logged requests by
    against   TOML to compare it with; None: what was decided
    """

    policy: str
    against: str | None = None


class TenantShare(Record, frozen=True):
    """GET /v1/shares, one row per tenant. The guarantee is in cores; 0: none."""

    standing: Standing
    held: Holding
    priority: int
    guarantee_cores: int
    lends: bool


class Policies:
    """quota_of  gives a tenant's quota: a dry run may be on anybody's behalf
    tenants   gives those who have keys or quotas, and perhaps never held anything
    """

    def __init__(
        self,
        leasing: Leasing,
        quota_of: Callable[[TenantId], Quota],
        tenants: Callable[[], Collection[TenantId]] = frozenset,
    ) -> None:
        self._leasing = leasing
        self._quota_of = quota_of
        self._tenants = tenants

    def operations(self) -> list[Operation]:
        return [
            Operation("GET", "/v1/policy", "The rules that decide on leases", self.show, PolicyReply),
            Operation(
                "GET",
                "/v1/shares",
                "Where tenants stand by fair share, the next to be served first",
                self.shares,
                list[TenantShare],
            ),
            Operation(
                "POST",
                "/v1/policy/dry-run",
                "What a request would get now; nothing is leased",
                self.dry_run,
                Explanation,
                roles=OPERATORS,
                body=DryRunRequest,
            ),
            Operation(
                "POST",
                "/v1/policy/replay",
                "What other rules would have changed in logged decisions",
                self.replay,
                Replay,
                roles=OPERATORS,
                body=ReplayRequest,
            ),
        ]

    async def show(self, asked: Asked) -> PolicyReply:
        policies = self._leasing.policies
        rules = tuple(_summary(rule) for rule in policies.rules)
        return PolicyReply(
            source=policies.source,
            text=policies.text,
            rules=rules,
            signals=dict(self._leasing.signals),
            outdated=bool(policies.source) and _read(policies.source) != policies.text,
        )

    async def shares(self, asked: Asked) -> list[TenantShare]:
        standings = self._leasing.standings(asked.principal, self._tenants())
        return [self._share(standing, held) for standing, held in standings]

    def _share(self, standing: Standing, held: Holding) -> TenantShare:
        terms = self._leasing.policies.terms_of(standing.tenant)
        return TenantShare(
            standing=standing,
            held=held,
            priority=terms.priority,
            guarantee_cores=terms.guarantee.cores,
            lends=terms.lend,
        )

    async def dry_run(self, asked: Asked) -> Explanation:
        sent = asked.body.policy
        policies = None if sent is None else load_policies(sent, SENT_POLICY)
        principal = asked.principal
        if asked.body.tenant:
            tenant = TenantId(asked.body.tenant)
            principal = Principal(tenant=tenant, quota=self._quota_of(tenant))
        return self._leasing.dry_run(principal, asked.body.lease, policies, asked.body.at_s)

    async def replay(self, asked: Asked) -> Replay:
        sent = asked.body.against
        against = None if sent is None else load_policies(sent, SENT_AGAINST)
        return await self._leasing.replay(load_policies(asked.body.policy, SENT_POLICY), against)


def _read(source: str) -> str | None:
    """The rules' file as it is now; None when it cannot be read."""
    try:
        return Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _summary(rule: Rule) -> RuleSummary:
    spec = rule.spec
    return RuleSummary(
        name=spec.name,
        then=rule.action,
        when=spec.when,
        message=spec.message,
        priority=spec.priority,
        line=rule.line,
    )
