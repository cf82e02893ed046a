"""The site in numbers: for `GET /v1/status` as a principal sees it, and for /metrics."""

from collections import Counter
from collections.abc import Iterable

from isthmus.core.api import SiteFile, SiteStatus
from isthmus.core.clock import Clock
from isthmus.core.ids import TenantId
from isthmus.core.model import (
    ISTHMUS_VERSION,
    LENT_PLATFORM,
    POOL_PLATFORM,
    Lease,
    LeaseState,
    Node,
    Principal,
)
from isthmus.gateway.operations import OPERATORS, Asked, Operation
from isthmus.leasing import Leasing
from isthmus.platforms import Platform
from isthmus.telemetry import metrics

METRICS_MEDIA = "text/plain; version=0.0.4; charset=utf-8"

_HOLDING = (LeaseState.GRANTED, LeaseState.STARTING, LeaseState.ACTIVE, LeaseState.DRAINING)
_EVERYTHING = Principal(tenant=TenantId("site"), role="admin", name="site")


class Overview:
    def __init__(self, leasing: Leasing, platform: Platform, site: SiteFile, clock: Clock) -> None:
        self._leasing = leasing
        self._platform = platform
        self._site = site
        self._clock = clock
        self._started_s = clock.monotonic()

    def operations(self) -> list[Operation]:
        return [
            Operation("GET", "/v1/status", "The site and who you are to it", self.status, SiteStatus),
            Operation(
                "GET",
                "/metrics",
                "Metrics in Prometheus' format",
                self.metrics,
                bytes,
                roles=OPERATORS,
                media=METRICS_MEDIA,
            ),
        ]

    async def status(self, asked: Asked) -> SiteStatus:
        leases, nodes = self._held(), self._leasing.nodes()
        return SiteStatus(
            url=self._site.url,
            version=ISTHMUS_VERSION,
            platform=self._platform.name,
            pid=self._site.pid,
            uptime_s=self._clock.monotonic() - self._started_s,
            nodes=sum(node.agent == "connected" for node in nodes),
            cores=_cores(nodes),
            cores_leased=sum(lease.resources.cores for lease in leases),
            leases_active=sum(lease.state is LeaseState.ACTIVE for lease in leases),
            requests_waiting=self._leasing.requests_waiting,
            tenant=asked.principal.tenant,
            role=asked.principal.role,
            pools=self._platform.pools(),
        )

    async def metrics(self, asked: Asked) -> bytes:
        leases, nodes = self._held(), self._leasing.nodes()
        for agent, count in Counter(node.agent for node in nodes).items():
            metrics.NODES.labels(agent).set(count)
        states = Counter(lease.state for lease in leases)
        for state in _HOLDING:
            metrics.LEASES.labels(state.value).set(states[state])
        metrics.CORES.set(_cores(nodes))
        metrics.CORES_LEASED.set(sum(lease.resources.cores for lease in leases))
        return metrics.render()

    def _held(self) -> list[Lease]:
        """All that hold resources now, whoever's."""
        return [lease for lease in self._leasing.leases(_EVERYTHING, False) if lease.state in _HOLDING]


def _cores(nodes: Iterable[Node]) -> int:
    """Of all machines; lent nodes and those of pools are parts of others."""
    return sum(node.cores for node in nodes if node.platform not in (LENT_PLATFORM, POOL_PLATFORM))
