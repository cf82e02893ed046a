"""What slurmrestd is sent, and what its answers mean.

Pure and total: any JSON gives values or SlurmOutputError.
Its interface changes with each version. v0.0.38 (Slurm 22.05) takes the names of sbatch's options and plain
numbers; from v0.0.39 on names are Slurm's own, and numbers may be `{"set": true, "number": 5}`; from v0.0.40
on states are lists. Reading takes all of these, whatever version they came from.
Source: the OpenAPI documents of slurmrestd (`GET /openapi/v3`).
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from isthmus.core.ids import NodeId
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm.parsing import MULTIPLE, SlurmOutputError, gpus, licenses_held
from isthmus.platforms.slurm.records import (
    NEVER_S,
    Job,
    JobRequest,
    License,
    NodeUse,
    PoolRequest,
    Waiting,
    minutes,
)

OLDEST, NEWEST = 38, 46  # of the interface, v0.0.N
UNKNOWN_JOB = 2017  # ESLURM_INVALID_JOB_ID
_REFUSALS = (range(2000, 3000), range(9000, 10000))  # about the request; others are about reaching slurmctld
_PATH = re.compile(r"/slurm/v0\.0\.(\d+)/jobs/?")
_MEMORY = re.compile(r"\bmem=(\d+(?:\.\d+)?)([KMGTP]?)")
_UNUSABLE = (
    "down", "drain", "draining", "drained", "fail", "not_responding", "maintenance", "powered_down",
    "powering_down", "power_down", "invalid_reg", "invalid", "reboot_issued", "blocked", "planned_down",
)  # fmt: skip
_HOME = 'HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}; export HOME'


def version(document: Any, wanted: str) -> int:
    """The interface to use, of those in its OpenAPI document. Raises SlurmOutputError."""
    paths = document.get("paths") if isinstance(document, Mapping) else None
    found = {int(match[1]) for path in _rows(paths) if (match := _PATH.fullmatch(str(path)))}
    if wanted:
        number = int(wanted.rpartition(".")[2])
        if number in found:
            return number
        raise SlurmOutputError(f"slurmrestd does not speak {wanted}, only {_spoken(found)}")
    known = [number for number in found if OLDEST <= number <= NEWEST]
    if not known:
        raise SlurmOutputError(
            f"slurmrestd speaks {_spoken(found)}; isthmus knows v0.0.{OLDEST} to v0.0.{NEWEST}"
        )
    return max(known)


def _spoken(found: Iterable[int]) -> str:
    return ", ".join(f"v0.0.{number}" for number in sorted(found)) or "nothing that isthmus knows"


# what is asked ----------------------------------------------------------------------------------------------
def submission(settings: SlurmSettings, request: JobRequest, interface: int) -> dict[str, Any]:
    """A batch job whose script is the agent: slurmrestd starts no steps."""
    script = f"#!/bin/sh\n{_HOME}\nexec {shlex.join(request.program.words)}\n"
    options = {
        "partition": request.partition(settings),
        "qos": request.qos(settings),
        "licenses": request.licenses_in_words,
    }
    job = {
        "name": request.name,
        "comment": request.comment,
        "cpus_per_task": request.resources.cores,
        "standard_output": request.program.log,
        **_common(settings, options),
    }
    more = _options_of_sbatch if interface < 39 else _description
    return _with_script(job | more(settings, request), script, request.program.environ, interface)


def pool_submission(settings: SlurmSettings, request: PoolRequest, interface: int) -> dict[str, Any]:
    """A batch job that stands ready on any node."""
    script = f"#!/bin/sh\n{_HOME}\n{request.script}\n"
    options = {"partition": request.partition(settings), "qos": request.qos(settings)}
    job = {
        "name": request.name,
        "comment": request.comment,
        "cpus_per_task": request.shape.cores,
        "standard_output": "/dev/null",
        **_common(settings, options),
    }
    if interface < 39:
        job |= {"nodes": 1, "memory_per_node": request.memory_mib, "time_limit": request.minutes}
        job["requeue" if request.comes_back else "no_requeue"] = True
    else:
        job |= {"minimum_nodes": 1, "maximum_nodes": 1, "requeue": request.comes_back}
        job |= {"memory_per_node": _set(request.memory_mib), "time_limit": _set(request.minutes)}
    return _with_script(job, script, request.environ, interface)


def _common(settings: SlurmSettings, options: Mapping[str, str]) -> dict[str, Any]:
    """What all our batch jobs ask for; nothing that is empty."""
    wanted = {
        **options,
        "account": settings.account,
        "constraints": settings.constraint,
        "reservation": settings.reservation,
    }
    named = {name: value for name, value in wanted.items() if value}
    return {"tasks": 1, "current_working_directory": "/", **named}


def _with_script(
    job: dict[str, Any], script: str, environ: Mapping[str, str], interface: int
) -> dict[str, Any]:
    everything = {"PATH": "/usr/local/bin:/usr/bin:/bin", **environ}
    if interface < 39:
        return {"script": script, "job": {**job, "environment": everything}}
    job = {**job, "environment": [f"{name}={value}" for name, value in everything.items()]}
    return {"script": script, "job": job} if interface < 41 else {"job": {**job, "script": script}}


def _set(number: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": number}


def _options_of_sbatch(settings: SlurmSettings, request: JobRequest) -> dict[str, Any]:
    gres = request.gpus(settings)
    return {
        "nodelist": request.node,
        "nodes": 1,
        "memory_per_node": request.memory_mib,
        "time_limit": minutes(settings),
        "open_mode": "append",
        "no_requeue": True,
        **({"gres": gres} if gres else {}),
    }


def _description(settings: SlurmSettings, request: JobRequest) -> dict[str, Any]:
    gres = request.gpus(settings)
    return {
        "required_nodes": [request.node],
        "minimum_nodes": 1,
        "maximum_nodes": 1,
        "memory_per_node": _set(request.memory_mib),
        "time_limit": _set(minutes(settings)),
        "open_mode": ["APPEND"],
        "requeue": False,
        **({"tres_per_node": f"gres/{gres}"} if gres else {}),
    }


# what is answered -------------------------------------------------------------------------------------------
def errors(answer: Any) -> tuple[list[int], str]:
    """(error numbers, words) of an answer; it may have some whatever its HTTP status."""
    found = answer.get("errors") if isinstance(answer, Mapping) else None
    rows = [row for row in _rows(found) if isinstance(row, Mapping)]
    numbers = [row.get(name) for row in rows for name in ("error_number", "errno", "error_code")]
    words = [
        ": ".join(str(part) for part in (row.get("error"), row.get("description")) if part) for row in rows
    ]
    return [number for number in numbers if isinstance(number, int)], "; ".join(filter(None, words))


def is_refusal(numbers: Iterable[int]) -> bool:
    """Whether slurmctld was reached and said no."""
    return any(number in kind for number in numbers for kind in _REFUSALS)


def jobs(answer: Any, user: str) -> tuple[Job, ...]:
    """Of this user."""
    return tuple(_job(row) for row in _list(answer, "jobs") if row.get("user_name") == user)


def queue(answer: Any) -> tuple[Waiting, ...]:
    """What waits, whoever's it is."""
    return tuple(
        Waiting(
            job=_number(row.get("job_id")),
            partition=str(row.get("partition") or ""),
            reason=str(row.get("state_reason") or "None"),
            nodes=_number(row.get("node_count"), 1),
            cores=_number(row.get("cpus"), 0),
        )
        for row in _list(answer, "jobs")
        if _job_state(row) == "PENDING"
    )


