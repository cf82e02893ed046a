"""Durable calls against real fabric channels: executors are threads with a SocketDomain, leases come from a
twin.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from isthmus.core.api import DurableCall, Grant, KillReply, LeaseReply, Renewal, RenewReply
from isthmus.core.clock import SystemClock
from isthmus.core.errors import DeniedError, InvalidRequestError, NoCapacityError, NotFoundError
from isthmus.core.ids import ExecutorId, LeaseId, NodeId, TenantId, new_id
from isthmus.core.model import (
    EndReason,
    Enforcement,
    ExecutorInfo,
    Lease,
    LeaseState,
    Principal,
    Quota,
    python_version,
)  # fmt: skip
from isthmus.core.settings import JobsSettings
from isthmus.fabric.codec import decode_error
from isthmus.fabric.frames import Kind, Welcome
from isthmus.fabric.sockets import SocketDomain
from isthmus.services.jobs import CallStore, Jobs, Relay, relay
from isthmus.services.jobs.jobs import KILLS_MAX
from isthmus.services.jobs.store import Ending

RESULT_BYTES_MAX = 100_000
TENANT_BYTES_MAX = 2**26
ADA = Principal(tenant=TenantId("ada"))
BOB = Principal(tenant=TenantId("bob"))


class Executor:
    """What an executor does on the wire: `echo` answers, `raise` fails, `die` dies, `hang` waits for a
    cancel.
    """

    def __init__(self, address: str) -> None:
        self.seen: list[bytes] = []
        self.hanging = threading.Event()
        self._stop = threading.Event()
        self._dead = threading.Event()
        self._domain = SocketDomain()
        self.address = self._domain.listen(address, self._admit)
        # Not waited for at exit: one whose test lost it must not hold up the whole run.
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if not self._dead.is_set():
            self._domain.wake()
        self._thread.join()
        self._domain.close()

    def _admit(self, hello):
        return Welcome(
            executor="ex_1", python=python_version(), isthmus="0", channel_id=0, channel_key=0, credits=256
        )

    def _serve(self) -> None:
        defined = set()
        while not self._stop.is_set():
            frame = self._domain.poll(1.0)
            if frame is None:
                continue
            channel = self._domain.channel(frame.channel_id)
            match frame.kind, frame.meta:
                case Kind.DEFINE, _:
                    defined.add(frame.function_id)
                case Kind.CALL, b"echo":
                    assert frame.function_id in defined
                    self.seen.append(bytes(frame.data))
                    channel.send(Kind.RESULT, frame.call_id, 0, b"m", [bytes(frame.data)])
                case Kind.CALL, b"raise":
                    self.seen.append(b"raise")
                    channel.send(Kind.ERROR, frame.call_id, 0, b"e")
                case Kind.CALL, b"boast":
                    self.seen.append(b"boast")
                    channel.send(Kind.RESULT, frame.call_id, 0, b"m", [bytes(RESULT_BYTES_MAX + 1)])
                case Kind.CALL, b"die":
                    self._dead.set()
                    self._domain.close()
                    return
                case Kind.CALL, b"stall":
                    channel.send(Kind.RESULT, frame.call_id, 0, b"m")
                    self._domain.poll(0.0)
                    self._stop.wait()
                case Kind.CALL, b"hang":
                    self.hanging.set()
                case Kind.CANCEL, why:
                    channel.send(Kind.ERROR, frame.call_id, 0, b"stopped by " + why)


class Leases:
    """A LeaseSource with room for `slots` leases, each a fresh Executor."""

    def __init__(self, directory, slots: int) -> None:
        self.directory, self.slots = directory, slots
        self.scheme = "unix"
        self.addresses: list[str] = []  # given instead of those of the first executors
        self.executors: dict[LeaseId, Executor] = {}
        self.made = 0
        self.end_reason = EndReason.EXITED
        self.refusal: Exception | None = None

    async def request(self, principal, request):
        if self.refusal is not None:
            raise self.refusal
        if len(self.executors) >= self.slots:
            raise NoCapacityError("full")
        lease = LeaseId(new_id("ls"))
        self.made += 1
        executor = self.executors[lease] = Executor(
            "tcp://127.0.0.1:0" if self.scheme == "tcp" else f"unix:{self.directory / f'{self.made}.sock'}"
        )
        address = self.addresses.pop(0) if self.addresses else executor.address
        info = ExecutorInfo(executor=ExecutorId("ex_1"), address=address, pid=1)
        grant = Grant(
            lease=lease, node=NodeId("n"), executors=(info,), token="t", deadline_s=0.0, lease_s=30.0,
            lease_class=request.lease_class, enforcement=Enforcement(),
        )  # fmt: skip
        return LeaseReply(request=new_id("rq"), grants=(grant,))

    async def renew(self, principal, ids):
        return RenewReply(renewals=tuple(Renewal(lease=lease, ok=True) for lease in ids))

    async def release(self, principal, lease):
        executor = self.executors.pop(lease, None)
        if executor is not None:
            await asyncio.to_thread(executor.close)

    async def kill_executor(self, principal, lease, executor):
        return KillReply(executor=executor, killed=True)

    def leases(self, principal, ended):
        return []

    def lease(self, principal, lease):
        base = DurableCall(function_name="", function_kind="function", function_code=b"",
                           arguments_meta=b"", arguments_data=b"")  # fmt: skip
        return Lease(
            lease=lease, tenant=principal.tenant, resources=base.resources, lease_class=base.lease_class,
            environment=base.environment, state=LeaseState.ENDED, end_reason=self.end_reason,
            end_detail="code 9",
        )  # fmt: skip


def call(meta: bytes, data: bytes = b"payload", **more) -> DurableCall:
    return DurableCall(
        function_name="work", function_kind="function", function_code=b"code", arguments_meta=meta,
        arguments_data=data, **more,
    )  # fmt: skip


@asynccontextmanager
async def running(tmp_path, leases: Leases, **settings) -> AsyncIterator[Jobs]:
    store = CallStore(tmp_path / "calls.sqlite3", history_s=1000.0, tenant_bytes_max=TENANT_BYTES_MAX)
    sender = Relay(RESULT_BYTES_MAX)
    jobs = Jobs(JobsSettings(**settings), leases, store, sender, SystemClock(), lambda tenant: Quota())
    loop = asyncio.create_task(jobs.run())
    try:
        yield jobs
    finally:
        loop.cancel()
        await asyncio.wait({loop})
        await jobs.close()
        store.close()


async def finished(jobs: Jobs, principal: Principal, submitted):
    return await jobs.result(principal, submitted.call, wait_s=20.0)


def test_a_result_is_recorded_byte_for_byte(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        async with running(tmp_path, leases) as jobs:
            result = await finished(jobs, ADA, await jobs.submit(ADA, call(b"echo", b"\x00\xff" * 50_000)))
            assert (result.state, result.kind, result.meta) == ("done", Kind.RESULT, b"m")
            assert result.data == b"\x00\xff" * 50_000
        assert not leases.executors

    asyncio.run(scenario())


def test_an_answer_beyond_the_limit_fails_its_call_once_and_for_all(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        async with running(tmp_path, leases) as jobs:
            result = await finished(jobs, ADA, await jobs.submit(ADA, call(b"boast", retries=3)))
            assert result.state == "failed"
            assert f"a frame of {RESULT_BYTES_MAX + 1} bytes" in result.detail
            assert (await jobs.calls(ADA))[0].attempts == 1
            assert (await finished(jobs, ADA, await jobs.submit(ADA, call(b"echo")))).state == "done"

    asyncio.run(scenario())


def test_a_wait_that_is_no_number_is_no_wait(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=0)) as jobs:
            submitted = await jobs.submit(ADA, call(b"echo"))
            assert (await jobs.result(ADA, submitted.call, wait_s=float("nan"))).state == "queued"

    asyncio.run(scenario())


def test_an_executor_that_never_answers_its_greeting_holds_up_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(relay, "CONNECT_TIMEOUT_S", 60.0)

    async def scenario():
        leases = Leases(tmp_path, slots=2)
        deaf = socket.create_server(("127.0.0.1", 0))
        leases.addresses = [f"tcp://127.0.0.1:{deaf.getsockname()[1]}"]
        async with running(tmp_path, leases) as jobs:
            waiting = await jobs.submit(ADA, call(b"echo"))
            while leases.made == 0:  # until that address was given
                await asyncio.sleep(0.01)
            assert (await finished(jobs, BOB, await jobs.submit(BOB, call(b"echo")))).state == "done"
            deaf.close()
            assert (await finished(jobs, ADA, waiting)).state == "done"

    asyncio.run(scenario())


def test_an_executor_that_reads_nothing_holds_up_nobody_else(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=2)
        leases.scheme = "tcp"
        async with running(tmp_path, leases) as jobs:
            assert (await finished(jobs, ADA, await jobs.submit(ADA, call(b"stall")))).state == "done"
            stuck = await jobs.submit(ADA, msgspec.structs.replace(call(b"echo"), function_code=bytes(2**24)))
            while (await jobs.call(ADA, stuck.call)).state == "queued":
                await asyncio.sleep(0.01)
            assert (await finished(jobs, BOB, await jobs.submit(BOB, call(b"echo")))).state == "done"
            assert (await jobs.call(ADA, stuck.call)).state == "running"

    asyncio.run(scenario())


def test_many_calls_share_a_few_leases_and_each_runs_once(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=2)
        async with running(tmp_path, leases) as jobs:
            payloads = [b"%d" % number for number in range(200)]
            submitted = [await jobs.submit(ADA, call(b"echo", payload)) for payload in payloads]
            results = [await finished(jobs, ADA, one) for one in submitted]
            assert [result.data for result in results] == payloads
            assert leases.made <= 2
            seen = [data for executor in leases.executors.values() for data in executor.seen]
            assert sorted(seen) == sorted(payloads)

    asyncio.run(scenario())


def test_an_idempotency_key_names_one_call_per_tenant(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        async with running(tmp_path, leases) as jobs:
            first = await jobs.submit(ADA, call(b"echo", b"1", idempotency_key="k"))
            again = await jobs.submit(ADA, call(b"echo", b"2", idempotency_key="k"))
            other = await jobs.submit(BOB, call(b"echo", b"3", idempotency_key="k"))
            assert again.call == first.call != other.call
            assert (await finished(jobs, ADA, again)).data == b"1"
            assert (await finished(jobs, BOB, other)).data == b"3"

    asyncio.run(scenario())


def test_a_foreign_tenants_call_does_not_exist(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=1)) as jobs:
            submitted = await jobs.submit(ADA, call(b"echo"))
            for ask in (jobs.call(BOB, submitted.call), jobs.cancel(BOB, submitted.call),
                        jobs.result(BOB, submitted.call, 0.0)):  # fmt: skip
                with pytest.raises(NotFoundError):
                    await ask
            assert await jobs.calls(BOB) == []

    asyncio.run(scenario())


def test_the_functions_own_exception_is_retried_as_often_as_asked_and_then_told(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        async with running(tmp_path, leases) as jobs:
            submitted = await jobs.submit(ADA, call(b"raise", retries=2))
            result = await finished(jobs, ADA, submitted)
            assert (result.state, result.kind, result.meta) == ("failed", Kind.ERROR, b"e")
            assert (await jobs.call(ADA, submitted.call)).attempts == 3

    asyncio.run(scenario())


def test_a_dead_executor_is_told_as_such_with_its_exit_code(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=1)) as jobs:
            result = await finished(jobs, ADA, await jobs.submit(ADA, call(b"die")))
            assert result.state == "failed"
            assert "ExecutorLostError" in result.detail
            assert "code 9" in result.detail
            assert type(decode_error(result.meta, result.data)).__name__ == "ExecutorLostError"

    asyncio.run(scenario())


def test_a_call_without_retries_bears_kills_of_its_executor_but_not_for_ever(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        leases.end_reason = EndReason.KILLED
        async with running(tmp_path, leases) as jobs:
            submitted = await jobs.submit(ADA, call(b"die"))
            assert (await finished(jobs, ADA, submitted)).state == "failed"
            assert (await jobs.call(ADA, submitted.call)).attempts == 1 + KILLS_MAX

    asyncio.run(scenario())


def test_an_eviction_is_charged_to_nobody(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        leases.end_reason = EndReason.EVICTED
        async with running(tmp_path, leases, attempts_max=3) as jobs:
            submitted = await jobs.submit(ADA, call(b"die", retries=0))
            result = await finished(jobs, ADA, submitted)
            assert (await jobs.call(ADA, submitted.call)).attempts == 3
            assert "3 attempts" in result.detail

    asyncio.run(scenario())


def test_a_late_call_is_interrupted_and_fails(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=1)) as jobs:
            result = await finished(jobs, ADA, await jobs.submit(ADA, call(b"hang", timeout_s=0.1)))
            assert (result.state, result.meta) == ("failed", b"stopped by timeout")
            assert "timeout_s=0.1" in result.detail

    asyncio.run(scenario())


def test_a_running_call_can_be_cancelled_and_its_slot_works_on(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        async with running(tmp_path, leases) as jobs:
            submitted = await jobs.submit(ADA, call(b"hang"))
            while not leases.executors:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(next(iter(leases.executors.values())).hanging.wait)
            assert (await jobs.cancel(ADA, submitted.call)).state == "cancelled"
            assert (await jobs.cancel(ADA, submitted.call)).state == "cancelled"
            assert (await finished(jobs, ADA, await jobs.submit(ADA, call(b"echo")))).state == "done"
            assert (await jobs.call(ADA, submitted.call)).state == "cancelled"

    asyncio.run(scenario())


def test_a_queued_call_can_be_cancelled_before_it_starts(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=0)) as jobs:
            submitted = await jobs.submit(ADA, call(b"echo"))
            await jobs.cancel(ADA, submitted.call)
            result = await finished(jobs, ADA, submitted)
            assert result.state == "cancelled"
            assert type(decode_error(result.meta, result.data)).__name__ == "CallCancelledError"

    asyncio.run(scenario())


def test_a_refused_lease_fails_the_call_with_the_refusal(tmp_path):
    async def scenario():
        leases = Leases(tmp_path, slots=1)
        leases.refusal = DeniedError("guests get nothing")
        async with running(tmp_path, leases) as jobs:
            result = await finished(jobs, ADA, await jobs.submit(ADA, call(b"echo")))
            assert result.detail == "DeniedError: guests get nothing"

    asyncio.run(scenario())


def test_a_restarted_site_runs_what_was_queued_and_what_was_running(tmp_path):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=0)) as jobs:
            queued = await jobs.submit(ADA, call(b"echo", b"queued"))
            was_running = await jobs.submit(ADA, call(b"echo", b"running"))
        store = CallStore(tmp_path / "calls.sqlite3", history_s=1000.0, tenant_bytes_max=TENANT_BYTES_MAX)
        assert store.start(was_running.call, LeaseId("ls_dead"))
        store.close()
        async with running(tmp_path, Leases(tmp_path, slots=1)) as jobs:
            assert (await finished(jobs, ADA, queued)).data == b"queued"
            assert (await finished(jobs, ADA, was_running)).data == b"running"
            assert (await jobs.call(ADA, was_running.call)).attempts == 2

    asyncio.run(scenario())


def test_a_tenants_calls_and_results_take_a_bounded_part_of_the_disk(tmp_path):
    def opened():
        return CallStore(tmp_path / "calls.sqlite3", history_s=1000.0, tenant_bytes_max=10_000)

    large = call(b"echo", bytes(6000), idempotency_key="k")
    store = opened()
    first = store.add(ADA.tenant, large, 0.0)
    with pytest.raises(DeniedError, match="may hold 10000"):
        store.add(ADA.tenant, call(b"echo", bytes(6000)), 0.0)
    assert store.add(ADA.tenant, large, 0.0) == first
    assert store.add(BOB.tenant, large, 0.0) != first
    store.close()
    store = opened()
    with pytest.raises(DeniedError):
        store.add(ADA.tenant, call(b"echo", bytes(6000)), 0.0)
    assert store.end(first.call, Ending("done", data=bytes(100)), 1.0)
    assert not store.end(first.call, Ending("done", data=bytes(100)), 1.0)
    second = store.add(ADA.tenant, call(b"echo", bytes(6000)), 1.0)
    assert store.end(second.call, Ending("done", data=bytes(9000)), 2.0)
    with pytest.raises(DeniedError):
        store.add(ADA.tenant, call(b"echo"), 2.0)
    assert store.forget(2000.0) == 2
    assert store.add(ADA.tenant, large, 2000.0)
    store.close()


@pytest.mark.parametrize("kind", ["generator", "asyncgen", "actor", "native", "nonsense"])
def test_only_functions_with_one_result_can_be_durable(tmp_path, kind):
    async def scenario():
        async with running(tmp_path, Leases(tmp_path, slots=0)) as jobs:
            with pytest.raises(InvalidRequestError, match=kind):
                await jobs.submit(ADA, msgspec.structs.replace(call(b"echo"), function_kind=kind))

    asyncio.run(scenario())
