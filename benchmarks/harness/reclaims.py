"""How long an owner's wake-up takes to get its cores back: from spans of time in which something ran.

Two views of the same wake-up, each robust against what the other is not:

    reclaim_ms      cores taken back. Until harvested code runs for less than a twentieth of the owner's
                    cores in the WINDOW that follows. Counts only what harvested code did, so other programs
                    on the machine do not show. Valid where all cores are wanted.
    full_speed_ms   the owner's own view. From the moment at which a thread is to run until it runs for 95 %
                    of the WINDOW that follows. Whatever stops the thread counts, so it says something only
                    beside the same job alone.

The last instruction of harvested code (`linger_ms`) is not the reclaim: code at idle class gets a few
milliseconds in a second even from a core that is wanted, until it is frozen.
Invariant: pure; all times in ns of one clock, spans do not overlap within one thread.
"""

from collections.abc import Iterable, Sequence

WINDOW_NS = 20_000_000
SHARE = 0.05
Span = tuple[int, int]


def reclaim_ms(harvested: Sequence[Span], due: int, done: int, cores: int) -> float:
    """`done`: when the owner wants them no more; what it never got back counts until then."""
    candidates = sorted({due, *(until for since, until in harvested if due < until < done)})
    for start in candidates:
        end = min(start + WINDOW_NS, done)
        if ran_ns(harvested, start, end) <= SHARE * (end - start) * cores:
            return (start - due) / 1e6
    return (done - due) / 1e6


def linger_ms(harvested: Iterable[Span], due: int, done: int) -> float:
    """Until the last instruction of harvested code before the owner slept again."""
    late = [min(until, done) - due for since, until in harvested if since < done and until > due]
    return max(late, default=0) / 1e6


def resume_ms(harvested: Iterable[Span], done: int, due: int) -> float:
    """From the owner's falling asleep to the first instruction of harvested code, at most until it wakes."""
    early = [max(0, since - done) for since, until in harvested if until > done and since < due]
    return min(early, default=due - done) / 1e6


def full_speed_ms(gaps: Iterable[Span], due: int, woken: int, done: int) -> float:
    """gaps  when the thread did not run, after it woke up"""
    lost = [(due, woken), *gaps]
    for start in sorted({due, *(until for _, until in lost)}):
        end = min(start + WINDOW_NS, done)
        if ran_ns(lost, start, end) <= SHARE * (end - start):
            return (start - due) / 1e6
    return (done - due) / 1e6


def ran_ns(spans: Iterable[Span], begin: int, end: int) -> int:
    """Of all spans, what lies within."""
    return sum(max(0, min(until, end) - max(since, begin)) for since, until in spans)
