"""What a policy file says that its author may not have meant."""

from isthmus.policy import advice, load_policies


def _rule(name: str, then: str, when: str = "true", more: str = "") -> str:
    return f"[[rule]]\nname = '{name}'\nthen = '{then}'\nwhen = '{when}'\n{more}\n"


def test_a_sound_file_gets_no_advice() -> None:
    text = _rule("a", "deny", 'has(node.labels.zone) && node.labels.zone == "x"') + _rule("b", "allow")
    assert advice(load_policies(text + "[tenants.x]\nlend = false\nguarantee = { cores = 1 }\n")) == ()


def test_rules_that_can_never_settle_anything_are_pointed_out() -> None:
    text = _rule("all", "allow") + _rule("late", "deny", "clock.hour > 20")
    text += _rule("one", "class", more='class = "elastic"') + _rule("two", "class", more='class = "reserved"')
    lines = advice(load_policies(text))
    assert "rule 'late' can never settle anything: 'all' comes before it" in lines[0]
    assert "rule 'two' can never settle anything" in lines[1]


def test_prohibitions_that_hold_without_their_label_or_signal_are_pointed_out() -> None:
    text = _rule("zone", "deny", 'node.labels.zone == "x"') + _rule("green", "deny", "signal.carbon > 300.0")
    lines = advice(load_policies(text))
    assert "rule 'zone' also holds where a label of the node is missing" in lines[0]
    assert "rule 'green' also holds where a signal is missing" in lines[1]


def test_lending_nothing_without_a_guarantee_is_pointed_out() -> None:
    (line,) = advice(load_policies(_rule("p", "protect") + "[tenants.x]\nlend = false\n"))
    assert "`lend` has no effect" in line
