"""Speak to Slurm by slurmrestd: no commands, no login node, a token that says who we are.

slurmrestd cannot start a step in a job. So a lease is a batch job here, and its script is the agent.
Invariant: an answer counts only if its list of errors is empty, whatever its HTTP status.
Not here: what is sent and what answers mean (`rest_shapes.py`), the token (`tokens.py`).
"""

import asyncio
import getpass
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import structlog

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm import reasons, rest_shapes
from isthmus.platforms.slurm.client import JobSteps, RefusedError
from isthmus.platforms.slurm.records import (
    GONE,
    Job,
    JobRequest,
    License,
    NodeUse,
    PoolRequest,
    Waiting,
    job_name,
)
from isthmus.platforms.slurm.running import CONCURRENCY_MAX
from isthmus.platforms.slurm.tokens import Tokens

FIRST_LOOK_S, LOOK_S_MAX = 0.05, 1.0  # pauses between looks at a job that waits in the queue
_UNSAID = -1  # SLURM_ERROR, "unspecified error": also what an expired token gets

_log = structlog.get_logger("platforms.slurm")


class RestError(SiteUnavailableError):
    """slurmrestd answered with errors; `numbers` are Slurm's."""

    def __init__(self, message: str, numbers: list[int]) -> None:
        super().__init__(message)
        self.numbers = numbers


