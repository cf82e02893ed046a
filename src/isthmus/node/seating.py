"""A spare process takes its seat in a lease: its page, its limits, its address, its orders.

Not here: where spares come from (`zygotes.py`), who sees an executor to its end (`hosting.py`).
"""

import asyncio
from pathlib import Path

from isthmus.core.ids import ExecutorId, NodeId, new_id
from isthmus.core.kinds import of_node
from isthmus.core.model import Environment, ExecutorInfo
from isthmus.core.settings import NodeSettings
from isthmus.node.assignments import Assignment
from isthmus.node.environments import Environments, shared
from isthmus.node.hosted import Hosted
from isthmus.node.idling import make_idle
from isthmus.node.isolation import Isolation, Share, cache_of, state_tag
from isthmus.node.page import DEADLINE, ORPHAN, Page
from isthmus.node.records import LOG_FILE, LeaseRecord
from isthmus.node.running import Executor
from isthmus.node.socket_paths import socket_path
from isthmus.node.zygotes import Spare, Zygotes


class Seating:
    """How long an executor outlives its site, `orphan_s`, is the site's to say."""

    def __init__(
        self, settings: NodeSettings, node: NodeId, site: str, state: Path, isolation: Isolation,
        zygotes: Zygotes, environments: Environments,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._node = node
        self._site = site
        self._state = state
        self._isolation = isolation
        self._zygotes = zygotes
        self._environments = environments
        self.orphan_s = 0.0

    async def take_spare(self, environment: Environment) -> Spare:
        """Raises FunctionLoadError where the environment cannot be made."""
        environment = shared(environment)
        python = await self._environments.python(environment)
        return await self._zygotes.take(environment, python, spares=1)

    async def seat(self, hosted: Hosted, spare: Spare, share: Share | None = None) -> Executor:
        """Make the spare an executor of the lease; `share` with the first, for which a group is made."""
        executor_id = ExecutorId(new_id("ex"))
        page_path = hosted.directory / f"{executor_id}.page"
        page = Page(page_path, create=True)
        page[DEADLINE] = hosted.deadline_ns
        page[ORPHAN] = int(self.orphan_s * 1e9)
        try:
            assignment = self._assignment(hosted, executor_id, page_path)
            if of_node(hosted.record.resources.amounts):
                await asyncio.to_thread(self._enclose, hosted, spare.pid, share)
                address = await spare.assign(assignment)
            else:
                if share is not None:
                    self._isolation.create(hosted.lease, share, spare.pid)
                if hosted.record.is_harvested:
                    make_idle(spare.pid)
                attaching = asyncio.to_thread(self._isolation.attach, hosted.lease, spare.pid)
                address, _ = await asyncio.gather(spare.assign(assignment), attaching)
        except BaseException:
            spare.discard()
            page.close()
            raise
        finally:
            self._zygotes.refill(shared(hosted.record.environment).id)
        info = ExecutorInfo(executor=executor_id, address=address, pid=spare.pid)
        return Executor(info, page, spare.is_reaped)

    def _enclose(self, hosted: Hosted, pid: int, share: Share | None) -> None:
        """Before the process opens a socket, which belongs to the group it is opened in. Runs commands."""
        if share is not None:
            self._isolation.create(hosted.lease, share, pid)
        self._isolation.attach(hosted.lease, pid)

    def _assignment(self, hosted: Hosted, executor: ExecutorId, page: Path) -> Assignment:
        record = hosted.record
        has_core = len(hosted.executors) < record.resources.cores and not record.is_harvested
        spin_s = self._settings.spin_s if has_core else 0.0  # it would spin on a core that others need
        listen = self._settings.listen or f"unix:{socket_path(hosted.directory, executor, self._state)}"
        return Assignment(
            executor=executor, lease=record.lease, tenant=record.tenant, node=self._node,
            lease_key=record.lease_key, page=str(page), log=str(hosted.directory / LOG_FILE),
            listen=listen, site=self._site,
            sys_path=record.environment.sys_path, sys_path_first=not record.environment.requirements,
            cores=record.resources.cores, spin_s=spin_s, ahead_s=record.ahead_s,
            is_harvested=record.is_harvested, cache=self._cache(record),
        )  # fmt: skip

    def _cache(self, record: LeaseRecord) -> str:
        if "cache" not in record.resources.amounts:
            return ""
        return str(cache_of(record.lease, Path(self._settings.cache_path), state_tag(self._state)))
