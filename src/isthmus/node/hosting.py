"""The leases on this node as they really are: their processes, their limits, their ends.

Every act on a lease holds that lease's lock, so orders for one lease take effect in order while others go on.
Acts are idempotent. What has ended is told once through `on_end` and never comes back.
Not here: what the site wants (`agent.py`), which cores are whose (`leases.py`), what is written down
(`records.py`), how a process joins a lease (`seating.py`).
"""

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from isthmus.core.errors import (
    InvalidRequestError,
    LeaseEndedError,
    NoCapacityError,
    NotFoundError,
)
from isthmus.core.ids import ExecutorId, LeaseId, NodeId
from isthmus.core.model import EndReason, Enforcement, Environment, ExecutorInfo, LeaseClass
from isthmus.core.ownership import is_ours
from isthmus.core.settings import NodeSettings
from isthmus.node.assignments import Exited
from isthmus.node.environments import Environments, shared
from isthmus.node.hosted import Hosted, enforced
from isthmus.node.isolation import Isolation, Share
from isthmus.node.leases import Allotments, end_ns
from isthmus.node.logs import Chunk, Log
from isthmus.node.messages import AnyMessage, ExecutorEnded, LeaseEnded, LeaseReport, RunningLease, StartLease
from isthmus.node.metering import lease_functions, lease_usage, report
from isthmus.node.page import CLIENTS, DEADLINE, DRAINING, ORPHAN
from isthmus.node.records import LOG_FILE, LeaseRecord, Records, boot_id
from isthmus.node.running import Executor
from isthmus.node.seating import Seating
from isthmus.node.socket_paths import short_directory
from isthmus.node.zygotes import Zygotes

EXECUTORS_MAX = 64  # of one lease: bounds the depth of nested calls
_EXIT_STATUS_S = 1.0  # how long a zygote may take to report a death that we see
_SIGNAL_S = 0.3  # how far the signals of one scancel may be apart
_SOCKET_PATH_MAX = 100  # the kernel's limit is 107


log = logging.getLogger("isthmus.agent")


