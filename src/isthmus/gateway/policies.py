"""REST: the rules that decide on leases, what a request would get now, and what other rules would have
changed.
"""

from isthmus.core.api import LeaseRequest
from isthmus.core.model import Record
from isthmus.gateway.operations import OPERATORS, Asked, Operation
from isthmus.leasing import Explanation, Leasing
from isthmus.policy import Replay, load_policies
from isthmus.policy.rules import Rule

SENT_POLICY = "the policy you sent"


class RuleSummary(Record, frozen=True):
    name: str
    then: str
    when: str
    message: str
    priority: int
    line: int


class PolicyReply(Record, frozen=True):
    """GET /v1/policy. `rules` in the order in which they are tried; `text` is the file as it was loaded."""

    source: str
    text: str
    rules: tuple[RuleSummary, ...]


class DryRunRequest(Record, frozen=True):
    """POST /v1/policy/dry-run. `policy`: TOML to decide by; None: the site's own rules."""

    lease: LeaseRequest = LeaseRequest()
    policy: str | None = None


class ReplayRequest(Record, frozen=True):
    """POST /v1/policy/replay. `policy`: TOML to decide the logged requests by."""

    policy: str


class Policies:
    def __init__(self, leasing: Leasing) -> None:
        self._leasing = leasing

    def operations(self) -> list[Operation]:
        return [
            Operation("GET", "/v1/policy", "The rules that decide on leases", self.show, PolicyReply),
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
        return PolicyReply(source=policies.source, text=policies.text, rules=rules)

    async def dry_run(self, asked: Asked) -> Explanation:
        sent = asked.body.policy
        policies = None if sent is None else load_policies(sent, SENT_POLICY)
        return self._leasing.dry_run(asked.principal, asked.body.lease, policies)

    async def replay(self, asked: Asked) -> Replay:
        return self._leasing.replay(load_policies(asked.body.policy, SENT_POLICY))


def _summary(rule: Rule) -> RuleSummary:
    spec = rule.spec
    then = type(spec).__struct_config__.tag
    return RuleSummary(
        name=spec.name,
        then=str(then),
        when=spec.when,
        message=spec.message,
        priority=spec.priority,
        line=rule.line,
    )
