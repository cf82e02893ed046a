"""What a decision looks at: nodes with their free resources, what tenants and pools hold, the time.

Invariant: values only; a snapshot turned into its record and back decides the same. Nodes are kept in columns
(`NodeTable`), so that ten thousand of them are filtered by a handful of array operations; `leasing` keeps one
table up to date and lends it to each snapshot.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from isthmus.core.api import LeaseRequest
from isthmus.core.ids import LeaseId, NodeId, RequestId, TenantId
from isthmus.core.kinds import Stock
from isthmus.core.model import LENT_PLATFORM, POOL_PLATFORM, Node, Quota, Record, Resources
from isthmus.policy.shelves import IntArray, Shelves


class Demand(Record, frozen=True):
    """What is asked, and by whom."""

    request: RequestId
    tenant: TenantId
    lease: LeaseRequest
    role: str = "user"
    quota: Quota = Quota()


class Holding(Record, frozen=True):
    """What a tenant (or a pool) holds now, over all nodes."""

    cores: int = 0
    memory_bytes: int = 0
    gpus: int = 0
    leases: int = 0
    amounts: dict[str, int] = msgspec.field(default_factory=dict)  # of further kinds


class Pool(Record, frozen=True):
    minimum: int = 0
    maximum: int = 1024
    held: Holding = Holding()

    @property
    def leases(self) -> int:
        return self.held.leases


class Used(Record, frozen=True):
    """What a tenant was billed until `at_s`, older use counting less (`fairness.py`)."""

    core_s: float = 0.0
    memory_byte_s: float = 0.0
    gpu_s: float = 0.0
    at_s: float = 0.0
    amount_s: dict[str, float] = msgspec.field(default_factory=dict)  # of further kinds


class Preemptible(Record, frozen=True):
    """An elastic lease that another may push out: a reserved one any, an elastic one only an `idle` one
    (no call for a while); `leaving` when that has already begun.
    """

    lease: LeaseId
    node: NodeId
    cores: int
    memory_bytes: int
    gpus: int
    created_s: float
    leaving: bool = False
    idle: bool = False
    tenant: TenantId = TenantId("")
    amounts: dict[str, int] = msgspec.field(default_factory=dict)


class NodeRow(Record, frozen=True):
    """One node in a record. `open`: its agent is connected and it is not being drained."""

    node: NodeId
    platform: str
    cores: int
    memory_bytes: int
    gpus: int
    free_cores: int
    free_memory_bytes: int
    free_gpus: int
    leases: int = 0
    open: bool = True
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    amounts: dict[str, int] = msgspec.field(default_factory=dict)
    free_amounts: dict[str, int] = msgspec.field(default_factory=dict)


class Shape(NamedTuple):
    """What many nodes have in common: everything about them that does not change while they run."""

    platform: str
    cores: int
    memory_bytes: int
    gpus: int
    labels: tuple[tuple[str, str], ...]
    amounts: tuple[tuple[str, int], ...] = ()


class NodeColumns(Record, frozen=True):
    """A node table as the decision log keeps it: compact, because a log of ten thousand nodes is long.

    numbers   (6, nodes) little-endian int64: index into `shapes`, free cores, free bytes of memory, free
              GPUs, leases, whether it is open (1) or not (0)
    free      (nodes,) of the same for each further kind that some node has
    """

    ids: tuple[NodeId, ...]
    shapes: tuple[Shape, ...]
    numbers: bytes
    free: dict[str, bytes] = msgspec.field(default_factory=dict)


class SnapshotRecord(Record, frozen=True):
    """A snapshot as the decision log keeps it."""

    nodes: NodeColumns
    tenants: dict[TenantId, Holding]
    pools: dict[str, Pool]
    clock_s: float
    preemptible: tuple[Preemptible, ...] = ()
    used: dict[TenantId, Used] = msgspec.field(default_factory=dict)
    waiting: tuple[TenantId, ...] = ()
    spent_core_h: dict[int, float] = msgspec.field(default_factory=dict)
    signals: dict[str, float] = msgspec.field(default_factory=dict)
    stocks: dict[str, Stock] = msgspec.field(default_factory=dict)


class NodeTable:
    """Nodes in columns; row `i` of every column is `ids[i]`. Mutated only by its owner, between decisions.

    free_of, all_of   (nodes,) for each further kind that some node has: what is free, and what is there
    """

    free_of: dict[str, IntArray]

    def __init__(self, rows: Iterable[NodeRow] = ()) -> None:
        rows = tuple(rows)
        shapes: dict[Shape, int] = {}
        shape = _column(shapes.setdefault(_shape(row), len(shapes)) for row in rows)
        free = [
            _column(row.free_cores for row in rows),
            _column(row.free_memory_bytes for row in rows),
            _column(row.free_gpus for row in rows),
        ]
        leases, is_open = _column(row.leases for row in rows), _column(row.open for row in rows)
        further = sorted({kind for known in shapes for kind, _ in known.amounts})
        self.free_of = {kind: _column(row.free_amounts.get(kind, 0) for row in rows) for kind in further}
        self._fill([row.node for row in rows], list(shapes), np.stack([shape, *free, leases, is_open]))

    @classmethod
    def of_columns(cls, columns: NodeColumns) -> "NodeTable":
        """The table of which `columns` was the record."""
        table = cls.__new__(cls)
        numbers = np.frombuffer(columns.numbers, dtype="<i8").reshape(6, len(columns.ids))
        table.free_of = {
            kind: np.frombuffer(free, dtype="<i8").astype(np.int64) for kind, free in columns.free.items()
        }
        table._fill(list(columns.ids), list(columns.shapes), numbers.astype(np.int64))
        return table

    def _fill(self, ids: list[NodeId], shapes: list[Shape], numbers: IntArray) -> None:
        """numbers: as in NodeColumns."""
        self.ids = ids
        self.index: dict[NodeId, int] = {node: i for i, node in enumerate(ids)}
        self.shapes = shapes
        self.shape: IntArray = numbers[0]
        self.free_cores: IntArray = numbers[1]
        self.free_memory_bytes: IntArray = numbers[2]
        self.free_gpus: IntArray = numbers[3]
        self.leases: IntArray = numbers[4]
        self.open: NDArray[np.bool_] = numbers[5].astype(np.bool_)
        self.cores = _column(shape.cores for shape in shapes)[self.shape]
        self.memory_bytes = _column(shape.memory_bytes for shape in shapes)[self.shape]
        self.gpus = _column(shape.gpus for shape in shapes)[self.shape]
        self.all_of: dict[str, IntArray] = {
            kind: _column(dict(shape.amounts).get(kind, 0) for shape in shapes)[self.shape]
            for kind in self.free_of
        }
        self.shape_cores = np.array([max(shape.cores, 1) for shape in shapes], dtype=np.float64)
        self.shape_has_gpus = np.array([shape.gpus > 0 for shape in shapes], dtype=np.bool_)
        self.shelves = Shelves(self.shape, self.free_cores)
        self.shape_is_pooled = np.array([shape.platform == POOL_PLATFORM for shape in shapes], dtype=np.bool_)
        self.pooled: NDArray[np.bool_] = self.shape_is_pooled[self.shape]
        is_lent = np.array([shape.platform == LENT_PLATFORM for shape in shapes], dtype=np.bool_)
        self.lent: NDArray[np.bool_] = is_lent[self.shape]
        own = ~self.lent & ~self.pooled
        self.total = Holding(  # lent and pooled nodes are parts of others
            cores=int(self.cores[own].sum()),
            memory_bytes=int(self.memory_bytes[own].sum()),
            gpus=int(self.gpus[own].sum()),
            amounts={kind: int(column[own].sum()) for kind, column in self.all_of.items()},
        )

    def take(self, node: NodeId, resources: Resources, sign: int = 1) -> None:
        """Book one lease on a node; sign=-1 gives it back. A node that left the platform is ignored."""
        i = self.index.get(node)
        if i is None:
            return
        self.free_cores[i] -= sign * resources.cores
        self.free_memory_bytes[i] -= sign * resources.memory_bytes
        self.free_gpus[i] -= sign * resources.gpus
        self.leases[i] += sign
        for kind, amount in resources.amounts.items():
            if kind in self.free_of:
                self.free_of[kind][i] -= sign * amount
        self.shelves.move(i, int(self.shape[i]), int(self.free_cores[i]))

    def free(self, node: NodeId, cores: int, memory_bytes: int) -> None:
        """So much more of a node is free, or less: what others use of it has changed."""
        i = self.index.get(node)
        if i is not None:
            self.free_cores[i] += cores
            self.free_memory_bytes[i] += memory_bytes
            self.shelves.move(i, int(self.shape[i]), int(self.free_cores[i]))

    def set_open(self, node: NodeId, is_open: bool) -> None:
        i = self.index.get(node)
        if i is not None:
            self.open[i] = is_open

    def columns(self) -> NodeColumns:
        changing = (
            self.shape,
            self.free_cores,
            self.free_memory_bytes,
            self.free_gpus,
            self.leases,
            self.open,
        )
        numbers = np.stack(changing).astype("<i8").tobytes()
        free = {kind: column.astype("<i8").tobytes() for kind, column in self.free_of.items()}
        return NodeColumns(ids=tuple(self.ids), shapes=tuple(self.shapes), numbers=numbers, free=free)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision may know.

    used          what tenants were billed lately
    waiting       tenants with a request in the queue
    spent_core_h  core-hours that the asking tenant was billed within the last N hours, by N
    signals       what the site's source of signals says now: carbon, price, ...
    stocks        what there is of site-wide kinds
    """

    nodes: NodeTable
    tenants: Mapping[TenantId, Holding]
    pools: Mapping[str, Pool]
    clock_s: float
    preemptible: tuple[Preemptible, ...] = ()
    used: Mapping[TenantId, Used] = msgspec.field(default_factory=dict)
    waiting: tuple[TenantId, ...] = ()
    spent_core_h: Mapping[int, float] = msgspec.field(default_factory=dict)
    signals: Mapping[str, float] = msgspec.field(default_factory=dict)
    stocks: Mapping[str, Stock] = msgspec.field(default_factory=dict)

    def held(self, kind: str) -> int:
        """How much of it tenants hold together."""
        return sum(holding.amounts.get(kind, 0) for holding in self.tenants.values())

    def record(self) -> SnapshotRecord:
        return SnapshotRecord(
            nodes=self.nodes.columns(),
            tenants=dict(self.tenants),
            pools=dict(self.pools),
            clock_s=self.clock_s,
            preemptible=self.preemptible,
            used=dict(self.used),
            waiting=self.waiting,
            spent_core_h=dict(self.spent_core_h),
            signals=dict(self.signals),
            stocks=dict(self.stocks),
        )


