"""Policies as data: a TOML file of named rules, typed and compiled when it is loaded.

    [[rule]]
    name = "no-gpus-for-guests"
    when = 'tenant.name == "guest" && request.gpus > 0'    # CEL; omitted: always
    then = "deny"                                          # allow | deny | prefer | cap | class
    message = "guests get no GPUs"                         # shown to whoever is refused
    priority = 10                                          # higher first; equal: in order of the file

What each action does, and its parameters:

    allow   the first matching `allow` or `deny` settles a request (on a node, if it mentions `node`); nothing
            matching means allowed. preempt = true lets a reserved request push elastic leases out.
    deny    the request (or the node) is refused with the message.
    prefer  adds `weight` (-100..100, default 1) to the score of each node it matches; all that match count.
    cap     limits what may be held at once: cores, memory, gpus, leases; per = "tenant" (default), "pool" or
            "site". All that match count, so the tightest wins. May not mention `node`.
    class   the lease gets class = "reserved" | "elastic" | "harvested"; the first that matches wins.
            May not mention `node`.

A condition that fails when it is evaluated (most often a label that is not there: guard it with `has()`)
counts as not matching, except in `deny`, where it counts as matching: a broken prohibition must not open a
door.

Invariant: pure; every error is a PolicyError that names the file and the line. Not here: what rules lead to
(`decide.py`).
"""

import re
import tomllib
from typing import Annotated, Any, ClassVar, Literal

import cel
import msgspec
from msgspec import Meta

from isthmus.core.errors import PolicyError
from isthmus.core.model import LeaseClass
from isthmus.core.units import parse_bytes

RULES_MAX = 1000
CONDITION_CHARACTERS_MAX = 4096
LOOPS_MAX = 2  # in one condition: six of ten rounds each, nested, would hold the site up for half a minute

STATIC_NODE_FIELDS = frozenset({"platform", "cores", "memory", "gpus", "labels"})
FIELDS: dict[str, frozenset[str]] = {
    "request": frozenset(
        {
            "cores",
            "memory",
            "gpus",
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
    "tenant": frozenset({"name", "role", "cores", "memory", "gpus", "leases"}),
    "node": STATIC_NODE_FIELDS | {"name", "free_cores", "free_memory", "free_gpus", "leases"},
    "pool": frozenset({"name", "leases", "minimum", "maximum"}),
    "clock": frozenset({"epoch_s", "hour", "minute", "weekday"}),
}
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
_FIELD = re.compile(r"(?<![\w.])(request|tenant|node|pool|clock)\b(?:\s*\.\s*(\w+))?")
_BOUND = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*(\w+)\s*,")
_LOOP = re.compile(r"\b(?:all|exists|exists_one|map|filter)\b")
_HEADER = re.compile(r"\s*\[\[\s*rule\s*\]\]")
_SAMPLE: dict[str, Any] = {
    "request": {
        "cores": 1, "memory": 2**30, "gpus": 0, "class": "elastic", "pool": "default", "count": 1,
        "together": False, "policy": "", "function": "", "labels": {}, "wait_s": 0.0,
    },
    "tenant": {"name": "", "role": "user", "cores": 0, "memory": 0, "gpus": 0, "leases": 0},
    "node": {
        "name": "", "platform": "local", "cores": 1, "memory": 2**30, "gpus": 0, "labels": {},
        "free_cores": 1, "free_memory": 2**30, "free_gpus": 0, "leases": 0,
    },
    "pool": {"name": "default", "leases": 0, "minimum": 0, "maximum": 1},
    "clock": {"epoch_s": 0.0, "hour": 0, "minute": 0, "weekday": 0},
}  # fmt: skip


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="then"):
    name: Annotated[str, Meta(min_length=1, max_length=100)]
    when: Annotated[str, Meta(max_length=CONDITION_CHARACTERS_MAX)] = "true"
    message: str = ""
    priority: int = 0
    may_mention_node: ClassVar[bool] = True


class Allow(_Spec, frozen=True, tag="allow"):
    preempt: bool = False


class Deny(_Spec, frozen=True, tag="deny"):
    pass


class Prefer(_Spec, frozen=True, tag="prefer"):
    weight: Annotated[float, Meta(ge=-100, le=100)] = 1.0


class Cap(_Spec, frozen=True, tag="cap"):
    """0 (or an empty memory) means that this resource is not capped by the rule."""

    cores: Annotated[int, Meta(ge=0)] = 0
    memory: str = ""
    gpus: Annotated[int, Meta(ge=0)] = 0
    leases: Annotated[int, Meta(ge=0)] = 0
    per: Literal["tenant", "pool", "site"] = "tenant"
    may_mention_node: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (self.cores or self.memory or self.gpus or self.leases):
            raise ValueError("a cap needs at least one of cores, memory, gpus, leases")
        parse_bytes(self.memory or 0)

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory or 0)


class Reclass(_Spec, frozen=True, tag="class"):
    lease_class: LeaseClass = msgspec.field(name="class")
    may_mention_node: ClassVar[bool] = False


