"""The slow side of the client: threads that ask for leases, renew them, give them back and ask why one died.

Invariants: nothing here is on the path of a call; a site that does not answer never disturbs open leases;
every holding that was taken is given back exactly once.
Not here: when to do any of this (`dispatch.py`).
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import ExecutorLostError, FabricError, IsthmusError
from isthmus.core.ids import LeaseId
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.frames import Hello
from isthmus.sdk.links import Link
from isthmus.sdk.supply import Holding, Supply
from isthmus.sdk.work import Call, Executor, Pool

log = logging.getLogger("isthmus.sdk")

RENEW_SHARE = 1 / 3  # of a lease's life between renewals: two may fail before it ends
RENEW_S_MIN = 0.2
# How long the site may take to learn of a death: Slurm may need seconds to say why it ended a job.
DEATH_PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
GIVE_BACK_S_MAX = 5.0  # how long `close` waits for the site to take leases back


class Events(Protocol):
    """What the keeper tells the engine."""

    def granted(self, pool: Pool, links: list[Link]) -> None: ...
    def refused(self, pool: Pool, error: IsthmusError) -> None: ...
    def explained(self, call: Call, error: BaseException) -> None: ...
    def drained(self, lease: LeaseId) -> None: ...


class Keeper:
    def __init__(self, supply: Supply, connect: Callable[[Holding, Hello], Link]) -> None:
        self._supply = supply
        self._connect = connect
        self._events: Events | None = None
        self._held: dict[str, Holding] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._requests: set[threading.Thread] = set()
        self._closing = False
        self._renewal_failed = False

    def bind(self, events: Events) -> None:
        self._events = events

    # orders: each returns at once ------------------------------------------------------------------------
    def request(self, pool: Pool, request: LeaseRequest) -> None:
        name = f"isthmus.request.{pool.name}"
        thread = threading.Thread(target=self._request, args=(pool, request), name=name, daemon=True)
        with self._lock:
            thread.start()
            self._requests.add(thread)

    def release(self, link: Link) -> None:
        self._post(lambda: self._give_back(link.holding))

    def kill(self, link: Link) -> None:
        self._post(lambda: self._quietly(lambda: self._supply.kill(link.holding)))

    def examine(self, executor: Executor, call: Call) -> None:
        name = f"isthmus.examine.{executor.name}"
        threading.Thread(target=self._examine, args=(executor, call), name=name, daemon=True).start()

    def leases(self) -> list[LeaseId]:
        with self._lock:
            return list(dict.fromkeys(holding.lease for holding in self._held.values()))

    def close(self) -> None:
        """Give everything back; waits for the site at most GIVE_BACK_S_MAX."""
        self._closing = True
        with self._lock:
            held = list(self._held.values())
        for holding in held:
            self._post(lambda holding=holding: self._give_back(holding))  # type: ignore[misc]
        self._jobs.put(None)
        deadline_s = time.monotonic() + GIVE_BACK_S_MAX
        if self._worker is not None:
            _join(self._worker, deadline_s)
        self._supply.hang_up()  # a grant that comes when this process ends would live until it expires
        with self._lock:
            requests = list(self._requests)
        for thread in requests:
            _join(thread, deadline_s)

    # taking ------------------------------------------------------------------------
    def take(self, request: LeaseRequest) -> list[Link]:
        """Blocks: executors, connected. Raises IsthmusError, holding nothing."""
        taken: list[Holding] = []
        links: list[Link] = []
        try:
            taken += self._supply.take(request)
            with self._lock:
                self._held.update({holding.executor: holding for holding in taken})
            for holding in taken:
                links.append(self._connect(holding, _hello(holding)))  # noqa: PERF401 - closed one by one on failure
        except Exception as error:  # a task boundary: somebody waits for an answer, whatever went wrong
            for link in links:
                link.channel.close()
            for holding in taken:
                self._give_back(holding)
            if isinstance(error, IsthmusError):
                raise
            log.exception("a lease could not be taken")
            raise FabricError(f"a lease could not be taken: {type(error).__name__}: {error}") from error
        self._ensure_worker()
        return links

    def _request(self, pool: Pool, request: LeaseRequest) -> None:
        try:
            self._grant(pool, self.take(request))
        except IsthmusError as error:
            self._refuse(pool, error)
        except Exception as error:  # a task boundary: calls wait for what this thread brings
            log.exception("a lease could not be used")
            self._refuse(pool, FabricError(f"a lease could not be used: {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self._requests.discard(threading.current_thread())

    def _grant(self, pool: Pool, links: list[Link]) -> None:
        """Hand them to the engine. What it cannot use goes back: nobody else knows of it."""
        assert self._events is not None
        unused = links
        try:
            if not self._closing:
                self._events.granted(pool, links)
                unused = []
        finally:
            for link in unused:
                self._give_back(link.holding)

    def _refuse(self, pool: Pool, error: IsthmusError) -> None:
        assert self._events is not None
        if not self._closing:
            self._events.refused(pool, error)

    # the control thread ------------------------------------------------------------------------
    def _post(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)
        self._ensure_worker()

    def _ensure_worker(self) -> None:
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="isthmus.control", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        renew_at_s = time.monotonic() + self._renew_s()
        while True:
            try:
                job = self._jobs.get(timeout=max(renew_at_s - time.monotonic(), 0.0))
            except queue.Empty:
                self._carry_out(self._renew)
                renew_at_s = time.monotonic() + self._renew_s()
                continue
            if job is None:
                return
            self._carry_out(job)
            renew_at_s = min(renew_at_s, time.monotonic() + self._renew_s())

    def _carry_out(self, job: Callable[[], None]) -> None:
        """One job's failure must not end the thread that renews and releases all leases."""
        try:
            job()
        except Exception:  # a task boundary
            log.exception("an order to the site failed")

    def _renew_s(self) -> float:
        with self._lock:
            lives_s = [holding.lease_s for holding in self._held.values() if holding.lease_s]
        return max(min(lives_s) * RENEW_SHARE, RENEW_S_MIN) if lives_s else 1.0

    def _renew(self) -> None:
        with self._lock:
            mine = {holding.lease: holding for holding in self._held.values() if holding.lease_s}
        if not mine:
            return
        try:
            renewals = self._supply.renew(tuple(mine))
        except IsthmusError as error:
            if not self._renewal_failed:
                log.warning("leases could not be renewed; open ones go on without the site: %s", error)
            self._renewal_failed = True
            return
        self._renewal_failed = False
        assert self._events is not None
        for renewal in renewals:
            if renewal.draining or not renewal.ok:
                self._events.drained(renewal.lease)

    def _give_back(self, holding: Holding) -> None:
        with self._lock:
            if self._held.pop(holding.executor, None) is None:
                return
        self._quietly(lambda: self._supply.give_back(holding))

    def _quietly(self, request: Callable[[], None]) -> None:
        """For requests whose failure changes nothing for us: the lease ends by itself when nobody renews
        it.
        """
        try:
            request()
        except IsthmusError as error:
            log.debug("the site did not take an order: %s", error)

    def _examine(self, executor: Executor, call: Call) -> None:
        assert isinstance(executor.link, Link)
        assert self._events is not None
        cause: BaseException | None = None
        for pause_s in DEATH_PAUSES_S:
            time.sleep(pause_s)
            try:
                cause = self._supply.cause_of_death(executor.link.holding)
            except Exception as error:  # a task boundary: the call's caller waits for what is said here
                cause = ExecutorLostError(f"executor {executor.name} died; the site cannot say why: {error}")
            if cause is not None:
                break
        self.release(executor.link)
        self._events.explained(call, cause or ExecutorLostError(
            f"the link to executor {executor.name} broke while it ran the call; it may have run in part, "
            "so retry only if it is idempotent"))  # fmt: skip


def _join(thread: threading.Thread, deadline_s: float) -> None:
    if thread is not threading.current_thread():
        thread.join(max(deadline_s - time.monotonic(), 0.0))


def _hello(holding: Holding) -> Hello:
    return Hello(token=holding.token, python=python_version(), isthmus=ISTHMUS_VERSION)


def with_count(request: LeaseRequest, count: int, wait_s: float) -> LeaseRequest:
    return msgspec.structs.replace(request, count=count, wait_s=wait_s)
