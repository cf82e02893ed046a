"""Policies as data: named rules, typed and compiled, and the terms of tenants. `loading.py` reads them.

    [[rule]]
    name = "no-gpus-for-guests"
    when = 'tenant.name == "guest" && request.gpus > 0'    # CEL; omitted: always
    then = "deny"                                          # what it does, see below
    message = "guests get no GPUs"                         # shown to whoever is refused
    priority = 10                                          # higher first; equal: in order of the file

What each action does, and its parameters:

    allow    the first matching `allow` or `deny` settles a request (on a node, if it mentions `node`);
             nothing matching means allowed. preempt = true lets a reserved request push elastic leases out.
    deny     the request (or the node) is refused with the message.
    prefer   adds `weight` (-100..100, default 1) to the score of each node it matches; all that match count.
    cap      limits what may be held at once: cores, memory, gpus, leases, bandwidth, cache, licenses =
             { matlab = 2 }; per = "tenant" (default), "pool" or "site"; or the core_hours that a tenant may
             use within any window_h hours. All that match count, so the tightest wins. May not mention
             `node`.
    class    the lease gets class = "reserved" | "elastic" | "harvested"; the first that matches wins.
             May not mention `node`.
    hurry    adds `by` (default 1) to the priority that the tenant's terms give the request: who has more
             is served before who has less. All that match count. May not mention `node`.
    harvest  what a batch job lends and does not use is harvested: `share` of it (default all), at most
             cores, memory, gpus per = "job" (default), "user" or "partition". All that match count. Sees
             `job`, `clock` and `signal` only.
    protect  nothing of the batch job is harvested, whatever else matches. Sees what `harvest` sees.

A condition that fails when it is evaluated (most often a label that is not there: guard it with `has()`)
counts as not matching, except in `deny` and `protect`, where it counts as matching: a broken prohibition must
not open a door.

Invariant: pure. Not here: what rules lead to (`decide.py`, `harvesting.py`).
"""

from typing import Annotated, ClassVar, Literal

import cel
import msgspec
from msgspec import Meta

from isthmus.core import kinds
from isthmus.core.ids import TenantId
from isthmus.core.kinds import Licenses
from isthmus.core.model import WINDOW_H_MAX, LeaseClass
from isthmus.core.units import parse_bytes
from isthmus.policy.conditions import CONDITION_CHARACTERS_MAX, EVALUATION_ERRORS
from isthmus.policy.terms import Count, Fair, Priority, Terms

RULES_MAX = 1000

_OF_REQUESTS = frozenset({"request", "tenant", "pool", "clock", "signal"})
_OF_NODES = _OF_REQUESTS | {"node"}
_OF_JOBS = frozenset({"job", "clock", "signal"})


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="then"):
    name: Annotated[str, Meta(min_length=1, max_length=100)]
    when: Annotated[str, Meta(max_length=CONDITION_CHARACTERS_MAX)] = "true"
    message: str = ""
    priority: int = 0
    may_read: ClassVar[frozenset[str]] = _OF_NODES


class Allow(_Spec, frozen=True, tag="allow"):
    preempt: bool = False


class Deny(_Spec, frozen=True, tag="deny"):
    pass


class Prefer(_Spec, frozen=True, tag="prefer"):
    weight: Annotated[float, Meta(ge=-100, le=100)] = 1.0


class Cap(_Spec, frozen=True, tag="cap"):
    """0 (or an empty memory) means that this resource is not capped by the rule."""

    cores: Annotated[int, Meta(ge=0)] = 0
    memory: str = ""
    gpus: Annotated[int, Meta(ge=0)] = 0
    leases: Annotated[int, Meta(ge=0)] = 0
    core_hours: Annotated[float, Meta(ge=0)] = 0.0
    window_h: Annotated[int, Meta(ge=1, le=WINDOW_H_MAX)] = 24
    bandwidth: str | int = 0
    cache: str | int = 0
    licenses: Licenses = {}
    per: Literal["tenant", "pool", "site"] = "tenant"
    may_read: ClassVar[frozenset[str]] = _OF_REQUESTS

    def __post_init__(self) -> None:
        kinds.check(self.licenses, self.bandwidth, self.cache)
        capped = self.cores, self.memory, self.gpus, self.leases, self.core_hours
        if not any((*capped, self.bandwidth, self.cache, self.licenses)):
            raise ValueError(
                "a cap needs at least one of cores, memory, gpus, leases, bandwidth, cache, licenses, "
                "core_hours"
            )
        if self.core_hours and self.per != "tenant":
            raise ValueError(f'core_hours are counted per tenant, not per = "{self.per}"')
        parse_bytes(self.memory or 0)

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory or 0)

    @property
    def amounts(self) -> dict[str, int]:
        return kinds.amounts(self.licenses, self.bandwidth, self.cache)


