"""The site's metrics: every name in one place, in a registry of our own.

Counters are incremented where things happen; gauges that describe the present are set when /metrics is read.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REGISTRY = CollectorRegistry()

REQUESTS = Counter(
    "isthmus_http_requests",
    "REST requests by operation and status.",
    ("operation", "status"),
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "isthmus_http_request_seconds",
    "Time to answer a REST request, waiting for capacity included.",
    ("operation",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30),
    registry=REGISTRY,
)
STRANGERS = Counter(
    "isthmus_strangers", "Connections closed because their bytes were not ours.", ("port",), registry=REGISTRY
)
CALLS_ENDED = Counter(
    "isthmus_durable_calls_ended", "Durable calls by final state.", ("state",), registry=REGISTRY
)
CALL_ATTEMPTS = Counter("isthmus_durable_call_attempts", "Starts of durable calls.", registry=REGISTRY)
NODES = Gauge("isthmus_nodes", "Nodes by the state of their agent.", ("agent",), registry=REGISTRY)
CORES = Gauge("isthmus_cores", "Cores that may be leased.", registry=REGISTRY)
CORES_LEASED = Gauge("isthmus_cores_leased", "Cores under leases now.", registry=REGISTRY)
LEASES = Gauge("isthmus_leases", "Leases that have not ended, by state.", ("state",), registry=REGISTRY)


def render() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(REGISTRY)
