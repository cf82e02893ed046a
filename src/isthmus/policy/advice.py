"""What a policy file says that its author may not have meant: `advice(policies) -> lines`.

Invariant: pure; an advice is never an error: the file works as `rules.py` says.
"""

from collections.abc import Iterator

from isthmus.policy.rules import Allow, Deny, PolicySet, Protect, Reclass, Rule


def advice(policies: PolicySet) -> tuple[str, ...]:
    """Lines for a person, in order of the rules."""
    return (*_shadowed(policies), *_unguarded(policies), *_needless_loans(policies))


def _shadowed(policies: PolicySet) -> Iterator[str]:
    """Rules that come after one that settles the same always."""
    for kinds in ((Allow, Deny), (Reclass,)):
        first: Rule | None = None
        for rule in policies.on_requests:
            if not isinstance(rule.spec, kinds):
                continue
            if first is not None:
                yield (
                    f"line {rule.line}: rule {rule.name!r} can never settle anything: {first.name!r} comes "
                    "before it and always matches; give it a higher priority"
                )
            elif rule.spec.when.strip() == "true":
                first = rule


def _unguarded(policies: PolicySet) -> Iterator[str]:
    """Prohibitions that also hold where a label or a signal is missing."""
    for rule in policies.rules:
        if not isinstance(rule.spec, Deny | Protect) or "has(" in rule.spec.when:
            continue
        optional = [
            variable
            for variable in ("request", "node")
            if "labels" in rule.reads.get(variable, ()) and f"{variable}.labels" in rule.spec.when
        ]
        optional += ["signal"] * ("signal" in rule.reads)
        if optional:
            what = " or ".join("a signal" if one == "signal" else f"a label of the {one}" for one in optional)
            yield (
                f"line {rule.line}: rule {rule.name!r} also holds where {what} is missing; "
                "write has(...) && ... if it should not"
            )


def _needless_loans(policies: PolicySet) -> Iterator[str]:
    for tenant, terms in policies.terms.items():
        if not terms.lend and tenant not in policies.guaranteed:
            yield f"tenant {tenant!r} lends nothing and has no guarantee: `lend` has no effect"
