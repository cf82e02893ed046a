"""CPython's own executor tests, run against `isthmus.Executor`.

`_LEFT_OUT` names every test that is not run, with the reason. Where only the means differ (a worker's output
goes to the lease's log, not to our stdout), `tests/live/test_sdk_executor.py` tests the same behaviour by
other means.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import isthmus
from tests.cpython import suite

_SCRATCH = tempfile.TemporaryDirectory(prefix="isthmus-cpython-")
_LOADED = suite.load(Path(_SCRATCH.name))
if _LOADED is None:
    pytest.skip("this interpreter has no test.test_concurrent_futures", allow_module_level=True)
cpython, _MODULES = _LOADED

_STDERR = logging.lastResort
_OUTPUT = "reads the worker's output from our stdout; it goes to the lease's log"
_INTERNALS = "looks into ProcessPoolExecutor's private parts"
_ALONE = "a process pool breaks; here the call fails alone, with the unpickling error"
_LEFT_OUT = {
    "test_interpreter_shutdown": _OUTPUT,
    "test_submit_after_interpreter_shutdown": "imports the executor from concurrent.futures by name",
    "test_hang_gh83386": _OUTPUT,
    "test_hang_gh94440": "imports the executor from concurrent.futures by name",
    "test_shutdown_deadlock_pickle": _INTERNALS,
    "test_crash_big_data": _INTERNALS,
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full": _INTERNALS,
    "test_error_at_task_unpickle": _ALONE,
    "test_exit_at_task_unpickle": _ALONE,
    "test_error_during_result_pickle_on_worker": "raises CodecError, not PicklingError",
    "test_exit_during_result_pickle_on_worker": "exiting while a result is pickled ends the worker",
    "test_error_during_result_unpickle_in_result_handler": _ALONE,
    "test_exit_during_result_unpickle_in_result_handler": _ALONE,
}


@pytest.fixture(scope="module", autouse=True)
def _site() -> Iterator[None]:
    """Keeps one embedded site up while each test opens and closes its own client of it."""
    with isthmus.connect():
        yield
    _SCRATCH.cleanup()


class _Pool(cpython.ExecutorMixin):  # type: ignore[misc, name-defined]
    executor_type = isthmus.Executor

    def get_context(self) -> None:
        return None


def _case(name: str, *bases: type) -> type:
    left_out = {test: None for test in _LEFT_OUT if any(hasattr(base, test) for base in bases)}
    return type(name, (*bases, _Pool, cpython.BaseTestCase), {"__module__": __name__, **left_out})


TestExecutor = _case("TestExecutor", cpython.ExecutorTest)
TestShutdown = _case("TestShutdown", cpython.ExecutorShutdownTest)
TestWait = _case("TestWait", cpython.WaitTests)
TestAsCompleted = _case("TestAsCompleted", cpython.AsCompletedTests)
TestInitializer = _case("TestInitializer", cpython.InitializerMixin)
TestFailingInitializer = _case("TestFailingInitializer", cpython.FailingInitializerMixin)
TestDeadlock = _case("TestDeadlock", cpython.ExecutorDeadlockTest)


class TestFuture(cpython.FutureTests):  # type: ignore[misc, name-defined]
    """Futures that belong to no call, made by hand."""

    def setUp(self) -> None:
        super().setUp()
        for module in _MODULES:
            if hasattr(module, "Future"):
                self._swap(module, isthmus.Future)
        logger = logging.getLogger("concurrent.futures")
        logger.addHandler(
            _STDERR
        )  # these tests read the log from stderr, where pytest's capture keeps it from
        self.addCleanup(logger.removeHandler, _STDERR)

    def _swap(self, module: Any, kind: type) -> None:
        self.addCleanup(setattr, module, "Future", module.Future)
        module.Future = kind