Spec = Allow | Deny | Prefer | Cap | Reclass


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled rule.

    reads        the fields its condition reads, by variable; a field named "" stands for all of them
    reads_node   it must be evaluated for a node, not once per request
    per_shape    ... but only for one node of each shape: it reads nothing that differs among them
    """

    spec: Spec
    program: cel.Program
    reads: dict[str, frozenset[str]]
    reads_node: bool
    per_shape: bool
    line: int

    @property
    def name(self) -> str:
        return self.spec.name

    def matches(self, context: cel.Context) -> bool:
        """Whether the condition holds. Evaluation errors follow the module's rule: they match only a
        `deny`.
        """
        try:
            return self.program.execute(context) is True
        except EVALUATION_ERRORS:
            return isinstance(self.spec, Deny)


class PolicySet(msgspec.Struct, frozen=True, kw_only=True):
    """All rules, in the order in which they are evaluated, and the text they came from.

    reads   the fields that any condition reads, by variable: only these are shown to conditions
    """

    rules: tuple[Rule, ...] = ()
    source: str = ""
    text: str = ""
    reads: dict[str, frozenset[str]] = msgspec.field(default_factory=dict)

    @property
    def may_preempt(self) -> bool:
        """Whether some rule lets requests push elastic leases out."""
        return any(isinstance(rule.spec, Allow) and rule.spec.preempt for rule in self.rules)


ALLOW_ALL = PolicySet()


def load_policies(text: str, source: str = "policy.toml") -> PolicySet:
    """Compile a policy file's text. Raises PolicyError naming `source` and the line, nothing else."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise PolicyError(f"{source}:{line[1] if line else text.count(chr(10)) + 1}: {error}") from error
    tables = _rule_tables(tree, text, source)
    lines = _header_lines(text)
    rules = [_compile(table, text, line, source) for table, line in zip(tables, lines, strict=False)]
    _refuse_duplicates(rules, source)
    ordered = tuple(sorted(rules, key=lambda rule: -rule.spec.priority))
    return PolicySet(rules=ordered, source=source, text=text, reads=_union_of_reads(ordered))


def _union_of_reads(rules: tuple[Rule, ...]) -> dict[str, frozenset[str]]:
    union = {root: frozenset[str]().union(*(rule.reads.get(root, ()) for rule in rules)) for root in FIELDS}
    return {root: FIELDS[root] if "" in names else names for root, names in union.items() if names}


def _rule_tables(tree: dict[str, Any], text: str, source: str) -> list[dict[str, Any]]:
    for key in tree:
        if key != "rule":
            line = _key_line(text, 1, key)
            raise PolicyError(
                f"{source}:{line}: unknown key {key!r}; a policy file holds only [[rule]] tables"
            )
    tables = tree.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise PolicyError(f"{source}:{_key_line(text, 1, 'rule')}: write each rule as a [[rule]] table")
    if len(_header_lines(text)) != len(tables):
        raise PolicyError(
            f"{source}:1: write each rule as a [[rule]] table with its header on a line of its own"
        )
    if len(tables) > RULES_MAX:
        raise PolicyError(f"{source}:{_header_lines(text)[RULES_MAX]}: more than {RULES_MAX} rules")
    return tables


def _header_lines(text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]


def _key_line(text: str, start: int, key: str) -> int:
    """The line of `key = ...` (or its table) at or after line `start`; `start` where it cannot be found."""
    pattern = re.compile(rf"\s*(?:\[+\s*)?[\"']?{re.escape(key)}\b")
    for number, line in enumerate(text.splitlines()[start - 1 :], start):
        if number > start and _HEADER.match(line) and key != "rule":
            break
        if pattern.match(line):
            return number
    return start


def _compile(table: dict[str, Any], text: str, line: int, source: str) -> Rule:
    try:
        spec = msgspec.convert(table, Spec)
    except msgspec.ValidationError as error:
        raise PolicyError(
            f"{source}:{_blamed_line(text, line, str(error), table)}: {_where(table)}{error}"
        ) from error
    where = f"{source}:{_key_line(text, line, 'when')}: rule {spec.name!r}: "
    program = _compile_condition(spec.when, where)
    fields = _check_names(spec.when, program, where)
    if "node" in fields and not spec.may_mention_node:
        raise PolicyError(
            f"{where}a {table['then']!r} rule is applied before a node is chosen; it cannot read node"
        )
    _try(program, where)
    return Rule(
        spec=spec,
        program=program,
        reads={root: frozenset(names) for root, names in fields.items()},
        reads_node="node" in fields,
        per_shape="node" in fields and fields["node"] <= STATIC_NODE_FIELDS,
        line=line,
    )


def _where(table: dict[str, Any]) -> str:
    return f"rule {table['name']!r}: " if isinstance(table.get("name"), str) else "rule without a name: "


def _blamed_line(text: str, line: int, message: str, table: dict[str, Any]) -> int:
    """msgspec names the key in its message: ``unknown field `x` `` or ``at `$.x` ``."""
    blamed = re.search(r"field `(\w+)`|`\$\.(\w+)`", message)
    if blamed:
        return _key_line(text, line, blamed[1] or blamed[2])
    return _key_line(text, line, "then") if "then" in table else line


def _compile_condition(when: str, where: str) -> cel.Program:
    if len(_LOOP.findall(when)) > LOOPS_MAX:
        raise PolicyError(f"{where}more than {LOOPS_MAX} of all, exists, exists_one, map and filter")
    try:
        return cel.compile(when)
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise PolicyError(f"{where}not a CEL expression: {detail}") from error


def _check_names(when: str, program: cel.Program, where: str) -> dict[str, set[str]]:
    """The fields that a condition reads, by variable. A bare variable counts as reading a field named ''."""
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
        if field and field not in FIELDS[root]:
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


def _refuse_duplicates(rules: list[Rule], source: str) -> None:
    seen: dict[str, int] = {}
    for rule in rules:
        if rule.name in seen:
            raise PolicyError(
                f"{source}:{rule.line}: rule {rule.name!r} was already defined in line {seen[rule.name]}"
            )
        seen[rule.name] = rule.line
