"""What leases used: from their pages, from their cgroups, from /proc. Reads only; the site does the
billing.
"""

import time
from collections.abc import Sequence

from isthmus.core.model import Usage
from isthmus.node.isolation import Isolation
from isthmus.node.messages import FunctionUse, LeaseReport
from isthmus.node.page import CPU, DRAINING, HELD, RUNNING, SPIN, Page, Row
from isthmus.node.records import LeaseRecord

REACH_S = 5.0  # what a slow client may take from the grant to its first call


def lease_usage(record: LeaseRecord, pages: Sequence[Page], isolation: Isolation) -> Usage:
    """Usage since the lease began, dead executors included."""
    rows = [row for page in pages for row in page.rows()]
    consumption = isolation.consumption(record.lease)
    dead_cpu_ns = sum(page[CPU] for page in pages) if isolation.mechanism == "none" else 0
    return Usage(
        allocated_core_s=record.resources.cores * (time.monotonic_ns() - record.started_ns) / 1e9,
        cpu_s=(consumption.cpu_ns + dead_cpu_ns) / 1e9,
        busy_s=sum(row.busy_ns for row in rows) / 1e9,
        spin_s=sum(page[SPIN] for page in pages) / 1e9,
        rss_bytes=consumption.rss_bytes,
        rss_bytes_max=consumption.rss_bytes_max,
        calls=sum(row.calls for row in rows),
        errors=sum(row.errors for row in rows),
    )


def report(record: LeaseRecord, pages: Sequence[Page], isolation: Isolation) -> LeaseReport:
    return LeaseReport(
        lease=record.lease,
        usage=lease_usage(record, pages, isolation),
        draining=any(page[DRAINING] for page in pages),  # read first: no call begins after it
        idle_s=idle_s(record, pages, time.monotonic_ns()),
        functions=lease_functions(pages),
    )


def lease_functions(pages: Sequence[Page]) -> tuple[FunctionUse, ...]:
    """Counts since the lease began, dead executors included."""
    rows = [row for page in pages for row in page.rows()]
    return function_uses(rows, time.time(), time.monotonic_ns())


def idle_s(record: LeaseRecord, pages: Sequence[Page], now_ns: int) -> float:
    """Since the last call ended, or since REACH_S after the lease began; 0 while one runs, or an actor or a
    stream lives.
    """
    if any(page[RUNNING] or page[HELD] for page in pages):
        return 0.0
    last_ns = max((row.last_call_ns for page in pages for row in page.rows()), default=0)
    return max(0.0, (now_ns - (last_ns or record.started_ns + int(REACH_S * 1e9))) / 1e9)


def function_uses(rows: Sequence[Row], now_s: float, now_ns: int) -> tuple[FunctionUse, ...]:
    """Rows of the same name added up; `last_s` on the wall clock, 0 if never called."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    uses = []
    for name, same in by_name.items():
        last_ns = max(row.last_call_ns for row in same)
        uses.append(
            FunctionUse(
                name=name,
                calls=sum(row.calls for row in same),
                errors=sum(row.errors for row in same),
                busy_s=sum(row.busy_ns for row in same) / 1e9,
                last_s=now_s - (now_ns - last_ns) / 1e9 if last_ns else 0.0,
            )
        )
    return tuple(uses)
