"""Which environments share a zygote."""

import asyncio
import sys

from isthmus.core.model import Environment
from isthmus.node import environments
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


def test_of_what_a_build_says_only_the_end_is_kept() -> None:
    talk = "print('x' * 10_000_000); print('the end')"
    status, said = asyncio.run(environments._run([sys.executable, "-c", talk], 60.0))
    assert status == 0
    assert said.endswith("the end\n")
    assert len(said) <= environments._SAID_BYTES