class Reclass(_Spec, frozen=True, tag="class"):
    lease_class: LeaseClass = msgspec.field(name="class")
    may_read: ClassVar[frozenset[str]] = _OF_REQUESTS


class Hurry(_Spec, frozen=True, tag="hurry"):
    by: Priority = 1
    may_read: ClassVar[frozenset[str]] = _OF_REQUESTS


class Harvest(_Spec, frozen=True, tag="harvest"):
    """0 (or an empty memory): no limit but what the job does not use."""

    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    cores: Count = 0
    memory: str = ""
    gpus: Count = 0
    per: Literal["job", "user", "partition"] = "job"
    may_read: ClassVar[frozenset[str]] = _OF_JOBS

    def __post_init__(self) -> None:
        parse_bytes(self.memory or 0)

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory or 0)


class Protect(_Spec, frozen=True, tag="protect"):
    may_read: ClassVar[frozenset[str]] = _OF_JOBS


Spec = Allow | Deny | Prefer | Cap | Reclass | Hurry | Harvest | Protect


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled rule.

    reads        the fields its condition reads, by variable; of an open one, "" stands for all of them
    reads_node   it must be evaluated for a node, not once per request
    per_shape    ... but only for one node of each shape: it reads nothing that differs among them
    """

    spec: Spec
    program: cel.Program
    reads: dict[str, frozenset[str]]
    reads_node: bool
    per_shape: bool
    line: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def action(self) -> str:
        return str(type(self.spec).__struct_config__.tag)

    def matches(self, context: cel.Context) -> bool:
        """Whether the condition holds. Evaluation errors follow the module's rule: they match only a
        prohibition.
        """
        try:
            return self.program.execute(context) is True
        except EVALUATION_ERRORS:
            return isinstance(self.spec, Deny | Protect)


class PolicySet(msgspec.Struct, frozen=True, kw_only=True):
    """All rules, in the order in which they are evaluated, the terms of tenants, and the text they came from.

    on_requests, on_jobs   the rules by what they judge
    guaranteed             the terms of tenants that have a guarantee
    reads                  the fields that any condition on requests reads, by variable: only these are shown
    shape_reads            the same of rules that judge shapes of nodes
    remembered             what these rules said, by all that they read (`weighing.py`)
    """

    rules: tuple[Rule, ...] = ()
    on_requests: tuple[Rule, ...] = ()
    on_jobs: tuple[Rule, ...] = ()
    fair: Fair = Fair()
    terms: dict[TenantId, Terms] = msgspec.field(default_factory=dict)
    guaranteed: dict[TenantId, Terms] = msgspec.field(default_factory=dict)
    source: str = ""
    text: str = ""
    reads: dict[str, frozenset[str]] = msgspec.field(default_factory=dict)
    shape_reads: dict[str, frozenset[str]] = msgspec.field(default_factory=dict)
    remembered: dict[bytes, tuple[float, str]] = msgspec.field(default_factory=dict)

    @property
    def may_preempt(self) -> bool:
        """Whether a rule or a guarantee lets requests push elastic leases out."""
        may_allow = any(isinstance(rule.spec, Allow) and rule.spec.preempt for rule in self.on_requests)
        return may_allow or bool(self.guaranteed)

    @property
    def windows_h(self) -> frozenset[int]:
        """The windows over which some rule caps core-hours."""
        caps = [rule.spec for rule in self.on_requests if isinstance(rule.spec, Cap)]
        return frozenset(cap.window_h for cap in caps if cap.core_hours)

    def terms_of(self, tenant: TenantId) -> Terms:
        return self.terms.get(tenant, _USUAL)


_USUAL = Terms()
ALLOW_ALL = PolicySet()
