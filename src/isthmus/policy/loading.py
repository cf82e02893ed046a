"""Read a policy file: TOML with [[rule]] tables, [fair] and [tenants.NAME].

Invariant: pure; every error is a PolicyError that names the file and the line. Not here: what rules and
tables mean (`rules.py`, `terms.py`) and how conditions are checked (`conditions.py`).
"""

import re
import tomllib
from typing import Any, TypeVar

import msgspec

from isthmus.core.errors import PolicyError
from isthmus.core.ids import TenantId
from isthmus.policy.conditions import FIELDS, STATIC_NODE_FIELDS, compile_condition
from isthmus.policy.rules import RULES_MAX, PolicySet, Rule, Spec
from isthmus.policy.terms import Fair, Guarantee, Terms

T = TypeVar("T", bound=msgspec.Struct)

_KEYS = ("rule", "fair", "tenants")
_HEADER = re.compile(r"\s*\[\[\s*rule\s*\]\]")


def load_policies(text: str, source: str = "policy.toml") -> PolicySet:
    """Compile a policy file's text. Raises PolicyError naming `source` and the line, nothing else: of the
    first error, with how many follow.
    """
    policies, errors = examine(text, source)
    if len(errors) > 1:
        raise PolicyError(f"{errors[0]} (and {len(errors) - 1} more: isthmus policy check {source})")
    if errors:
        raise errors[0]
    return policies


def examine(text: str, source: str = "policy.toml") -> tuple[PolicySet, tuple[PolicyError, ...]]:
    """What is right in a policy file, and everything that is wrong, in the file's order."""
    tree, errors = _parse(text, source)
    rules: list[Rule] = []
    tables, broken = _rule_tables(tree, text, source)
    for table, line in zip(tables, _header_lines(text), strict=False):
        try:
            rules.append(_compile(table, text, line, source))
        except PolicyError as error:
            broken.append(error)
    fair, unfair = _table(tree.get("fair", {}), Fair, "fair", text, source)
    terms, bad_terms = _terms(tree, text, source)
    errors += [*broken, *_duplicates(rules, source), *unfair, *bad_terms]
    ordered = tuple(sorted(rules, key=lambda rule: -rule.spec.priority))
    on_requests = tuple(rule for rule in ordered if "job" not in rule.spec.may_read)
    policies = PolicySet(
        rules=ordered,
        on_requests=on_requests,
        on_jobs=tuple(rule for rule in ordered if "job" in rule.spec.may_read),
        fair=fair or Fair(),
        terms=terms,
        guaranteed={tenant: one for tenant, one in terms.items() if one.guarantee != Guarantee()},
        source=source,
        text=text,
        reads=_union_of_reads(on_requests),
        shape_reads=_union_of_reads(tuple(rule for rule in on_requests if rule.per_shape)),
    )
    return policies, tuple(sorted(errors, key=lambda error: _line_of(error, source)))


def _parse(text: str, source: str) -> tuple[dict[str, Any], list[PolicyError]]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        return {}, [PolicyError(f"{source}:{line[1] if line else _last_line(text)}: {error}")]
    unknown = [
        PolicyError(
            f"{source}:{_table_line(text, key)}: unknown key {key!r}; "
            "a policy file holds [[rule]] tables, [fair] and [tenants.NAME]"
        )
        for key in tree
        if key not in _KEYS
    ]
    return tree, unknown


def _line_of(error: PolicyError, source: str) -> int:
    line = re.match(r"\d+", str(error).removeprefix(f"{source}:"))
    return int(line[0]) if line else 0


def _union_of_reads(rules: tuple[Rule, ...]) -> dict[str, frozenset[str]]:
    union = {root: frozenset[str]().union(*(rule.reads.get(root, ()) for rule in rules)) for root in FIELDS}
    return {root: names for root, names in union.items() if names}


def _last_line(text: str) -> int:
    """Where what stays open until the end of the file began: its last triple quotes, else its last line."""
    lines = text.splitlines() or [""]
    quotes = [number for number, line in enumerate(lines, 1) if '"""' in line or "'''" in line]
    return quotes[-1] if quotes else len(lines)