def from_record(record: SnapshotRecord) -> Snapshot:
    return Snapshot(
        nodes=NodeTable.of_columns(record.nodes),
        tenants=record.tenants,
        pools=record.pools,
        clock_s=record.clock_s,
        preemptible=record.preemptible,
        used=record.used,
        waiting=record.waiting,
        spent_core_h=record.spent_core_h,
        signals=record.signals,
        stocks=record.stocks,
    )


def empty_row(node: Node, is_open: bool) -> NodeRow:
    """A node with nothing leased yet; what others hold of it is not free."""
    return NodeRow(
        node=node.node,
        platform=node.platform,
        cores=node.cores,
        memory_bytes=node.memory_bytes,
        gpus=node.gpus,
        free_cores=node.cores - node.other_cores,
        free_memory_bytes=node.memory_bytes - node.other_memory_bytes,
        free_gpus=node.gpus - node.other_gpus,
        open=is_open,
        labels=node.labels,
        amounts=node.amounts,
        free_amounts=node.amounts,
    )


def _column(values: Iterable[int]) -> IntArray:
    return np.fromiter(values, dtype=np.int64)


def _shape(row: NodeRow) -> Shape:
    labels, amounts = tuple(sorted(row.labels.items())), tuple(sorted(row.amounts.items()))
    return Shape(row.platform, row.cores, row.memory_bytes, row.gpus, labels, amounts)