def job_state(answer: Any) -> tuple[str, str]:
    """(state, reason) of the one job in it; PREEMPTED once Slurm has begun to."""
    rows = _list(answer, "jobs")
    if not rows:
        raise SlurmOutputError("slurmrestd showed no job")
    row = rows[-1]
    state = _job_state(row)
    is_preempted = state == "COMPLETING" and _number(row.get("preempt_time"), 0) > 0
    return "PREEMPTED" if is_preempted else state, str(row.get("state_reason") or "None")


def submitted(answer: Any) -> int:
    """The job's number; 0 when none was taken."""
    return _number(answer.get("job_id"), 0) if isinstance(answer, Mapping) else 0


def nodes(answer: Any, partitions: Iterable[str]) -> tuple[NodeUse, ...]:
    """Those of the partitions; of all where none is named."""
    wanted = {name for name in partitions if name}
    rows = _list(answer, "nodes")
    return tuple(_node(row) for row in rows if not wanted or wanted & set(_rows(row.get("partitions"))))


def licenses(answer: Any) -> tuple[License, ...]:
    return tuple(
        License(
            name=_text(row, "LicenseName"),
            total=_number(row.get("Total")),
            free=_number(row.get("Free")),
            reserved=_number(row.get("Reserved"), 0),
        )
        for row in _list(answer, "licenses")
    )


