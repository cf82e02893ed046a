"""Which environments share a zygote."""

import sys

from isthmus.core.model import Environment
from isthmus.node.environments import shared


def test_callers_that_differ_in_import_directories_share_a_zygote() -> None:
    caller = Environment(python=sys.executable, sys_path=("/home/a",))
    assert shared(caller) == Environment()


def test_a_preload_needs_its_import_directories_before_the_fork() -> None:
    caller = Environment(sys_path=("/home/a",), preload=("mine",))
    assert shared(caller) == caller


def test_another_interpreter_or_other_requirements_need_a_zygote_of_their_own() -> None:
    for environment in (Environment(python="/other/python"), Environment(requirements=("numpy",))):
        assert shared(environment) == environment