class _Batch:
    """A job whose script is the program: it ends with the job, which `jobs` sees."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        """Always 0: it cannot be started again in the same job."""
        await self.ended.wait()
        return 0


class RestClient:
    """A SlurmClient of slurmrestd v0.0.38 and newer, by TCP or a Unix socket. Raises SettingsError."""

    def __init__(self, settings: SlurmSettings) -> None:
        rest = settings.rest
        self.place = f"slurmrestd at {rest.url}"
        self._settings = settings
        self._user = rest.user or getpass.getuser()
        self._tokens = Tokens(rest, settings.command_timeout_s)
        socket = rest.url.removeprefix("unix:") if rest.url.startswith("unix:") else None
        self._http = httpx.AsyncClient(
            base_url="http://slurmrestd" if socket else rest.url,
            transport=httpx.AsyncHTTPTransport(
                uds=socket, limits=httpx.Limits(max_connections=CONCURRENCY_MAX)
            ),
            timeout=settings.command_timeout_s,
        )
        self._interface = 0
        self._batches: dict[int, _Batch] = {}

    @property
    def steps(self) -> JobSteps | None:
        """slurmrestd starts no steps and tells no scripts."""
        return None

    async def jobs(self) -> tuple[Job, ...]:
        answer = await self._slurm("GET", "jobs")
        found = rest_shapes.jobs(answer, self._user)
        for job in found:
            if job.job in self._batches and reasons.allocation_state(job.state) == "ended":
                self._end_batch(job.job)
        return found

    async def queue(self) -> tuple[Waiting, ...]:
        return rest_shapes.queue(await self._slurm("GET", "jobs"))

    async def nodes(self) -> tuple[NodeUse, ...]:
        wanted = {self._settings.partition, self._settings.elastic_partition} - {""}
        answer = await self._slurm("GET", "nodes")
        return rest_shapes.nodes(answer, wanted if self._settings.partition else ())

    async def clock_s(self) -> float:
        return rest_shapes.clock_s(await self._slurm("GET", "diag"))

    async def licenses(self) -> tuple[License, ...]:
        return rest_shapes.licenses(await self._slurm("GET", "licenses"))

    async def state(self, job: int) -> tuple[str, str]:
        try:
            return rest_shapes.job_state(await self._slurm("GET", f"job/{job}"))
        except RestError as error:
            if rest_shapes.UNKNOWN_JOB in error.numbers:
                return GONE, ""
            raise

    async def take(self, request: JobRequest) -> int:
        Path(request.program.log).parent.mkdir(parents=True, exist_ok=True)
        job = await self._submit(rest_shapes.submission(self._settings, request, await self._version()))
        pause_s = FIRST_LOOK_S
        while True:
            state, reason = await self.state(job)
            match reasons.allocation_state(state):
                case "running":
                    return job
                case "ended":
                    raise RefusedError(reasons.why_ended(job, state, reason))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S_MAX)

    async def submit(self, request: PoolRequest) -> int:
        return await self._submit(rest_shapes.pool_submission(self._settings, request, await self._version()))

    async def _submit(self, body: Any) -> int:
        try:
            answer = await self._slurm("POST", "job/submit", body)
        except RestError as error:
            if rest_shapes.is_refusal(error.numbers):
                raise RefusedError(str(error)) from error
            raise
        job = rest_shapes.submitted(answer)
        if not job:
            raise SiteUnavailableError("slurmrestd named no job")
        return job

    async def start(self, job: int, request: JobRequest) -> _Batch:
        return self._batches.setdefault(job, _Batch())

    async def cancel(self, job: int) -> None:
        try:
            await self._slurm("DELETE", f"job/{job}")
        except RestError as error:
            if rest_shapes.UNKNOWN_JOB not in error.numbers:
                raise
        self._end_batch(job)

    async def cancel_named(self, allocation: AllocationId) -> None:
        answer = await self._slurm("GET", "jobs")
        rows = [row for row in answer["jobs"] if row.get("name") == job_name(allocation)]
        for job in rest_shapes.jobs({"jobs": rows}, self._user):
            if reasons.allocation_state(job.state) != "ended":
                await self.cancel(job.job)

    async def remove(self, directory: str) -> None:
        """Where this machine has it too."""
        shutil.rmtree(directory, ignore_errors=True)

    async def partitions(self) -> frozenset[str]:
        return rest_shapes.partitions(await self._slurm("GET", "partitions"))

    async def ping(self) -> str:
        return rest_shapes.pings(await self._slurm("GET", "ping"))

    async def configuration(self) -> Mapping[str, str]:
        """slurmrestd does not tell it."""
        return {}

    async def close(self) -> None:
        await self._http.aclose()

    def _end_batch(self, job: int) -> None:
        batch = self._batches.pop(job, None)
        if batch is not None:
            batch.ended.set()

    # HTTP ---------------------------------------------------------------------------------------------------
    async def _version(self) -> int:
        if not self._interface:
            answer = await self._ask("GET", "/openapi/v3", None)
            self._interface = rest_shapes.version(answer, self._settings.rest.version)
        return self._interface

    async def _slurm(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, without errors. Raises RestError, SiteUnavailableError."""
        answer = await self._ask(method, f"/slurm/v0.0.{await self._version()}/{path}", body)
        numbers, words = rest_shapes.errors(answer)
        if rest_shapes.submitted(answer) and words:
            _log.info("slurmrestd took a job with words", words=words)
        elif words or numbers:
            if _UNSAID in numbers:
                self._tokens.discard()
                words += " (slurmctld does not answer it, or does not take our token)"
            raise RestError(f"slurmrestd refused {method} {path}: {words or numbers}", numbers)
        return answer

    async def _ask(self, method: str, path: str, body: Any) -> Any:
        """Any answer in JSON; once more with another token if this one is refused."""
        answer = await self._send(method, path, body)
        if answer.status_code in (401, 403):
            self._tokens.discard()
            answer = await self._send(method, path, body)
        if answer.status_code in (401, 403):
            raise SiteUnavailableError(
                f"slurmrestd refuses the token of {self._tokens.source} for user {self._user} "
                f"(HTTP {answer.status_code})"
            )
        try:
            return msgspec.json.decode(answer.content)
        except msgspec.MsgspecError as error:
            raise SiteUnavailableError(
                f"slurmrestd answered {method} {path} with HTTP {answer.status_code} and no JSON"
            ) from error

    async def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        headers = {"X-SLURM-USER-NAME": self._user, "X-SLURM-USER-TOKEN": await self._tokens.current()}
        if body is not None:
            headers["content-type"] = "application/json"
        content = None if body is None else msgspec.json.encode(body)
        try:
            return await self._http.request(method, path, headers=headers, content=content)
        except httpx.TimeoutException as error:
            raise SiteUnavailableError(
                f"slurmrestd did not answer in {self._settings.command_timeout_s:g} s"
            ) from error
        except httpx.HTTPError as error:
            raise SiteUnavailableError(f"{self.place} cannot be reached: {error}") from error
