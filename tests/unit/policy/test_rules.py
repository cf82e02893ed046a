"""A policy file is typed when it is loaded; what is wrong with it is named with its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.errors import PolicyError
from isthmus.core.model import LeaseClass
from isthmus.policy import load_policies
from isthmus.policy.rules import Cap, Deny, Prefer, Reclass

GOOD = """
[[rule]]
name = "late"
then = "prefer"
when = "node.free_cores > 3"
weight = 2.5

[[rule]]
name = "first"
when = 'tenant.name == "guest" && request.gpus > 0'
then = "deny"
message = "guests get no GPUs"
priority = 10

[[rule]]
name = "capped"
then = "cap"
memory = "4GiB"
per = "pool"

[[rule]]
name = "paid"
when = "node.platform == 'local' ? true : false"
then = "prefer"

[[rule]]
name = "demoted"
when = "[1, 2].exists(core, core == request.cores)"
then = "class"
class = "elastic"
"""


def test_rules_are_typed_and_ordered_by_priority_then_by_file() -> None:
    policies = load_policies(GOOD)
    assert [rule.name for rule in policies.rules] == ["first", "late", "capped", "paid", "demoted"]
    kinds = [type(rule.spec) for rule in policies.rules]
    assert kinds == [Deny, Prefer, Cap, Prefer, Reclass]
    by_name = {rule.name: rule for rule in policies.rules}
    assert by_name["late"].reads_node
    assert not by_name["late"].per_shape
    assert by_name["paid"].per_shape
    assert not by_name["demoted"].reads_node
    assert by_name["capped"].spec == Cap(name="capped", memory="4GiB", per="pool")
    assert by_name["demoted"].spec == Reclass(
        name="demoted", when=by_name["demoted"].spec.when, lease_class=LeaseClass.ELASTIC
    )


def test_an_empty_file_has_no_rules() -> None:
    assert load_policies("# nothing yet\n").rules == ()


RULE = "[[rule]]\nname = 'a'\n"
DENY = RULE + "then = 'deny'\n"
BAD = {
    "broken TOML": ("[[rule]]\nname = \n", 2, "Invalid value"),
    "unknown table": ("[rules]\nname = 'a'\n", 1, "unknown key 'rules'"),
    "one table": ("[rule]\nname = 'a'\n", 1, r"\[\[rule\]\]"),
    "no name": ("\n[[rule]]\nthen = 'deny'\n", 2, "missing required field `name`"),
    "no action": ("\n[[rule]]\nname = 'a'\n", 2, "missing required field `then`"),
    "unknown action": (RULE + "then = 'allways'\n", 3, "Invalid value 'allways'"),
    "unknown key": (DENY + "mesage = 'no'\n", 4, "unknown field `mesage`"),
    "foreign key": (DENY + "weight = 1\n", 4, "unknown field `weight`"),
    "wrong type": (RULE + "then = 'prefer'\nweight = 'much'\n", 4, "Expected `float`"),
    "out of range": (RULE + "then = 'prefer'\nweight = 1000\n", 4, "<= 100"),
    "unknown class": (RULE + "then = 'class'\nclass = 'gold'\n", 4, "Invalid enum value"),
    "empty cap": (RULE + "then = 'cap'\n", 3, "at least one of"),
    "bad size": (RULE + "then = 'cap'\nmemory = 'lots'\n", 3, "not a size"),
    "bad CEL": (DENY + "when = '1 +'\n", 4, "not a CEL expression"),
    "unknown variable": (DENY + "when = 'user == 1'\n", 4, "unknown variable 'user'"),
    "unknown field": (
        DENY + "when = 'false && request.core > 1'\n",
        4,
        "no field 'core'",
    ),
    "unknown function": (DENY + "when = 'false && f(1)'\n", 4, "unknown function 'f'"),
    "not a truth": (DENY + "when = 'request.cores'\n", 4, "must be true or false"),
    "bad pattern": (DENY + "when = 'tenant.name.matches(\"(\")'\n", 4, "not a valid regex"),
    "loops in loops": (
        DENY + "when = '[1].all(x, [1].all(y, [1].all(z, true)))'\n",
        4,
        "more than 2 of all",
    ),
    "unlike types": (
        DENY + "when = 'request.cores > \"1\"'\n",
        4,
        "cannot be evaluated",
    ),
    "cap on a node": (
        RULE + "then = 'cap'\ncores = 1\nwhen = 'node.gpus > 0'\n",
        5,
        "cannot read node",
    ),
    "class by node": (
        RULE + "then = 'class'\nclass = 'elastic'\nwhen = 'node.gpus > 0'\n",
        5,
        "cannot read node",
    ),
    "twice": (
        DENY + RULE + "then = 'allow'\n",
        4,
        "already defined in line 1",
    ),
    "unknown table after a rule": (DENY + "\n[[rules]]\nname = 'b'\n", 5, "unknown key 'rules'"),
    "quotes left open": (RULE + 'when = """true\nthen = \'deny\'\n', 3, "Unterminated"),
    "no CEL": (DENY + "when = 'request.cores >'\n", 4, "mismatched input '<EOF>'$"),
    "unknown key of fair": ("[fair]\nhalf_live_h = 1\n", 2, "unknown field `half_live_h`"),
    "negative half-life": ("\n[fair]\nhalf_life_h = -1\n", 3, ">= 0"),
    "no weight": ("[tenants.a]\nweight = 0\n", 2, "> 0.0"),
    "unknown term": ("[tenants.a]\nlend = true\n[tenants.b]\nlends = true\n", 4, "unknown field `lends`"),
    "bad guarantee": ("[tenants.a]\nguarantee = { cores = -1 }\n", 2, ">= 0"),
    "bad memory": ("[tenants.a]\nguarantee = { memory = 'lots' }\n", 2, "not a size"),
    "no table": ("tenants = 3\n", 1, "write each tenant as"),
    "job in deny": (DENY + "when = 'job.cores > 1'\n", 4, "cannot read job"),
    "request in harvest": (
        RULE + "then = 'harvest'\nwhen = 'request.cores > 1'\n",
        4,
        "cannot read request; it reads clock, job, signal",
    ),
    "core-hours of a pool": (RULE + "then = 'cap'\ncore_hours = 1\nper = 'pool'\n", 3, "per tenant"),
    "endless window": (RULE + "then = 'cap'\ncore_hours = 1\nwindow_h = 9999\n", 5, "<= 744"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_rule_or_term_is_refused_with_its_file_and_line(case: str) -> None:
    text, line, words = BAD[case]
    with pytest.raises(PolicyError, match=words) as caught:
        load_policies(text, "/etc/isthmus/policy.toml")
    assert str(caught.value).startswith(f"/etc/isthmus/policy.toml:{line}: ")


def test_a_file_is_refused_for_its_first_error_with_how_many_follow() -> None:
    with pytest.raises(PolicyError, match="more: isthmus policy check") as caught:
        load_policies(RULE + "then = 'denny'\n" + RULE + "then = 'deni'\n[tenants.a]\nweight = 0\n")
    assert str(caught.value).startswith("policy.toml:3: ")
    assert "(and 2 more" in str(caught.value)


def _refusal(text: str) -> str:
    try:
        load_policies(text)
    except PolicyError as error:
        return str(error)
    return "policy.toml: fine"


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    assert _refusal(text).startswith("policy.toml:")


@given(st.text(max_size=60))
def test_any_condition_is_compiled_or_refused(condition: str) -> None:
    quoted = condition.replace("\\", "").replace('"', "").replace("\n", " ")
    assert _refusal(f'[[rule]]\nname = "x"\nthen = "deny"\nwhen = "{quoted}"\n').startswith("policy.toml:")
