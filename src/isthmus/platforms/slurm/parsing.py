"""Read what Slurm's commands print. Pure and total: any text gives values or SlurmOutputError.

A row that is cut short, or a number that is none, makes the whole output unreadable: half a list must never
look like a list from which jobs are missing. A row ends with words that people wrote, maybe in several lines.
"""

import re
from collections.abc import Iterator

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import NodeId
from isthmus.platforms.slurm.commands import JOB_FIELDS, MARK, NODE_FIELDS, QUEUE_FIELDS, SEPARATOR
from isthmus.platforms.slurm.records import NEVER_S, BatchJob, Job, License, NodeUse, Waiting

MULTIPLE = {"K": 2**10, "M": 2**20, "": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}  # of memory
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)[cn]?")
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
_GRANTED = re.compile(r"Granted job allocation (\d+)")
_SUBMITTED = re.compile(r"^(\d+)(?:;\S+)?$", re.MULTILINE)
_CLOCK = re.compile(r"sdiag output at .*\((\d+)\)")
_NAME = re.compile(r"\bJobName=(.*?) UserId=")
_ACCOUNT = re.compile(r"\bAccount=(\S+) QOS=(\S+)")
_NODES = re.compile(r"\bNumNodes=(\d+)")
_TRES_MEMORY = re.compile(r"TRES=\S*?\bmem=(\d+(?:\.\d+)?[KMGTP]?)")
_STATE = re.compile(r"\bJobState=([A-Z_]+)")
_PREEMPTED = re.compile(r"\bPreemptTime=\d")
_REASON = re.compile(r"\bReason=(\S+)")
_LICENSE = re.compile(r"LicenseName=(\S+) (.*)")
_COUNT = re.compile(r"\b(Total|Free|Reserved)=(\d+)")
_HELD = re.compile(r"([^:,;]+)(?::(\d{1,9}))?(?=[,;]|$)")
_NODE_FLAGS = "*~#!%$@+^-"


class SlurmOutputError(SiteUnavailableError):
    """Slurm said what cannot be read. Nothing changes because of it."""


def jobs(text: str) -> tuple[Job, ...]:
    """Of `commands.list_jobs`. Raises SlurmOutputError."""
    return tuple(_job(fields) for fields in _rows(text, len(JOB_FIELDS), f"{SEPARATOR}{MARK}\n"))


def queue(text: str) -> tuple[Waiting, ...]:
    """Of `commands.list_queue`. Raises SlurmOutputError."""
    return tuple(
        Waiting(
            job=_number(job), partition=partition, reason=reason, nodes=_number(nodes), cores=_number(cores)
        )
        for job, partition, nodes, cores, reason in _rows(text, len(QUEUE_FIELDS), f"{SEPARATOR}{MARK}\n")
    )  # fmt: skip


def nodes(text: str) -> tuple[NodeUse, ...]:
    """Of `commands.list_nodes`; a node of several partitions once. Raises SlurmOutputError, for none too."""
    rows = _rows(text, len(NODE_FIELDS), f"{SEPARATOR}\n")
    found = {use.node: use for use in (_node([field.strip() for field in fields]) for fields in rows)}
    if not found:
        raise SlurmOutputError(
            "sinfo shows us no node at all; is slurm.partition a partition of this cluster?"
        )
    return tuple(found.values())