def clock_s(answer: Any) -> float:
    statistics = answer.get("statistics") if isinstance(answer, Mapping) else None
    return _number(statistics.get("req_time") if isinstance(statistics, Mapping) else None)


def partitions(answer: Any) -> frozenset[str]:
    return frozenset(_text(row, "name") for row in _list(answer, "partitions"))


def pings(answer: Any) -> str:
    """`slurmctld at host is UP`, a line each."""
    return "\n".join(
        f"slurmctld at {row.get('hostname')} is {row.get('ping') or row.get('pinged') or 'unknown'}"
        for row in _list(answer, "pings")
    )


def _job(row: Mapping[str, Any]) -> Job:
    state = _job_state(row)
    ends_s = _number(row.get("end_time"), 0)
    return Job(
        job=_number(row.get("job_id")),
        node=NodeId(str(row.get("nodes") or "")),
        state=state,
        reason=str(row.get("state_reason") or "None"),
        cores=_number(row.get("cpus"), 0),
        memory_bytes=_memory_bytes(row),
        ends_s=ends_s or NEVER_S,
        comment=str(row.get("comment") or ""),
        licenses=licenses_held(str(row.get("licenses") or "")),
    )


def _job_state(row: Mapping[str, Any]) -> str:
    """`RUNNING`, or `["RUNNING", "COMPLETING"]`: then the flag says more than the state."""
    words = [str(word) for word in _rows(row.get("job_state"))]
    if not words:
        raise SlurmOutputError(f"slurmrestd told no state of job {row.get('job_id')}")
    return "COMPLETING" if "COMPLETING" in words else words[0]


def _memory_bytes(row: Mapping[str, Any]) -> int:
    """On its one node: what it got, else what it asks for."""
    text = f"{row.get('tres_alloc_str') or ''} {row.get('tres_req_str') or ''}"
    found = _MEMORY.search(text)
    if found is not None and len(found[1]) <= 18:
        return int(float(found[1]) * MULTIPLE[found[2]])
    return _number(row.get("memory_per_node"), 0) * 2**20


def _node(row: Mapping[str, Any]) -> NodeUse:
    words = [str(word).lower() for word in (*_rows(row.get("state")), *_rows(row.get("state_flags")))]
    if not words:
        raise SlurmOutputError(f"slurmrestd told no state of node {row.get('name')}")
    return NodeUse(
        node=NodeId(_text(row, "name")),
        state=next((word for word in words if word in _UNUSABLE), words[0]),
        cores=_number(row.get("cpus")),
        cores_held=_number(row.get("alloc_cpus"), 0),
        memory_bytes=_number(row.get("real_memory")) * 2**20,
        memory_held_bytes=_number(row.get("alloc_memory"), 0) * 2**20,
        gpus=gpus(str(row.get("gres") or "")),
        gpus_held=gpus(str(row.get("gres_used") or "")),
        features=_features(row.get("features")),
        reason=str(row.get("reason") or ""),
    )


def _features(value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else [str(word) for word in _rows(value)]
    return tuple(word for word in words if word)


def _rows(value: Any) -> list[Any]:
    """A list as it is, a table's keys, nothing as none, anything else as the only one."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Mapping):
        return list(value)
    return [] if value is None or value == "" else [value]


def _list(answer: Any, name: str) -> list[Mapping[str, Any]]:
    rows = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise SlurmOutputError(f"slurmrestd sent no list of {name}")
    return rows


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise SlurmOutputError(f"slurmrestd sent {value!r} for {name}")
    return value


def _number(value: Any, default: int | None = None) -> int:
    """`5` or `{"set": true, "infinite": false, "number": 5}`."""
    if isinstance(value, Mapping):
        is_known = value.get("set", True) and not value.get("infinite")
        value = value.get("number") if is_known else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if default is not None and value is None:
        return default
    raise SlurmOutputError(f"slurmrestd sent {str(value)[:80]!r} where a number belongs")
