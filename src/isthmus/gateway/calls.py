"""REST: durable calls. Their payloads travel as msgpack and are never decoded here."""

from isthmus.core.api import CallResult, CallSummary, DurableCall
from isthmus.core.ids import CallId
from isthmus.core.model import Record
from isthmus.gateway.operations import Asked, Operation
from isthmus.services.jobs import Jobs


class ResultQuery(Record, frozen=True):
    """`wait_s`: how long to wait for the end, at most a minute; then ask again."""

    wait_s: float = 0.0


class Calls:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def operations(self) -> list[Operation]:
        call = "/v1/calls/{call}"
        return [
            Operation(
                "POST",
                "/v1/calls",
                "Store a durable call; it is on disk when this answers",
                self.submit,
                CallSummary,
                body=DurableCall,
                status=201,
                packed_body=True,
                large=True,
            ),
            Operation(
                "GET", "/v1/calls", "Your durable calls, the newest first", self.show_all, list[CallSummary]
            ),
            Operation("GET", call, "One durable call", self.show, CallSummary),
            Operation("DELETE", call, "Cancel a durable call", self.cancel, CallSummary),
            Operation(
                "GET",
                f"{call}/result",
                "Its result; wait_s waits for it",
                self.result,
                CallResult,
                query=ResultQuery,
                packed_reply=True,
                detached=False,
            ),
        ]

    async def submit(self, asked: Asked) -> CallSummary:
        return await self._jobs.submit(asked.principal, asked.body)

    async def show_all(self, asked: Asked) -> list[CallSummary]:
        return await self._jobs.calls(asked.principal)

    async def show(self, asked: Asked) -> CallSummary:
        return await self._jobs.call(asked.principal, CallId(asked.path["call"]))

    async def cancel(self, asked: Asked) -> CallSummary:
        return await self._jobs.cancel(asked.principal, CallId(asked.path["call"]))

    async def result(self, asked: Asked) -> CallResult:
        return await self._jobs.result(asked.principal, CallId(asked.path["call"]), asked.query.wait_s)
