"""Conditions of rules: CEL expressions, compiled and checked when they are loaded.

Invariant: pure; a condition that names what is not there, calls what is not there or is no truth is refused
with a PolicyError before it ever decides anything. What cannot be checked ahead (a label, a signal, a
division) may still fail when it is evaluated: what that means is the action's business (`rules.py`).
"""

import re
from typing import Any

import cel

from isthmus.core.errors import PolicyError
from isthmus.core.kinds import OF_NODES

_TOKENS = re.compile(
    r" expecting \{.*?\}(?= |$)"
)  # all that the grammar would have taken, which helps nobody
CONDITION_CHARACTERS_MAX = 4096
LOOPS_MAX = 2  # in one condition: six of ten rounds each, nested, would hold the site up for half a minute

STATIC_NODE_FIELDS = frozenset({"platform", "cores", "memory", "gpus", "labels", *OF_NODES})
FIELDS: dict[str, frozenset[str]] = {
    "request": frozenset(
        {
            "cores",
            "memory",
            "gpus",
            *OF_NODES,
            "licenses",
            "class",
            "pool",
            "count",
            "together",
            "policy",
            "function",
            "labels",
            "wait_s",
        }
    ),
    "tenant": frozenset(
        {"name", "role", "cores", "memory", "gpus", *OF_NODES, "licenses", "leases", "level"}
    ),
    "node": STATIC_NODE_FIELDS
    | {"name", "free_cores", "free_memory", "free_gpus", "leases"}
    | {f"free_{kind}" for kind in OF_NODES},
    "pool": frozenset({"name", "leases", "minimum", "maximum"}),
    "clock": frozenset({"epoch_s", "hour", "minute", "weekday"}),
    "signal": frozenset(),  # whatever the site's source of signals names
    "job": frozenset({"id", "name", "user", "account", "partition", "qos", "cores", "memory"}),
}
OPEN_VARIABLES = frozenset({"signal"})  # their fields are known only when a decision is made
_CONVERSIONS = frozenset({"int", "uint", "double", "string", "bytes", "timestamp", "duration"})
_FUNCTIONS = frozenset(
    _CONVERSIONS
    | {"size", "contains", "startsWith", "endsWith", "matches", "has", "min", "max"}
    | {"all", "exists", "exists_one", "map", "filter"}
)
EVALUATION_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
)  # all that `cel` raises
_STRING = re.compile(r'"(?:\\.|[^"\\])*"' r"|'(?:\\.|[^'\\])*'")
_FIELD = re.compile(rf"(?<![\w.])({'|'.join(FIELDS)})\b(?:\s*\.\s*(\w+))?")
_BOUND = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*(\w+)\s*,")
_LOOP = re.compile(r"\b(?:all|exists|exists_one|map|filter)\b")
_NOTHING = dict.fromkeys(OF_NODES, 0)
_SAMPLE: dict[str, Any] = {
    "request": {
        "cores": 1, "memory": 2**30, "gpus": 0, "licenses": {}, "class": "elastic", "pool": "default",
        "count": 1, "together": False, "policy": "", "function": "", "labels": {}, "wait_s": 0.0,
        **_NOTHING,
    },
    "tenant": {
        "name": "", "role": "user", "cores": 0, "memory": 0, "gpus": 0, "licenses": {}, "leases": 0,
        "level": 0.0, **_NOTHING,
    },
    "node": {
        "name": "", "platform": "local", "cores": 1, "memory": 2**30, "gpus": 0, "labels": {},
        "free_cores": 1, "free_memory": 2**30, "free_gpus": 0, "leases": 0, **_NOTHING,
        **{f"free_{kind}": 0 for kind in OF_NODES},
    },
    "pool": {"name": "default", "leases": 0, "minimum": 0, "maximum": 1},
    "clock": {"epoch_s": 0.0, "hour": 0, "minute": 0, "weekday": 0},
    "signal": {},
    "job": {
        "id": "", "name": "", "user": "", "account": "", "partition": "", "qos": "", "cores": 1,
        "memory": 2**30,
    },
}  # fmt: skip


def compile_condition(when: str, where: str) -> tuple[cel.Program, dict[str, frozenset[str]]]:
    """The program, and the fields that it reads by variable; of an open one, a field named '' stands for all.

    where    what messages begin with
    raises   PolicyError
    """
    program = _compile(when, where)
    reads = _check_names(when, program, where)
    _try(program, where)
    return program, {
        root: FIELDS[root] if "" in names and root not in OPEN_VARIABLES else frozenset(names)
        for root, names in reads.items()
    }


def _compile(when: str, where: str) -> cel.Program:
    if len(_LOOP.findall(when)) > LOOPS_MAX:
        raise PolicyError(f"{where}more than {LOOPS_MAX} of all, exists, exists_one, map and filter")
    try:
        return cel.compile(when)
    except ValueError as error:
        detail = _TOKENS.sub("", " ".join(str(error).split())).partition(" | ")[0]
        raise PolicyError(f"{where}not a CEL expression: {detail}") from error


def _check_names(when: str, program: cel.Program, where: str) -> dict[str, set[str]]:
    bare = _STRING.sub('""', when)
    bound = set(_BOUND.findall(bare))
    for name in program.variables():
        if name not in FIELDS and name not in bound:
            raise PolicyError(f"{where}unknown variable {name!r}; there are {', '.join(FIELDS)}")
    for name in program.functions():
        if name.isidentifier() and not name.startswith("_") and name not in _FUNCTIONS:
            raise PolicyError(f"{where}unknown function {name!r}")
    fields: dict[str, set[str]] = {}
    for root, field in _FIELD.findall(bare):
        if root in bound:
            continue
        if field and field not in FIELDS[root] and root not in OPEN_VARIABLES:
            raise PolicyError(
                f"{where}{root} has no field {field!r}; it has {', '.join(sorted(FIELDS[root]))}"
            )
        fields.setdefault(root, set()).add(field)
    return fields


def _try(program: cel.Program, where: str) -> None:
    """Evaluate once against a sample, to refuse conditions that are no truth or compare unlike types."""
    try:
        value = program.execute(_SAMPLE)
    except (LookupError, ArithmeticError):
        return  # a label that the sample lacks, or a number that is 0 there
    except EVALUATION_ERRORS as error:
        if isinstance(error, RuntimeError) and not _CONVERSIONS.isdisjoint(program.functions()):
            return  # a text that is empty in the sample
        raise PolicyError(f"{where}cannot be evaluated: {error}") from error
    if not isinstance(value, bool):
        raise PolicyError(f"{where}must be true or false, not {value!r}; compare it with something")