# tables -----------------------------------------------------------------------------------------------------
def _terms(tree: dict[str, Any], text: str, source: str) -> tuple[dict[TenantId, Terms], list[PolicyError]]:
    tables = tree.get("tenants", {})
    if not isinstance(tables, dict):
        line = _key_line(text, 1, "tenants")
        return {}, [PolicyError(f"{source}:{line}: write each tenant as [tenants.NAME]")]
    terms: dict[TenantId, Terms] = {}
    errors: list[PolicyError] = []
    for name, table in tables.items():
        one, wrong = _table(table, Terms, f"tenants.{name}", text, source)
        errors += wrong
        if one is not None:
            terms[TenantId(name)] = one
    return terms, errors


def _table(tree: Any, into: type[T], path: str, text: str, source: str) -> tuple[T | None, list[PolicyError]]:
    try:
        return msgspec.convert(tree, into), []
    except msgspec.ValidationError as error:
        start = _table_line(text, path)
        keys = re.findall(r"\.(\w+)", str(error).rpartition("`$")[2]) or re.findall(
            r"field `(\w+)`", str(error)
        )
        line = _key_line(text, start, keys[0]) if keys else start
        return None, [PolicyError(f"{source}:{line}: {path}: {error}")]


def _table_line(text: str, path: str) -> int:
    """The line of `[path]` or `[[path]]`, in whatever way the file writes it; 1 where it cannot be found."""
    words = [re.escape(word) for word in path.split(".")]
    name = r"\s*\.\s*".join(f"[\"']?{word}[\"']?" for word in words)
    header = re.compile(rf"\s*\[\[?\s*{name}\s*\]")
    lines = text.splitlines()
    exact = [number for number, line in enumerate(lines, 1) if header.match(line)]
    return exact[0] if exact else _key_line(text, 1, path.split(".")[0])


# rules ------------------------------------------------------------------------------------------------------
def _rule_tables(
    tree: dict[str, Any], text: str, source: str
) -> tuple[list[dict[str, Any]], list[PolicyError]]:
    """None where they are written in a way that says no lines."""
    tables = tree.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        wrong = f"{source}:{_key_line(text, 1, 'rule')}: write each rule as a [[rule]] table"
    elif tree and len(_header_lines(text)) != len(tables):
        wrong = f"{source}:1: write each rule as a [[rule]] table with its header on a line of its own"
    elif len(tables) > RULES_MAX:
        wrong = f"{source}:{_header_lines(text)[RULES_MAX]}: more than {RULES_MAX} rules"
    else:
        return tables, []
    return [], [PolicyError(wrong)]


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
    program, reads = compile_condition(spec.when, where)
    foreign = sorted(set(reads) - spec.may_read)
    if foreign:
        raise PolicyError(f"{where}{_cannot_read(table['then'], foreign[0], spec.may_read)}")
    return Rule(
        spec=spec,
        program=program,
        reads=reads,
        reads_node="node" in reads,
        per_shape="node" in reads and reads["node"] <= STATIC_NODE_FIELDS,
        line=line,
    )


def _cannot_read(then: str, variable: str, may_read: frozenset[str]) -> str:
    if variable == "node" and "request" in may_read:
        return f"a {then!r} rule is applied before a node is chosen; it cannot read node"
    return f"a {then!r} rule cannot read {variable}; it reads {', '.join(sorted(may_read))}"


def _where(table: dict[str, Any]) -> str:
    return f"rule {table['name']!r}: " if isinstance(table.get("name"), str) else "rule without a name: "


def _blamed_line(text: str, line: int, message: str, table: dict[str, Any]) -> int:
    """msgspec names the key in its message: ``unknown field `x` `` or ``at `$.x` ``."""
    blamed = re.search(r"field `(\w+)`|`\$\.(\w+)`", message)
    if blamed:
        return _key_line(text, line, blamed[1] or blamed[2])
    return _key_line(text, line, "then") if "then" in table else line


def _duplicates(rules: list[Rule], source: str) -> list[PolicyError]:
    seen: dict[str, int] = {}
    errors: list[PolicyError] = []
    for rule in rules:
        if rule.name in seen:
            errors.append(
                PolicyError(
                    f"{source}:{rule.line}: rule {rule.name!r} was already defined in line {seen[rule.name]}"
                )
            )
        seen.setdefault(rule.name, rule.line)
    return errors
