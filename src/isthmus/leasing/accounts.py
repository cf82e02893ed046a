"""What tenants were billed: by the hour, as the ledger keeps it, and lately, as fair share weighs it.

A lease's bill grows with each measurement of its agent; what it grew by is entered here: at once in memory,
with the next flush in the ledger. A crash forgets at most that much.

Invariant: after a restart the hours in the ledger give the same picture, to the hour.
Not here: what follows from it (`policy.fairness`, `policy.limits`).
"""

from collections.abc import Iterable

from isthmus.core import kinds
from isthmus.core.ids import TenantId
from isthmus.core.model import WINDOW_H_MAX, Lease
from isthmus.leasing.ledger import HourUse
from isthmus.policy import fairness
from isthmus.policy.snapshot import Used

HOUR_S = 3600.0


class Accounts:
    """`lately` is lent to snapshots. Times are seconds since the epoch; `hours` come oldest first."""

    def __init__(self, half_life_s: float, hours: Iterable[HourUse]) -> None:
        self._half_life_s = half_life_s
        self._core_s: dict[TenantId, dict[int, float]] = {}
        self._unwritten: dict[tuple[TenantId, int], HourUse] = {}
        self.lately: dict[TenantId, Used] = {}
        for row in hours:
            self._enter(row, (row.hour + 1) * HOUR_S)

    def bill(self, before: Lease, after: Lease, at_s: float) -> None:
        """Enter what a lease's bill grew by."""
        core_s = after.usage.allocated_core_s - before.usage.allocated_core_s
        if core_s <= 0:
            return
        held_s = core_s / after.resources.cores
        row = HourUse(
            tenant=after.tenant,
            hour=int(at_s // HOUR_S),
            core_s=core_s,
            memory_byte_s=held_s * after.resources.memory_bytes,
            gpu_s=held_s * after.resources.gpus,
            amount_s={kind: held_s * amount for kind, amount in after.resources.amounts.items()},
        )
        self._enter(row, at_s)
        key = row.tenant, row.hour
        self._unwritten[key] = _sum(self._unwritten[key], row) if key in self._unwritten else row

    def spent_core_h(self, tenant: TenantId, window_h: int, now_s: float) -> float:
        """Core-hours within the last `window_h` hours, to the hour."""
        first = int(now_s // HOUR_S) - window_h
        hours = self._core_s.get(tenant, {})
        return sum(core_s for hour, core_s in hours.items() if hour > first) / HOUR_S

    def unwritten(self) -> tuple[HourUse, ...]:
        return tuple(self._unwritten.values())

    def written(self) -> None:
        """What `unwritten` told is in the ledger now."""
        self._unwritten.clear()

    def _enter(self, row: HourUse, at_s: float) -> None:
        more = Used(
            core_s=row.core_s, memory_byte_s=row.memory_byte_s, gpu_s=row.gpu_s, amount_s=row.amount_s,
            at_s=at_s,
        )  # fmt: skip
        self.lately[row.tenant] = fairness.spend(self.lately.get(row.tenant, Used()), more, self._half_life_s)
        hours = self._core_s.setdefault(row.tenant, {})
        if row.hour not in hours:
            for past in [hour for hour in hours if hour <= row.hour - WINDOW_H_MAX]:
                del hours[past]
        hours[row.hour] = hours.get(row.hour, 0.0) + row.core_s


def _sum(one: HourUse, other: HourUse) -> HourUse:
    return HourUse(
        tenant=one.tenant,
        hour=one.hour,
        core_s=one.core_s + other.core_s,
        memory_byte_s=one.memory_byte_s + other.memory_byte_s,
        gpu_s=one.gpu_s + other.gpu_s,
        amount_s=kinds.sums(one.amount_s, other.amount_s),
    )
