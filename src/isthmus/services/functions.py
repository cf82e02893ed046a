"""Functions seen: one row per name, from the counters that executors report through their leases."""

from typing import Protocol

from isthmus.core.api import FunctionSummary
from isthmus.core.model import Principal


class FunctionSource(Protocol):
    """The part of `Leasing` that this service reads."""

    def functions(self, principal: Principal) -> list[FunctionSummary]: ...


class Functions:
    def __init__(self, source: FunctionSource) -> None:
        self._source = source

    def seen(self, principal: Principal) -> list[FunctionSummary]:
        """The most recently called first."""
        return sorted(self._source.functions(principal), key=lambda row: (-row.last_s, row.name))