def licenses(text: str) -> tuple[License, ...]:
    """Of `commands.list_licenses`. Raises SlurmOutputError."""
    if text and not text.endswith("\n"):
        raise SlurmOutputError(f"the output ends within a line: {_excerpt(text[-80:])}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return tuple(_license(line) for line in lines if not line.startswith("No licenses"))


def licenses_held(text: str) -> dict[str, int]:
    """`matlab:2,ansys` of a job, `(null)` for none; without a number it is one. Alternatives count nothing:
    Slurm does not say which was taken.
    """
    if text in ("(null)", "N/A") or "|" in text:
        return {}
    return {name: int(count or 1) for name, count in _HELD.findall(text)}


def _license(line: str) -> License:
    found = _LICENSE.fullmatch(line)
    counts = dict(_COUNT.findall(found[2])) if found is not None else {}
    if found is None or not {"Total", "Free"} <= set(counts):
        raise SlurmOutputError(f"scontrol printed a licence as {_excerpt(line)}")
    return License(
        name=found[1],
        total=_number(counts["Total"]),
        free=_number(counts["Free"]),
        reserved=_number(counts.get("Reserved", "0")),
    )


def clock_s(text: str) -> float:
    """Of `commands.show_diagnostics`. Raises SlurmOutputError."""
    found = _CLOCK.search(text)
    if found is None:
        raise SlurmOutputError(f"sdiag told no time: {_excerpt(text)}")
    return float(_number(found[1]))


def batch_job(job: int, text: str) -> BatchJob:
    """Of `commands.show_job`. Raises SlurmOutputError."""
    name, account, nodes = _NAME.search(text), _ACCOUNT.search(text), _NODES.search(text)
    if name is None or account is None or nodes is None:
        raise SlurmOutputError(f"scontrol described job {job} as {_excerpt(text)}")
    memory = _TRES_MEMORY.findall(text)  # asked for, then given
    return BatchJob(
        job=job, name=name[1], account=_known(account[1]), qos=_known(account[2]), nodes=_number(nodes[1]),
        memory_bytes=_memory_bytes(memory[-1]) if memory else 0,
    )  # fmt: skip


def _known(word: str) -> str:
    return "" if word in ("(null)", "N/A") else word


def granted(text: str) -> int:
    """The job's number in what `salloc` said. Raises SlurmOutputError."""
    found = _GRANTED.search(text)
    if found is None:
        raise SlurmOutputError(f"salloc named no job: {_excerpt(text)}")
    return _number(found[1])


def submitted(text: str) -> int:
    """The job's number in what `sbatch --parsable` said: `12`, or `12;cluster`. Raises SlurmOutputError."""
    found = _SUBMITTED.search(text)
    if found is None:
        raise SlurmOutputError(f"sbatch named no job: {_excerpt(text)}")
    return _number(found[1])


def shown_state(text: str) -> tuple[str, str]:
    """(state, reason) of `scontrol show job`; PREEMPTED once Slurm has begun to. Raises SlurmOutputError."""
    state, reason = _STATE.search(text), _REASON.search(text)
    if state is None:
        raise SlurmOutputError(f"scontrol showed no job: {_excerpt(text)}")
    is_preempted = state[1] == "COMPLETING" and _PREEMPTED.search(text) is not None
    return "PREEMPTED" if is_preempted else state[1], reason[1] if reason else "None"


def _job(fields: list[str]) -> Job:
    job, node, state, reason, cores, memory, ends, held, comment = fields
    return Job(
        job=_number(job),
        node=NodeId(node),
        state=state,
        reason=reason,
        cores=_number(cores),
        memory_bytes=_memory_bytes(memory),
        ends_s=_number(ends) if ends.isdecimal() else NEVER_S,
        comment=comment,
        licenses=licenses_held(held),
    )


def _node(fields: list[str]) -> NodeUse:
    node, state, cores, memory, held, gres, gres_held, features, reason = fields
    counts = [_number(part) for part in cores.split("/")]
    if len(counts) != 4 or not node:
        raise SlurmOutputError(f"sinfo printed cores as {_excerpt(cores)}, not allocated/idle/other/total")
    return NodeUse(
        node=NodeId(node),
        state=state.rstrip(_NODE_FLAGS),
        cores=counts[3],
        cores_held=counts[0],
        memory_bytes=_number(memory) * 2**20,
        memory_held_bytes=_number(held) * 2**20,
        gpus=gpus(gres),
        gpus_held=gpus(gres_held),
        features=tuple(part for part in features.split(",") if part != "(null)"),
        reason="" if reason == "none" else reason,
    )


def _rows(text: str, count: int, end: str) -> Iterator[list[str]]:
    """Fields of each row. The last is somebody's words: it may hold separators, and line breaks as well, as
    long as what follows one could be no row itself.
    """
    if text and not text.endswith(end):
        raise SlurmOutputError(f"the output ends within a row: {_excerpt(text[-80:])}")
    for row in text.split(end)[:-1]:
        fields = row.split(SEPARATOR, count - 1)
        more_lines = fields[-1].split("\n")[1:]
        if any("\n" in field for field in fields[:-1]) or len(fields) != count:
            raise SlurmOutputError(f"a row has {len(fields)} fields, not {count}: {_excerpt(row)}")
        if any(line.count(SEPARATOR) >= count - 1 for line in more_lines):
            raise SlurmOutputError(f"a row has no end: {_excerpt(row)}")
        yield fields


def configuration(text: str) -> dict[str, str]:
    """Of `commands.show_configuration`: lines `Key   = value`."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, separator, value in pairs if separator}


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise SlurmOutputError(f"{_excerpt(text)} is no number")
    return int(text)


def _memory_bytes(text: str) -> int:
    found = _MEMORY.fullmatch(text)
    if found is None or len(text) > 18:
        raise SlurmOutputError(f"{_excerpt(text)} is no amount of memory")
    return int(float(found[1]) * MULTIPLE[found[2]])


def gpus(gres: str) -> int:
    """`gpu:4`, `gpu:a100:2(S:0-1),gpu:v100:1`, `(null)`, ...; other resources count nothing."""
    return sum(_number(found) for found in _GPUS.findall(gres))


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
