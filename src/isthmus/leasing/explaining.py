"""Tell in words why a request or a lease came out as it did."""

from collections.abc import Callable, Sequence

import msgspec

from isthmus.core.ids import LeaseId, RequestId, TenantId
from isthmus.core.model import Lease, Record
from isthmus.policy import Decision, Logged, in_words


class Explanation(Record, frozen=True):
    """GET /v1/explain/{id}. `words`: line by line, for people; `decision`: the last one, for programs."""

    id: str
    request: RequestId
    tenant: TenantId
    outcome: str
    words: tuple[str, ...]
    decision: Decision


def explain_request(decisions: Sequence[Logged]) -> Explanation:
    """decisions: those of one request, newest first, at least one."""
    last = decisions[0]
    words: list[str] = []
    for number, logged in enumerate(reversed(decisions), 1):
        if len(decisions) > 1:
            words.append(f"Decision {number} of {len(decisions)}:")
        words += in_words(logged.demand, logged.decision)
    return Explanation(
        id=last.demand.request,
        request=last.demand.request,
        tenant=last.demand.tenant,
        outcome=last.decision.outcome,
        words=tuple(words),
        decision=last.decision,
    )


def explain_lease(
    lease: Lease, decisions: Sequence[Logged], transitions: Sequence[tuple[float, str, str, str]]
) -> Explanation:
    """The request's decisions, and what happened to the lease since. Raises IndexError without a decision."""
    explained = explain_request(decisions)
    words = [
        f"Lease {lease.lease} is {lease.state}{_ending(lease)}.",
        *explained.words,
        "What happened to it:",
    ]
    start_s = transitions[0][0] if transitions else 0.0
    for at_s, event, state, detail in transitions:
        words.append(f"  +{at_s - start_s:9.3f} s  {event} -> {state}{': ' * bool(detail)}{detail}")
    return Explanation(
        id=lease.lease,
        request=explained.request,
        tenant=lease.tenant,
        outcome=explained.outcome,
        words=tuple(words),
        decision=explained.decision,
    )


def without_others(logged: Logged, lease_of: Callable[[LeaseId], Lease | None]) -> Logged:
    """A decision as its own tenant may see it: not who else waits, nor whose leases were asked to leave."""
    tenant, decision = logged.demand.tenant, logged.decision
    evicted = [lease for lease in map(lease_of, decision.evict) if lease is not None]
    own = msgspec.structs.replace(
        decision,
        standings=tuple(one for one in decision.standings if one.tenant == tenant),
        evict=tuple(lease.lease for lease in evicted if lease.tenant == tenant),
    )
    return msgspec.structs.replace(logged, decision=own)


def _ending(lease: Lease) -> str:
    if lease.end_reason is None:
        return ""
    return f" ({lease.end_reason}{': ' * bool(lease.end_detail)}{lease.end_detail})"
