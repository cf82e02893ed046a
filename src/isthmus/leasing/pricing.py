"""What a lease costs: for all that it holds, from its grant to its end, at the prices that hold meanwhile.

Prices are applied to what a bill grew by, when it grew: another price changes nothing about the past.
Not here: what was used (`accounts.py`).
"""

from isthmus.core.model import Lease
from isthmus.core.settings import PriceSettings

HOUR_S = 3600.0
GIB = 2**30
GBIT = 10**9
_LICENSE = "licenses."


class Pricing:
    def __init__(self, settings: PriceSettings) -> None:
        self._settings = settings
        self._per_unit = {"cache": settings.cache_gib_h / GIB, "bandwidth": settings.bandwidth_gbit_h / GBIT}
        self._per_unit |= {_LICENSE + name: per_h for name, per_h in settings.licenses.items()}

    @property
    def currency(self) -> str:
        return self._settings.currency

    def per_hour(self, lease: Lease) -> float:
        """In the site's currency."""
        prices, held = self._settings, lease.resources
        amount = held.cores * prices.core_h + held.memory_bytes / GIB * prices.memory_gib_h
        amount += held.gpus * prices.gpu_h
        amount += sum(count * self._per_unit.get(kind, 0.0) for kind, count in held.amounts.items())
        return amount * prices.classes.get(lease.lease_class.value, 1.0)

    def of_growth(self, before: Lease, after: Lease) -> float:
        """What the time costs by which `after` has been held for longer than `before`."""
        core_s = after.usage.allocated_core_s - before.usage.allocated_core_s
        held_h = max(core_s, 0.0) / after.resources.cores / HOUR_S
        return held_h * self.per_hour(after)
