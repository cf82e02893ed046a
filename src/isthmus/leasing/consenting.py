"""What policy lets be harvested of the jobs that lend: less slack than the job has, and leases asked to leave
when the rules have become stricter (a time window, a signal, another job of the same user).

Invariant: without rules on jobs a job's own consent is enough, and nothing is computed.
Not here: the rules (`policy.harvesting`), and measuring slack (`isthmus.node`).
"""

from isthmus.core.clock import Clock
from isthmus.core.model import LeaseState, Node
from isthmus.leasing.books import Books, Held
from isthmus.leasing.inventory import Inventory
from isthmus.node.slack import Slack
from isthmus.policy import PolicySet
from isthmus.policy.harvesting import Consent, Job, Moment, consent
from isthmus.policy.snapshot import Holding

Harvested = dict[tuple[str, str], Holding]


class Consenting:
    def __init__(self, policies: PolicySet, books: Books, inventory: Inventory, clock: Clock) -> None:
        self._policies = policies
        self._books = books
        self._inventory = inventory
        self._clock = clock

    def harvested(self, besides: Node) -> Harvested:
        """What is harvested now on all lent nodes but one, by job, user and partition.

        What was asked to leave does not count: of two nodes beyond a limit that they share, one keeps its
        leases.
        """
        sums: Harvested = {}
        if not self._policies.on_jobs:
            return sums
        for held in self._books.open.values():
            lease = held.lease
            node = self._inventory.lent(lease.node)
            if node is None or node.node == besides.node or lease.state is LeaseState.DRAINING:
                continue
            for kind in ("job", "user", "partition"):
                key = kind, node.labels[kind]
                before = sums.get(key, Holding())
                sums[key] = Holding(
                    cores=before.cores + lease.resources.cores,
                    memory_bytes=before.memory_bytes + lease.resources.memory_bytes,
                    leases=before.leases + 1,
                )
        return sums

    def allowed(self, node: Node, slack: Slack, harvested: Harvested) -> Slack:
        """What of the slack of a lent node may be harvested."""
        if not self._policies.on_jobs:
            return slack
        idle = Holding(cores=max(slack.cores, 0), memory_bytes=max(slack.memory_bytes, 0))
        amount = self._consent(node, idle, harvested).amount
        return Slack(min(slack.cores, amount.cores), min(slack.memory_bytes, amount.memory_bytes))

    def to_leave(self, node: Node, harvested: Harvested) -> list[Held]:
        """The youngest leases on a lent node beyond what rules would let be harvested even of an idle job."""
        if not self._policies.on_jobs:
            return []
        everything = Holding(cores=node.cores, memory_bytes=node.memory_bytes)
        most = self._consent(node, everything, harvested).amount
        held = [held for held in self._books.on_node(node.node) if held.lease.state is not LeaseState.ENDED]
        cores = sum(one.lease.resources.cores for one in held)
        memory_bytes = sum(one.lease.resources.memory_bytes for one in held)
        leaving: list[Held] = []
        for one in sorted(held, key=lambda one: -one.lease.created_s):
            if cores <= most.cores and memory_bytes <= most.memory_bytes:
                break
            cores -= one.lease.resources.cores
            memory_bytes -= one.lease.resources.memory_bytes
            if one.lease.state is LeaseState.ACTIVE:
                leaving.append(one)
        return leaving

    def _consent(self, node: Node, slack: Holding, harvested: Harvested) -> Consent:
        now = Moment(clock_s=self._clock.now(), signals=self._books.signals)
        return consent(self._policies, _job(node), slack, harvested, now)


def _job(node: Node) -> Job:
    """The batch job of a lent node."""
    labels = node.labels
    return Job(
        id=labels["job"],
        name=labels["name"],
        user=labels["user"],
        account=labels["account"],
        partition=labels["partition"],
        qos=labels["qos"],
        cores=node.cores,
        memory_bytes=node.memory_bytes,
    )
