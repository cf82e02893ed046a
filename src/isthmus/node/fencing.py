"""The executor's own watch: it ends itself when its lease is over, agent or no agent.

One daemon thread wakes once a second: it compares the page's deadline with the clock, publishes what the
meter cannot see from outside (spin time, threads), and renews the token that nested calls carry.
Limit: code that holds the interpreter's lock without end stops this thread too; then only the agent can end
it.
"""

import os
import signal
import threading
import time

from isthmus.core import tokens
from isthmus.fabric.channels import Domain
from isthmus.node.assignments import Assignment
from isthmus.node.page import CLIENTS, DEADLINE, ORPHAN, SPIN, THREADS, Page

WATCH_S = 1.0
SLACK_S = 1.0  # a living agent ends the lease first, and knows why
STOPPED_S = 2.0  # a sleep that is longer by so much was a suspension of the whole job
CATCH_UP_S = 5.0  # after one: for the renewals that wait to be read, or for a new line to the site
NESTED_TOKEN_S = 3600.0
_RENEW_S = NESTED_TOKEN_S / 2


def start(page: Page, domain: Domain, assignment: Assignment) -> None:
    thread = threading.Thread(
        target=_watch, args=(page, domain, assignment), name="isthmus-fence", daemon=True
    )
    thread.start()


def overdue_ns(page: Page, now_ns: int) -> int:
    """How far the lease is past its end, orphan grace included; negative while it lives."""
    grace_ns = page[ORPHAN] if page[CLIENTS] else 0
    return now_ns - page[DEADLINE] - grace_ns


def now_s(assignment: Assignment) -> float:
    """By the site's clock."""
    return time.time() + assignment.ahead_s


def nested_token(assignment: Assignment) -> str:
    """The capability of the lease's own code to ask its site for more executors of this lease."""
    claims = tokens.Claims(
        lease=assignment.lease,
        tenant=assignment.tenant,
        node=assignment.node,
        expires_s=now_s(assignment) + NESTED_TOKEN_S,
    )
    return tokens.sign(claims, assignment.lease_key)


def _watch(page: Page, domain: Domain, assignment: Assignment) -> None:
    renewed_s = time.monotonic()
    own_threads = threading.active_count()
    while True:
        left_s = SLACK_S - overdue_ns(page, time.monotonic_ns()) / 1e9
        if left_s <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        nap_s, began_s = min(WATCH_S, left_s), time.monotonic()
        time.sleep(nap_s)
        if time.monotonic() - began_s > nap_s + STOPPED_S:
            time.sleep(CATCH_UP_S)
        page[SPIN] = domain.spin_ns()
        page[THREADS] = max(0, threading.active_count() - own_threads)
        if time.monotonic() - renewed_s > _RENEW_S:
            renewed_s = time.monotonic()
            os.environ["ISTHMUS_LEASE_TOKEN"] = nested_token(assignment)
