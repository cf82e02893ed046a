"""Read what Slurm's commands print. Pure and total: any text gives values or SlurmOutputError.

A line that is cut short, or a number that is none, makes the whole output unreadable: half a list must never
look like a list from which jobs are missing.
"""

import re
from collections.abc import Iterator

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import NodeId
from isthmus.platforms.slurm.commands import JOB_FIELDS, MARK, NODE_FIELDS, SEPARATOR
from isthmus.platforms.slurm.records import NEVER_S, Job, License, NodeUse

MULTIPLE = {"K": 2**10, "M": 2**20, "": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}  # of memory
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGTP]?)[cn]?")
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")
_GRANTED = re.compile(r"Granted job allocation (\d+)")
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
    return tuple(_job(fields) for fields in _lines(text, len(JOB_FIELDS)))


def nodes(text: str) -> tuple[NodeUse, ...]:
    """Of `commands.list_nodes`; a node of several partitions once. Raises SlurmOutputError."""
    found = {use.node: use for use in (_node(fields) for fields in _node_lines(text))}
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


def granted(text: str) -> int:
    """The job's number in what `salloc` said. Raises SlurmOutputError."""
    found = _GRANTED.search(text)
    if found is None:
        raise SlurmOutputError(f"salloc named no job: {_excerpt(text)}")
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
    node, state, cores, memory, held, gres, gres_held, features = fields
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
    )


def _lines(text: str, count: int) -> Iterator[list[str]]:
    """Fields of each line, without the mark; the last may contain the separator (a user's comment)."""
    if text and not text.endswith("\n"):
        raise SlurmOutputError(f"the output ends within a line: {_excerpt(text[-80:])}")
    for line in text.split("\n")[:-1]:
        fields = line.split(SEPARATOR)
        if len(fields) < count + 1 or fields[-1] != MARK:
            raise SlurmOutputError(f"a line has {len(fields) - 1} fields, not {count}: {_excerpt(line)}")
        yield [*fields[: count - 1], SEPARATOR.join(fields[count - 1 : -1])]


def _node_lines(text: str) -> Iterator[list[str]]:
    """sinfo pads its fields and ends each with the separator, which is as good as a mark."""
    count = len(NODE_FIELDS)
    if text and not text.endswith("\n"):
        raise SlurmOutputError(f"the output ends within a line: {_excerpt(text[-80:])}")
    for line in text.split("\n")[:-1]:
        fields = [field.strip() for field in line.split(SEPARATOR)]
        if len(fields) != count + 1 or fields[-1]:
            raise SlurmOutputError(f"a line has {len(fields) - 1} fields, not {count}: {_excerpt(line)}")
        yield fields[:-1]


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