class Host:
    def __init__(
        self, settings: NodeSettings, node: NodeId, site: str, allotments: Allotments, isolation: Isolation,
        records: Records, zygotes: Zygotes, environments: Environments, tell: Callable[[AnyMessage], None],
        is_guest: bool = False,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._node = node
        self._allotments = allotments
        self._isolation = isolation
        self._records = records
        self._zygotes = zygotes
        self._environments = environments
        self._tell = tell
        self._is_guest = is_guest
        self.leaving = asyncio.Event()  # set by the signal that ends the agent
        self._leases: dict[LeaseId, Hosted] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._seating = Seating(settings, node, site, records.state, isolation, zygotes, environments)

    # orders -------------------------------------------------------------------------------------------------
    async def start(self, order: StartLease) -> tuple[ExecutorInfo, Enforcement]:
        """Raises NoCapacityError, FunctionLoadError, LeaseEndedError."""
        hosted = self._leases.get(order.lease)
        if hosted is None:
            hosted = self._admit(order)
            async with hosted.lock:
                await self._begin(hosted)
        async with hosted.lock:
            if not hosted.executors or hosted.ending:
                raise LeaseEndedError(f"lease {order.lease} has ended on {self._node}")
            return next(iter(hosted.executors.values())).info, hosted.record.enforcement

    async def add_executor(self, lease: LeaseId) -> ExecutorInfo:
        hosted = self._find(lease)
        async with hosted.lock:
            if hosted.ending:
                raise LeaseEndedError(f"lease {lease} is ending")
            if len(hosted.executors) >= EXECUTORS_MAX:
                raise InvalidRequestError(
                    f"lease {lease} has {EXECUTORS_MAX} executors already: calls nest too deep"
                )
            executor = await self._add(hosted)
        return executor.info

    def renew(self, lease: LeaseId, life_s: float) -> None:
        """From now on it may live so long."""
        hosted = self._find(lease)
        hosted.deadline_ns = _after_ns(life_s)
        for executor in hosted.executors.values():
            executor.page[DEADLINE] = hosted.deadline_ns

    def drain(self, lease: LeaseId) -> None:
        for executor in self._find(lease).executors.values():
            executor.page[DRAINING] = 1

    async def end(self, lease: LeaseId, reason: EndReason, grace_s: float, detail: str = "") -> None:
        """Stop everything of the lease and free what it held. Unknown leases have ended already."""
        hosted = self._leases.get(lease)
        if hosted is None:
            return
        hosted.ending = True
        async with hosted.lock:
            if lease not in self._leases:
                return
            await self._stop(hosted, grace_s)
            hosted.trim_log()
            ended = LeaseEnded(
                lease=lease,
                reason=reason,
                detail=detail,
                usage=lease_usage(hosted.record, hosted.pages, self._isolation),
                functions=lease_functions(hosted.pages),
            )
            try:
                await asyncio.to_thread(self._isolation.destroy, lease)
                await asyncio.to_thread(self._records.write_end, ended)
            except OSError as error:  # a process that cannot die, a full disk: the lease is over all the same
                log.error("lease %s ended, but something of it is left: %s", lease, error)
            self._forget(hosted)
        self._tell(ended)
        await self._trim_ended_logs()

    async def kill(self, lease: LeaseId, executor: ExecutorId) -> bool:
        """SIGKILL one executor. The lease ends with its last one. False: it was gone already."""
        hosted = self._leases.get(lease)
        running = hosted.executors.get(executor) if hosted is not None else None
        if running is None:
            return False
        running.killed = True
        running.send_signal(signal.SIGKILL)
        await running.gone.wait()
        return True

    def guests(self) -> list[Hosted]:
        """Leases with something to freeze, the longest here first."""
        return [hosted for hosted in self._leases.values() if hosted.executors and not hosted.ending]

    def freeze(self, lease: LeaseId, now_ns: int) -> None:
        """Stop all of it where it is. A lease that is gone, or frozen, stays so."""
        hosted = self._leases.get(lease)
        if hosted is not None and not hosted.frozen_ns:
            self._isolation.freeze(lease)
            hosted.frozen_ns = now_ns

    def thaw(self, lease: LeaseId) -> None:
        hosted = self._leases.get(lease)
        if hosted is not None and hosted.frozen_ns:
            self._isolation.thaw(lease)
            hosted.frozen_ns = 0

    def read_log(self, lease: LeaseId, offset: int, limit_bytes: int) -> Chunk:
        """Also of a lease that is over, while its output is kept. Raises NotFoundError."""
        hosted = self._leases.get(lease)
        if hosted is not None:
            return hosted.log.read(offset, limit_bytes)
        path = self._records.ended_log(lease)
        if not path.exists():
            raise NotFoundError(f"no lease {lease} on {self._node}, and no output of it")
        return Log(path, self._settings.log_bytes_max).read(offset, limit_bytes)

    async def warm(self, environment: Environment, spares: int) -> None:
        environment = shared(environment)
        if spares == 0:
            if not any(shared(hosted.record.environment) == environment for hosted in self._leases.values()):
                await self._zygotes.stop(environment.id)
            return
        await self._zygotes.warm(environment, await self._environments.python(environment), spares)

    async def cool(self) -> None:
        """Stop the zygotes of environments that nobody has used for long."""
        in_use = {shared(hosted.record.environment).id for hosted in self._leases.values()}
        for environment in self._zygotes.idle(in_use, time.monotonic()):
            await self._zygotes.stop(environment)

    # what runs ----------------------------------------------------------------------------------------------
    def running(self) -> tuple[RunningLease, ...]:
        return tuple(
            RunningLease(
                lease=hosted.lease,
                executors=tuple(executor.info for executor in hosted.executors.values()),
                deadline_s=time.time() + (hosted.deadline_ns - time.monotonic_ns()) / 1e9,
                usage=lease_usage(hosted.record, hosted.pages, self._isolation),
            )
            for hosted in self._leases.values()
            if hosted.executors and not hosted.ending
        )

    def reports(self) -> tuple[LeaseReport, ...]:
        return tuple(
            report(hosted.record, hosted.pages, self._isolation)
            for hosted in self._leases.values()
            if not hosted.ending
        )

    def trim_logs(self) -> None:
        for hosted in self._leases.values():
            hosted.trim_log()

    def overdue(self, site_connected: bool) -> list[LeaseId]:
        """Leases whose time is up."""
        now_ns = time.monotonic_ns()
        orphan_ns = int(self._seating.orphan_s * 1e9)
        late = []
        for hosted in self._leases.values():
            if hosted.ending:
                continue
            clients = sum(executor.page[CLIENTS] for executor in hosted.executors.values())
            if now_ns > end_ns(hosted.deadline_ns, orphan_ns, clients, site_connected):
                late.append(hosted.lease)
        return late

    @property
    def orphan_s(self) -> float:
        """How long leases outlive their deadline while the site cannot be reached."""
        return self._seating.orphan_s

    def set_orphan_s(self, orphan_s: float) -> None:
        self._seating.orphan_s = orphan_s
        for hosted in self._leases.values():
            for executor in hosted.executors.values():
                executor.page[ORPHAN] = int(orphan_s * 1e9)

    async def adopt(self) -> None:
        """Take over what an earlier agent of this state directory left, or clear it away."""
        for lease, record in list(self._records.leases()):
            if record is None or record.boot != boot_id():
                await asyncio.to_thread(self._isolation.destroy, lease)
                self._records.forget(lease)
                continue
            await self._adopt_one(record)
        await self.clear_remains()
        await self._trim_ended_logs()
        try:
            self._isolation.sweep()
        except OSError as error:  # others left it: no reason not to go on with what is ours
            log.warning("what earlier agents left here cannot be removed: %s", error)

    async def clear_remains(self) -> None:
        """Remove what this state directory's agents made and nobody holds any more."""
        for lease in self._isolation.remains():
            if lease not in self._leases:
                await asyncio.to_thread(self._isolation.destroy, lease)

    async def close(self, reason: EndReason, grace_s: float) -> None:
        """End every lease."""
        async with asyncio.TaskGroup() as tasks:
            for lease in list(self._leases):
                tasks.create_task(self.end(lease, reason, grace_s), name=f"end-{lease}")
        for watch in list(self._watches):
            watch.cancel()
        sockets = short_directory(self._records.state)
        with contextlib.suppress(FileNotFoundError):
            if is_ours(sockets):  # some may be of executors that died before the agent knew them
                shutil.rmtree(sockets, ignore_errors=True)

    # steps --------------------------------------------------------------------------------------------------
    def _find(self, lease: LeaseId) -> Hosted:
        hosted = self._leases.get(lease)
        if hosted is None:
            raise NotFoundError(f"no lease {lease} on {self._node}")
        return hosted

    def _admit(self, order: StartLease) -> Hosted:
        is_harvested = order.lease_class is LeaseClass.HARVESTED
        if is_harvested != bool(self._allotments.capacity.lent_cores):
            lends = "takes harvested leases only" if not is_harvested else "lends nothing"
            raise NoCapacityError(f"{self._node} {lends}; {order.lease} is {order.lease_class}")
        share = self._allotments.take(order.lease, order.resources)
        record = LeaseRecord(
            boot=boot_id(), lease=order.lease, tenant=order.tenant, resources=order.resources,
            environment=order.environment, lease_key=order.lease_key, cores=share.cores,
            enforcement=self._enforcement(is_harvested, share), started_ns=time.monotonic_ns(),
            deadline_ns=_after_ns(order.deadline_s - order.now_s), ahead_s=order.now_s - time.time(),
            is_harvested=is_harvested,
        )  # fmt: skip
        hosted = self._leases[order.lease] = self._hosted(record)
        return hosted

    def _enforcement(self, is_harvested: bool, share: Share) -> Enforcement:
        """Harvested leases share their cores: what holds them apart is the idle class, not a set of cores."""
        amounts = enforced(self._isolation, dict(share.amounts))
        held = msgspec.structs.replace(self._isolation.enforcement, amounts=amounts)
        if not is_harvested:
            return held
        detail = "cores are lent: it runs at idle class, and is frozen or ended when their owner wants them"
        return msgspec.structs.replace(held, cores="accounted-only", detail=detail)

    def _hosted(self, record: LeaseRecord) -> Hosted:
        directory = self._records.directory(record.lease)
        return Hosted(record, directory, Log(directory / LOG_FILE, self._settings.log_bytes_max))

    async def _begin(self, hosted: Hosted) -> None:
        """Write down, enforce, start; or undo all of it."""
        try:
            self._records.write(hosted.record)
            await self._add(hosted, hosted.share)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._isolation.destroy, hosted.lease))
            self._forget(hosted)
            raise

    async def _add(self, hosted: Hosted, share: Share | None = None) -> Executor:
        spare = await self._seating.take_spare(hosted.record.environment)
        return self._watch(hosted, await self._seating.seat(hosted, spare, share))

    def _watch(self, hosted: Hosted, executor: Executor) -> Executor:
        hosted.executors[executor.info.executor] = executor
        watch = asyncio.create_task(self._await_end(hosted, executor), name=f"watch-{executor.info.executor}")
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        return executor

    async def _await_end(self, hosted: Hosted, executor: Executor) -> None:
        """See one executor to its end, and its lease too if that was the last."""
        await executor.await_death()
        exited = await self._zygotes.exits.get(
            executor.info.pid, _EXIT_STATUS_S if executor.is_reaped() else 0.0
        )
        self._bury(hosted, executor, exited)
        executor.gone.set()
        if hosted.ending or await self._is_leaving():
            return
        reason, detail = hosted.cause(executor, self._isolation)
        if not executor.killed:
            ended = executor.info.executor
            self._tell(ExecutorEnded(lease=hosted.lease, executor=ended, reason=reason, detail=detail))
        if not hosted.executors:
            await self.end(hosted.lease, reason, 0.0, detail)

    async def _is_leaving(self) -> bool:
        """A batch system signals all processes of a job at once: an executor may be seen to go before we are
        told."""
        if self._is_guest:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SIGNAL_S):
                    await self.leaving.wait()
        return self._is_guest and self.leaving.is_set()

    def _bury(self, hosted: Hosted, executor: Executor, exited: Exited | None) -> None:
        executor.settle(exited)
        hosted.executors.pop(executor.info.executor, None)
        hosted.ended_pages.append(executor.page)
        if executor.info.address.startswith("unix:"):
            Path(executor.info.address.removeprefix("unix:")).unlink(missing_ok=True)

    async def _stop(self, hosted: Hosted, grace_s: float) -> None:
        """SIGTERM, the grace, SIGKILL."""
        executors = list(hosted.executors.values())
        if grace_s > 0:
            self.thaw(hosted.lease)
        for executor in executors:
            executor.page[DRAINING] = 1
            executor.send_signal(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        if grace_s > 0:
            await _gone(executors, grace_s)
            for executor in executors:
                executor.send_signal(signal.SIGKILL)
        await _gone(executors, _EXIT_STATUS_S * 5)

    def _forget(self, hosted: Hosted) -> None:
        self._leases.pop(hosted.lease, None)
        self._allotments.give_back(hosted.lease)
        for page in hosted.ended_pages:
            page.close()
        self._records.forget(hosted.lease)

    async def _trim_ended_logs(self) -> None:
        try:
            await asyncio.to_thread(self._records.trim_ended_logs)
        except OSError as error:
            log.warning("the output of ended leases cannot be trimmed: %s", error)

    async def _adopt_one(self, record: LeaseRecord) -> None:
        hosted = self._hosted(record)
        share = hosted.share
        self._leases[record.lease] = hosted
        self._allotments.restore(record.lease, share)
        self._isolation.create(record.lease, share)
        last: Executor | None = None
        for path in sorted(hosted.directory.glob("*.page")):
            executor = Executor.found(path)
            if executor is None:
                path.unlink()
            elif executor.is_alive():
                hosted.deadline_ns = max(hosted.deadline_ns, executor.page[DEADLINE])
                self._isolation.attach(record.lease, executor.info.pid)
                self._watch(hosted, executor)
            else:
                self._bury(hosted, executor, None)
                last = executor
        if not hosted.executors:
            reason, detail = (
                hosted.cause(last, self._isolation) if last is not None else (EndReason.FAILED, "")
            )
            await self.end(record.lease, reason, 0.0, f"gone when the agent came back: {detail}")


async def _gone(executors: list[Executor], timeout_s: float) -> None:
    waits = [asyncio.ensure_future(executor.gone.wait()) for executor in executors]
    if waits:
        _, late = await asyncio.wait(waits, timeout=timeout_s)
        for wait in late:
            wait.cancel()


def _after_ns(life_s: float) -> int:
    """So long from now, on the clock that does not jump."""
    return max(0, time.monotonic_ns() + int(life_s * 1e9))
