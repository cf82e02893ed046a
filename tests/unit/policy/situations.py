"""Short ways to write down the situations that decisions are tested in."""

from isthmus.core.api import LeaseRequest
from isthmus.core.ids import LeaseId, NodeId, RequestId, TenantId
from isthmus.core.model import LeaseClass, Quota, Resources
from isthmus.policy import Demand, Snapshot
from isthmus.policy.snapshot import Holding, NodeRow, NodeTable, Pool, Preemptible

GIB = 2**30
THURSDAY_NOON_S = 12 * 3600.0  # 1970-01-01


def node(
    name: str, free: int = 4, cores: int = 4, gpus: int = 0, is_open: bool = True, **labels: str
) -> NodeRow:
    """A node with 64 GiB, all of it free; labels may also be given as `platform`."""
    return NodeRow(
        node=NodeId(name),
        platform=labels.pop("platform", "local"),
        cores=cores,
        memory_bytes=64 * GIB,
        gpus=gpus,
        free_cores=free,
        free_memory_bytes=64 * GIB,
        free_gpus=gpus,
        open=is_open,
        labels=labels,
    )


def snapshot(
    *rows: NodeRow,
    held: dict[str, Holding] | None = None,
    pools: dict[str, Pool] | None = None,
    preemptible: tuple[Preemptible, ...] = (),
    clock_s: float = THURSDAY_NOON_S,
) -> Snapshot:
    return Snapshot(
        nodes=NodeTable(rows),
        tenants={TenantId(name): holding for name, holding in (held or {}).items()},
        pools={"default": Pool()} if pools is None else pools,
        clock_s=clock_s,
        preemptible=preemptible,
    )


def demand(
    tenant: str = "alice",
    cores: int = 1,
    count: int = 1,
    together: bool = False,
    lease_class: LeaseClass = LeaseClass.ELASTIC,
    quota: Quota = Quota(),
    gpus: int = 0,
    pool: str = "default",
    **labels: str,
) -> Demand:
    lease = LeaseRequest(
        resources=Resources(cores=cores, gpus=gpus),
        count=count,
        together=together,
        lease_class=lease_class,
        pool=pool,
        labels=labels,
    )
    return Demand(request=RequestId("rq_1"), tenant=TenantId(tenant), lease=lease, quota=quota)


def elastic(
    lease: str, on: str, cores: int = 1, age: float = 0.0, leaving: bool = False, idle: bool = False
) -> Preemptible:
    return Preemptible(
        lease=LeaseId(lease),
        node=NodeId(on),
        cores=cores,
        memory_bytes=GIB,
        gpus=0,
        created_s=1000.0 - age,
        leaving=leaving,
        idle=idle,
    )
